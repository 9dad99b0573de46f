//! The line protocol between the harness and the agent in a guest.
//!
//! One JSON object per line on the guest's second serial port. The harness sends [`Request`]s, one at a time; the
//! agent answers each with a [`Message::Reply`] of the same id. [`Message::Ready`] and [`Message::Output`] come
//! unasked. Anything that is not a JSON object (a stray kernel message, line noise) is ignored by both sides.

use serde::{Deserialize, Serialize};

/// What the harness asks for.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Request {
    /// Chosen by the harness, repeated in the reply.
    pub id: u64,
    /// What to do.
    #[serde(flatten)]
    pub op: Op,
}

/// One operation of the agent.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Op {
    /// Run a program to its end. The reply is a [`RunOutcome`].
    Run {
        /// Program and arguments.
        argv: Vec<String>,
        /// Kill it after this time.
        timeout_ms: u64,
        /// Send its output line by line while it runs, instead of with the reply.
        stream: bool,
    },
    /// `finit_module`.
    LoadModule {
        /// The `.ko`.
        path: String,
        /// Module parameters, as `insmod` takes them.
        params: String,
    },
    /// `delete_module`.
    UnloadModule {
        /// The module's name.
        name: String,
    },
    /// Read a small text file, sysfs above all.
    Read {
        /// The file.
        path: String,
    },
    /// Write a small text file, sysfs above all.
    Write {
        /// The file.
        path: String,
        /// What to write, in one `write`.
        data: String,
    },
    /// Names in a directory.
    List {
        /// The directory.
        path: String,
    },
    /// Wait until the number in a file has reached a value. The reply is the number.
    WaitCounter {
        /// A file that holds one number.
        path: String,
        /// Wait for this or more.
        at_least: u64,
        /// Give up after this time.
        timeout_ms: u64,
    },
    /// Every regular file that a process maps. The reply is a list of paths.
    MappedFiles,
    /// Hash files by `read` and through a mapping. The reply is a list of [`FileSum`].
    Checksum {
        /// The files.
        paths: Vec<String>,
    },
    /// Create (or overwrite from the start) a file with [`crate::pattern`] bytes and wait until they are on disk.
    WritePattern {
        /// The file.
        path: String,
        /// Seed of the pattern.
        seed: u64,
        /// Where in the file to write.
        offset: u64,
        /// How many bytes.
        bytes: u64,
    },
    /// Map a file read-only and keep it mapped.
    Hold {
        /// The file.
        path: String,
    },
    /// Hash what a held mapping shows. The reply is the hash.
    HeldSum {
        /// The path given to `hold`; the file itself may be gone by now.
        path: String,
    },
    /// Touch every page of a held mapping. The reply is the guest's frame of each, in order.
    HeldFrames {
        /// The path given to `hold`.
        path: String,
    },
    /// Map a part of a file read-only and keep it mapped, under a name of its own.
    HoldPart {
        /// The file.
        path: String,
        /// What the mapping is called from then on.
        name: String,
        /// Where the part begins, a whole number of pages.
        offset: u64,
        /// Its length.
        bytes: u64,
    },
    /// Make a memfd with [`crate::pattern`] bytes and keep it mapped read-only.
    HoldMemory {
        /// What the mapping is called from then on.
        name: String,
        /// Seed of the pattern.
        seed: u64,
        /// How many bytes.
        bytes: u64,
        /// Seal it against writing before it is mapped.
        sealed: bool,
    },
    /// Mount a file system; its directory is made.
    Mount(MountSpec),
    /// Make a mounted file system read-only or writable.
    Remount {
        /// Where it is mounted.
        target: String,
        /// Which of the two.
        readonly: bool,
    },
    /// Unmount, with one try.
    Unmount {
        /// Where it is mounted.
        target: String,
    },
    /// Mount, let a process map a file and end, unmount; again and again. The reply is [`Unmounts`].
    UnmountOften {
        /// What to mount.
        mount: MountSpec,
        /// The file to map.
        file: String,
        /// How many times.
        rounds: u32,
    },
    /// Make many files of one page each, and use them. The last part of their names is their number.
    ManyFiles {
        /// Where; it is made.
        directory: String,
        /// The pattern of the first; each of the others has one more.
        seed: u64,
        /// How many.
        files: u64,
    },
    /// Read a file from start to end, by `read` alone.
    ReadThrough {
        /// The file.
        path: String,
        /// How many times.
        times: u32,
    },
    /// `rename`.
    Rename {
        /// The old name.
        from: String,
        /// The new name.
        to: String,
    },
    /// `truncate`.
    Truncate {
        /// The file.
        path: String,
        /// Its new size.
        bytes: u64,
    },
    /// `mkdir -p`.
    MakeDirectory {
        /// The directory.
        path: String,
    },
    /// Unmap a held file.
    Release {
        /// The path given to `hold`.
        path: String,
    },
    /// `unlink`.
    Delete {
        /// The file.
        path: String,
    },
    /// `sync`, then drop every clean page the kernel can drop.
    Evict,
    /// The kernel's log. The reply is a list of its messages, oldest first.
    KernelLog,
    /// Read whole files into the page cache.
    Cache {
        /// The files.
        paths: Vec<String>,
        /// In single pages instead of the largest folios that the file system makes.
        singly: bool,
    },
    /// How a cached file lies in memory. The reply is a [`FolioCount`].
    Folios {
        /// The file.
        path: String,
    },
    /// Which pages of a cached file lie in one folio with the page before. The reply is a list of whether.
    Tails {
        /// The file.
        path: String,
    },
    /// Make a disk swap space, and swap to it.
    SwapOn {
        /// The disk.
        device: String,
    },
    /// Start another kernel, with the arguments of this one. It answers only when that failed.
    Kexec(NextKernel),
    /// Fragment free memory: hold as much as `bytes` in pages of which every other one is free. 0 lets go of it.
    Fragment {
        /// Bytes of free single pages.
        bytes: u64,
    },
    /// Replace the herd, processes that map files and sleep.
    Herd {
        /// What each of them maps.
        paths: Vec<String>,
        /// How many; 0 ends them all.
        processes: u64,
        /// VMAs for each file.
        pieces: usize,
    },
    /// Have a process that uses up all idle time.
    Spin {
        /// Whether.
        on: bool,
    },
    /// Have a file open for reading and writing, and do nothing with it.
    OpenForWriting {
        /// The file; without one none is open any more.
        path: Option<String>,
    },
    /// Have a process that maps a file, and whose address space is changed nearly all the time, so that nobody
    /// else can look at it.
    Restless {
        /// The file; without one the process ends.
        path: Option<String>,
        /// Another process has the same address space.
        shared: bool,
    },
    /// Have tasks that share an address space, in which a file is mapped.
    Kin {
        /// What they have in common.
        kind: Kin,
        /// The file; without one they end.
        path: Option<String>,
    },
    /// What all frames hold. The reply is a list of the number of frames and their [`FrameKind`], from frame 0 on.
    Census,
    /// How what [`FrameKind::Mapped`] calls so lies in memory. The reply is a list: how many of these pages are in runs of
    /// one page, of 2 and 3, of 4 to 7 and so on, where a run is of pages of a file that follow each other in memory.
    MappedRuns,
    /// Write to the memory and the doorbell of our device what no driver would. The reply is how many records that were.
    Scribble {
        /// Its directory in sysfs.
        device: String,
        /// Of the random numbers.
        seed: u64,
        /// How often, which ends with a ring each time.
        rounds: u64,
    },
    /// Gives a kernel thread another priority.
    Renice {
        /// Its name.
        name: String,
        /// From -20, before everybody else, to 19.
        nice: i32,
    },
    /// CPU time of a kernel thread at a moment when it sleeps. The reply is a [`ThreadTime`].
    ThreadTime {
        /// Its name.
        name: String,
        /// A file with a number, read at the same moment.
        counter: String,
    },
}

/// What a frame holds.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum FrameKind {
    /// Page cache in the range of a readable mapping that is not writable.
    #[serde(rename = "m")]
    Mapped,
    /// Other page cache of a file on a disk, as it is on the disk.
    #[serde(rename = "c")]
    Clean,
    /// Other page cache.
    #[serde(rename = "d")]
    Cache,
    /// Memory of processes.
    #[serde(rename = "a")]
    Anonymous,
    /// The kernel's own, and what is free.
    #[serde(rename = "o")]
    Other,
}

/// What tasks with one address space have in common.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kin {
    /// They are one process.
    Threads,
    /// So are these, and the first of them has ended.
    WithoutLeader,
    /// The same, and a process that is none of them has it as well.
    TwinsWithoutLeader,
    /// Two processes that have it both.
    Twins,
    /// The same, one of which waits until the other has it no more, as after `vfork`.
    Borrower,
}

/// A file system to mount.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MountSpec {
    /// Its kind.
    pub kind: String,
    /// The device, if it has one.
    pub source: String,
    /// The directory.
    pub target: String,
    /// Options of the file system.
    pub data: String,
}

/// A kernel to start.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct NextKernel {
    /// The disk that holds it.
    pub kernel: String,
    /// Its length.
    pub kernel_bytes: u64,
    /// The disk that holds its initramfs.
    pub initramfs: String,
    /// Its length.
    pub initramfs_bytes: u64,
}

/// How unmounting went.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Unmounts {
    /// Tries that failed with `EBUSY`.
    pub busy: u64,
    /// The longest one took, microseconds.
    pub longest_us: u64,
    /// All together took, microseconds.
    pub total_us: u64,
}

/// What the agent sends.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Message {
    /// The agent runs; sent once.
    Ready {
        /// `uname -r`.
        kernel: String,
        /// Seconds since the guest's kernel started.
        uptime: f64,
    },
    /// A line of output of a streaming [`Op::Run`].
    Output {
        /// The request it belongs to.
        id: u64,
        /// The line, without its end.
        line: String,
        /// It went to standard error.
        stderr: bool,
    },
    /// The answer to a request.
    Reply {
        /// The request.
        id: u64,
        /// The result, when it worked.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ok: Option<serde_json::Value>,
        /// What went wrong, when it did not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
}

/// How a program ended.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct RunOutcome {
    /// Its exit status; `None` when a signal ended it.
    pub status: Option<i32>,
    /// It was killed because it took too long.
    pub timed_out: bool,
    /// Standard output, its last 64 KiB.
    pub stdout: String,
    /// Standard error, its last 64 KiB.
    pub stderr: String,
}

/// How a file lies in memory.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct FolioCount {
    /// Its pages.
    pub pages: u64,
    /// The folios that hold them.
    pub folios: u64,
    /// Runs of pages whose frames are contiguous.
    pub runs: u64,
}

/// What a kernel thread has used.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct ThreadTime {
    /// Nanoseconds on a CPU since it was started.
    pub cpu_ns: u64,
    /// The counter.
    pub count: u64,
}

/// The hashes of one file.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct FileSum {
    /// The file.
    pub path: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 of what `read` returns; absent when the file cannot be read.
    pub by_read: Option<String>,
    /// SHA-256 of what a mapping shows.
    pub by_map: Option<String>,
    /// Why a hash is absent.
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_flat_json() {
        let request = Request {
            id: 7,
            op: Op::Read {
                path: "/sys/x".into(),
            },
        };
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(text, r#"{"id":7,"op":"read","path":"/sys/x"}"#);
        let back: Request = serde_json::from_str(&text).unwrap();
        assert_eq!(back.id, 7);
        assert!(matches!(back.op, Op::Read { path } if path == "/sys/x"));
    }

    #[test]
    fn operations_without_fields_round_trip() {
        let text = serde_json::to_string(&Request {
            id: 1,
            op: Op::Evict,
        })
        .unwrap();
        assert!(matches!(
            serde_json::from_str::<Request>(&text).unwrap().op,
            Op::Evict
        ));
    }

    #[test]
    fn replies_carry_either_a_value_or_an_error() {
        let reply: Message = serde_json::from_str(r#"{"type":"reply","id":3,"ok":[1]}"#).unwrap();
        assert!(matches!(
            reply,
            Message::Reply {
                id: 3,
                ok: Some(_),
                error: None
            }
        ));
    }
}
