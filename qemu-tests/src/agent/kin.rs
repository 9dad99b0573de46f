//! Tasks that share an address space, as threads and otherwise.
#![expect(unsafe_code, reason = "fork, clone, and what a forked child may call")]

use std::{
    ffi::{c_int, c_void},
    fs::{self, File},
    os::fd::AsRawFd,
    ptr, thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::Pid;

use super::herd::{Herd, end_with_parent, say_so_and_sleep};
use crate::protocol::Kin;

/// Threads of a process that has many.
const MANY: usize = 40;
/// Each of the others calls nothing deep.
const STACK: usize = 64 << 10;
/// What threads of a process have in common.
const THREAD: c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;
/// What processes with one address space have in common.
const TWIN: c_int = libc::CLONE_VM | libc::SIGCHLD;
/// How long a thread may take to end.
const LIMIT: Duration = Duration::from_secs(60);

/// Starts a process that maps and touches a file, and those that share its address space, and waits until all are there.
pub(super) fn start(kind: Kin, path: &str) -> Result<Herd> {
    let file = File::open(path).with_context(|| format!("open {path}"))?;
    let length = usize::try_from(file.metadata()?.len())?;
    let (flags, others) = match kind {
        Kin::Threads => (THREAD, MANY),
        Kin::WithoutLeader | Kin::TwinsWithoutLeader => (THREAD, 1),
        Kin::Twins => (TWIN, 1),
        Kin::Borrower => (libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD, 1),
    };
    let (reader, writer) = rustix::pipe::pipe().context("make a pipe")?;
    // SAFETY: the child calls nothing but `first`, which keeps to async-signal-safe functions.
    let pid = unsafe { libc::fork() };
    ensure!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    let Some(child) = Pid::from_raw(pid) else {
        first(kind, flags, others, &file, length, writer.as_raw_fd())
    };
    let herd = Herd::of(child);
    drop(writer);
    let (mut ready, mut buffer) = (0, [0; 256]);
    while ready < others {
        let read = rustix::io::read(&reader, &mut buffer).context("wait for the others")?;
        ensure!(read > 0, "a task that shares an address space has ended");
        ready += read;
    }
    if is_without_leader(kind) {
        has_no_leader(pid)?;
    }
    Ok(herd)
}

/// What the forked process does, without allocating or taking a lock.
fn first(kind: Kin, flags: c_int, others: usize, file: &File, length: usize, ready: i32) -> ! {
    end_with_parent();
    let populated = libc::MAP_PRIVATE | libc::MAP_POPULATE;
    map(length, libc::PROT_READ, populated, file.as_raw_fd());
    let next = if kind == Kin::TwinsWithoutLeader {
        with_twin
    } else {
        other
    };
    for _ in 0..others {
        clone(next, flags, ready);
    }
    if is_without_leader(kind) {
        // SAFETY: ends this thread and leaves the other alone.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    sleep()
}

/// Maps memory, or ends the process.
fn map(length: usize, protection: c_int, flags: c_int, file: c_int) -> *mut c_void {
    // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
    let mapped = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, file, 0) };
    if mapped == libc::MAP_FAILED {
        // SAFETY: a plain system call.
        unsafe { libc::_exit(1) };
    }
    mapped
}

/// Starts another task in this address space, or ends the process.
fn clone(task: extern "C" fn(*mut c_void) -> c_int, flags: c_int, ready: i32) {
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let stack = map(STACK, both, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    // SAFETY: the end of the mapping just made, which a stack grows down from.
    let top = unsafe { stack.byte_add(STACK) };
    let argument = ptr::without_provenance_mut::<c_void>(ready as usize);
    // SAFETY: the new task has a stack of its own, which is never unmapped. It uses this one's thread-local memory
    // for nothing but the error of a system call, which nobody looks at.
    if unsafe { libc::clone(task, top, flags, argument) } < 0 {
        // SAFETY: a plain system call.
        unsafe { libc::_exit(1) };
    }
}

fn sleep() -> ! {
    loop {
        // SAFETY: sleeps until a signal ends this process.
        unsafe { libc::pause() };
    }
}

/// A thread with a child: it would end with its first thread, were it a child of that one.
extern "C" fn with_twin(ready: *mut c_void) -> c_int {
    clone(other, TWIN, ready.addr() as c_int);
    sleep()
}

extern "C" fn other(ready: *mut c_void) -> c_int {
    end_with_parent();
    say_so_and_sleep(ready.addr() as c_int, 1)
}

const fn is_without_leader(kind: Kin) -> bool {
    matches!(kind, Kin::WithoutLeader | Kin::TwinsWithoutLeader)
}

/// Waits until the first thread of a process has ended.
fn has_no_leader(pid: libc::pid_t) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("read its state")?;
        // The name, in brackets, may hold anything.
        if stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('Z'))
        {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the first thread does not end");
        thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_share_an_address_space_are_there() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), [7; 8192]).unwrap();
        let path = file.path().to_str().unwrap();
        let kinds = [
            (Kin::Threads, MANY + 1),
            (Kin::WithoutLeader, 2),
            (Kin::TwinsWithoutLeader, 2),
            (Kin::Twins, 1),
            (Kin::Borrower, 1),
        ];
        for (kind, threads) in kinds {
            let herd = start(kind, path).unwrap();
            let pid = herd.members()[0].as_raw_nonzero();
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
            let tasks: Vec<_> = tasks.map(|task| task.unwrap().path()).collect();
            assert_eq!(tasks.len(), threads, "{kind:?}");
            let has_child = tasks.iter().any(|task| {
                let children = fs::read_to_string(task.join("children"));
                !children.unwrap_or_default().trim().is_empty()
            });
            assert_eq!(
                has_child,
                !matches!(kind, Kin::Threads | Kin::WithoutLeader),
                "{kind:?}"
            );
        }
    }
}
