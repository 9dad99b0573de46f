//! Many processes that map files and sleep: what a pass of the module has to walk through.
#![expect(unsafe_code, reason = "fork, mmap and what a forked child may call")]

use std::{fs::File, os::fd::AsRawFd, ptr};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// Children of ours, ended and reaped when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Herd {
    members: Vec<Pid>,
}

impl Herd {
    /// A child that was started elsewhere.
    pub(super) fn of(child: Pid) -> Self {
        Self {
            members: vec![child],
        }
    }

    #[cfg(test)]
    pub(super) fn members(&self) -> &[Pid] {
        &self.members
    }

    /// Starts `processes` processes, each of which maps every file read-only in `pieces` VMAs, and waits until all
    /// of them have done so. None of them touches what it maps.
    pub(super) fn start(paths: &[String], processes: u64, pieces: usize) -> Result<Self> {
        let mut files = Vec::new();
        for path in paths {
            let file = File::open(path).with_context(|| format!("open {path}"))?;
            let length = usize::try_from(file.metadata()?.len())?;
            files.push((file, length.div_ceil(4096)));
        }
        let (reader, writer) = rustix::pipe::pipe().context("make a pipe")?;
        let mut herd = Self::default();
        for _ in 0..processes {
            // SAFETY: the child calls nothing but `member`, which keeps to async-signal-safe functions.
            let pid = unsafe { libc::fork() };
            ensure!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
            match Pid::from_raw(pid) {
                Some(child) => herd.members.push(child),
                None => member(&files, pieces.max(1), writer.as_raw_fd()),
            }
        }
        drop(writer);
        let (mut ready, mut buffer) = (0, [0; 256]);
        while ready < herd.members.len() {
            let read = rustix::io::read(&reader, &mut buffer).context("wait for the herd")?;
            let started = buffer[..read].iter().all(|byte| *byte == 1);
            ensure!(
                read > 0 && started,
                "a process of the herd could not map its files"
            );
            ready += read;
        }
        Ok(herd)
    }

    /// Starts one process that uses whatever time nobody else wants, so that the machine is never idle.
    pub(super) fn spinner() -> Result<Self> {
        // SAFETY: the child only sets its policy and loops.
        let pid = unsafe { libc::fork() };
        ensure!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
        let Some(child) = Pid::from_raw(pid) else {
            let lowest = libc::sched_param { sched_priority: 0 };
            end_with_parent();
            // SAFETY: a plain system call on this process.
            unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const lowest) };
            loop {
                std::hint::spin_loop();
            }
        };
        Ok(Self {
            members: vec![child],
        })
    }

    /// Starts one process that maps a file and has its own mmap lock for writing nearly all the time, with another one in
    /// the same address space if that is to be `shared`, and waits until the file is mapped.
    pub(super) fn restless(path: &str, shared: bool) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("open {path}"))?;
        let length = usize::try_from(file.metadata()?.len())?;
        let (reader, writer) = rustix::pipe::pipe().context("make a pipe")?;
        // SAFETY: the child calls nothing but `restless`, which keeps to async-signal-safe functions.
        let pid = unsafe { libc::fork() };
        ensure!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
        let Some(child) = Pid::from_raw(pid) else {
            restless(&file, length, shared, writer.as_raw_fd())
        };
        drop(writer);
        let herd = Self {
            members: vec![child],
        };
        let mut ready = [0];
        let read = rustix::io::read(&reader, &mut ready).context("wait for the process")?;
        ensure!(read == 1, "the process could not map {path}");
        Ok(herd)
    }
}

impl Drop for Herd {
    fn drop(&mut self) {
        for member in &self.members {
            // It may have ended by itself.
            let _ = kill_process(*member, Signal::KILL);
        }
        for member in &self.members {
            let _ = waitpid(Some(*member), WaitOptions::empty());
        }
    }
}

/// What a forked process does, without allocating or taking a lock: map, say so, sleep.
fn member(files: &[(File, usize)], pieces: usize, ready: i32) -> ! {
    let mut well = 1_u8;
    end_with_parent();
    for (file, pages) in files {
        let piece = pages.div_ceil(pieces).max(1);
        // The kernel maps downwards: with ascending offsets no two pieces become one VMA.
        for first in (0..*pages).step_by(piece) {
            let count = piece.min(pages - first);
            // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
            let mapped = unsafe {
                libc::mmap(
                    ptr::null_mut(),
                    count * 4096,
                    libc::PROT_READ,
                    libc::MAP_PRIVATE,
                    file.as_raw_fd(),
                    (first * 4096) as libc::off_t,
                )
            };
            if mapped == libc::MAP_FAILED {
                well = 0;
            }
        }
    }
    say_so_and_sleep(ready, well)
}

/// Writes a byte to whoever waits, and sleeps for ever.
pub(super) fn say_so_and_sleep(ready: i32, word: u8) -> ! {
    // SAFETY: one byte from this stack.
    unsafe { libc::write(ready, (&raw const word).cast(), 1) };
    loop {
        // SAFETY: sleeps until a signal ends this process.
        unsafe { libc::pause() };
    }
}

/// Nothing of the herd outlives the agent.
pub(super) fn end_with_parent() {
    // SAFETY: a plain system call on this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Does nothing, in the address space of its parent.
extern "C" fn sharer(_: *mut libc::c_void) -> libc::c_int {
    end_with_parent();
    loop {
        // SAFETY: sleeps until a signal ends this process.
        unsafe { libc::pause() };
    }
}

/// Maps and touches a file of `length` bytes, says so, and changes the protection of other memory for ever.
fn restless(file: &File, length: usize, shared: bool, ready: i32) -> ! {
    /// Of memory whose protection changes, which takes milliseconds.
    const BYTES: usize = 32 << 20;
    /// Of the process that shares all this.
    const STACK: usize = 1 << 16;
    let map = |length, protection, flags, file| {
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let mapped = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, file, 0) };
        if mapped == libc::MAP_FAILED {
            // SAFETY: a plain system call.
            unsafe { libc::_exit(1) };
        }
        mapped
    };
    let populated = libc::MAP_PRIVATE | libc::MAP_POPULATE;
    let both = libc::PROT_READ | libc::PROT_WRITE;
    end_with_parent();
    map(length, libc::PROT_READ, populated, file.as_raw_fd());
    let own = map(BYTES, both, populated | libc::MAP_ANONYMOUS, -1);
    if shared {
        let stack = map(STACK, both, populated | libc::MAP_ANONYMOUS, -1);
        let end = stack.wrapping_byte_add(STACK);
        // SAFETY: `sharer` has a stack of its own, whose end this is, and uses no other memory.
        let pid = unsafe { libc::clone(sharer, end, libc::CLONE_VM, ptr::null_mut()) };
        if pid < 0 {
            // SAFETY: a plain system call.
            unsafe { libc::_exit(1) };
        }
    }
    // SAFETY: one byte that lives as long as the program.
    unsafe { libc::write(ready, c"!".as_ptr().cast(), 1) };
    loop {
        for protection in [libc::PROT_READ, both] {
            // SAFETY: memory that nobody uses.
            unsafe { libc::mprotect(own, BYTES, protection) };
        }
    }
}
