//! One thread of another process stands still, while the others run.
#![expect(unsafe_code, reason = "ptrace has no safe wrapper")]

use std::{fs, io, ptr};

use anyhow::{Context, Result, ensure};

/// A thread that goes on when this is dropped. Only the thread that made it stand still can let it go.
#[derive(Debug)]
pub struct Standstill(libc::pid_t);

impl Standstill {
    /// Stops the thread of a process that has this name.
    pub fn of(process: u32, name: &str) -> Result<Self> {
        let thread = find(process, name)?;
        trace(libc::PTRACE_SEIZE, thread).with_context(|| format!("trace {name}"))?;
        let this = Self(thread);
        trace(libc::PTRACE_INTERRUPT, thread).with_context(|| format!("stop {name}"))?;
        ensure!(libc::WIFSTOPPED(wait(thread)?), "{name} has ended");
        Ok(this)
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        if trace(libc::PTRACE_DETACH, self.0).is_err() {
            // It was killed; its process is not gone before somebody has taken note.
            let _ = wait(self.0);
        }
    }
}

fn find(process: u32, name: &str) -> Result<libc::pid_t> {
    let directory = format!("/proc/{process}/task");
    for thread in fs::read_dir(&directory).with_context(|| format!("list {directory}"))? {
        let thread = thread?;
        // It may have ended meanwhile.
        let is_it = fs::read_to_string(thread.path().join("comm"))
            .is_ok_and(|comm| comm.trim_end() == name);
        if is_it {
            let id = thread.file_name().to_string_lossy().parse();
            return id.context("number of a thread");
        }
    }
    anyhow::bail!("process {process} has no thread {name}")
}

fn trace(request: libc::c_uint, thread: libc::pid_t) -> io::Result<()> {
    let nothing = ptr::null_mut::<libc::c_void>();
    // SAFETY: none of our requests reads or writes memory.
    let result = unsafe { libc::ptrace(request, thread, nothing, nothing) };
    (result == 0)
        .then_some(())
        .ok_or_else(io::Error::last_os_error)
}

/// Waits until it stops or ends; returns which.
fn wait(thread: libc::pid_t) -> io::Result<libc::c_int> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call.
        let waited = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) };
        if waited == thread {
            return Ok(status);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        process::{Child, Command, Stdio},
    };

    use super::*;

    fn state(child: &Child) -> String {
        let id = child.id();
        let text = fs::read_to_string(format!("/proc/{id}/task/{id}/stat")).unwrap();
        text.split(' ').nth(2).unwrap().to_owned()
    }

    #[test]
    fn a_thread_stands_still_until_it_is_let_go() {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // `spawn` returns before the thread has its new name, `cat` answers after that.
        let mut echo = [0];
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        let output = child.stdout.as_mut().unwrap();
        output.read_exact(&mut echo).unwrap();
        let standstill = Standstill::of(child.id(), "cat").unwrap();
        assert_eq!(state(&child), "t");
        drop(standstill);
        assert_ne!(state(&child), "t");

        let standstill = Standstill::of(child.id(), "cat").unwrap();
        child.kill().unwrap();
        drop(standstill);
        let _ = child.wait();
        assert!(Standstill::of(std::process::id(), "no such thread").is_err());
    }
}
