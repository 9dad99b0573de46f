//! Running other programs: their output goes into a log, and they never outlive us.
//!
//! Every program runs in a process group of its own, so that Ctrl-C reaches only
//! us and we end it in order. `setpriv --pdeathsig` ends it when we are killed.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    pipe::{PipeFlags, pipe_with},
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::{trouble::Trouble, ui::Step};

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on the first Ctrl-C ends things in order and the second ends them at once.
pub(crate) fn catch_interrupts() -> io::Result<()> {
    let flag = INTERRUPTED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(flag))?;
        signal_hook::flag::register(signal, Arc::clone(flag))?;
    }
    Ok(())
}

pub(crate) fn interrupted() -> bool {
    INTERRUPTED
        .get()
        .is_some_and(|flag| flag.load(Ordering::Relaxed))
}

pub(crate) fn stop_if_interrupted() -> Result<(), Trouble> {
    if interrupted() {
        Err(Trouble::Interrupted)
    } else {
        Ok(())
    }
}

/// A command for [`run`], which the kernel ends when this process ends, in whatever way.
pub(crate) fn bound_command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program)
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .process_group(0);
    command
}

/// The cargo that runs this, or the one that is found.
pub(crate) fn cargo_program() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"))
}

/// A command that gets Ctrl-C itself and clears up by itself; it has as long as it takes.
pub(crate) fn bound_in_group(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--"]).arg(program);
    command
}

/// Where the output of a build goes.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file =
            File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }
}

/// Runs `command` to its end; every line of its output is shown by `step` and kept in `log`.
pub(crate) fn run(what: &str, mut command: Command, step: &Step, log: &mut Log) -> Result<()> {
    run_watched(what, &mut command, log, |line| {
        if let Some(line) = line {
            step.line(line);
        }
    })
}

/// Like [`run`]; `watch` sees each line, and `None` about ten times a second.
pub(crate) fn run_watched(
    what: &str,
    command: &mut Command,
    log: &mut Log,
    mut watch: impl FnMut(Option<&str>),
) -> Result<()> {
    stop_if_interrupted()?;
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).context("cannot make a pipe")?;
    let mut child = command
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("cannot start {what}"))?;
    // The parent's copies of the pipe's writing end must go, or its end would never be seen.
    command.stdout(Stdio::null()).stderr(Stdio::null());

    let pumped = pump(reader, log, &mut watch, || {
        // The one error possible, "already over", is what we want.
        let _ = child.kill();
    });
    if pumped.is_err() {
        let _ = child.kill();
    }
    let status = child
        .wait()
        .with_context(|| format!("lost track of {what}"))?;
    let tail = pumped?;
    stop_if_interrupted()?;
    if status.success() {
        return Ok(());
    }
    Err(Trouble::Command {
        what: what.to_owned(),
        status: status.to_string(),
        tail,
        log: log.path.clone(),
    }
    .into())
}

/// Reads until every process of the command has closed its output; returns the last lines.
fn pump(
    reader: OwnedFd,
    log: &mut Log,
    watch: &mut impl FnMut(Option<&str>),
    mut kill: impl FnMut(),
) -> Result<String> {
    const TAIL: usize = 15;
    let mut reader = File::from(reader);
    let mut tail: Vec<String> = Vec::new();
    let mut pending = Vec::new();
    let mut buffer = [0; 8192];
    let tick = Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    loop {
        if interrupted() {
            kill();
        }
        let mut fds = [PollFd::new(&reader, PollFlags::IN)];
        match poll(&mut fds, Some(&tick)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {
                watch(None);
                continue;
            }
            Ok(_) => {}
            Err(error) => return Err(error).context("cannot wait for output"),
        }
        let read = reader.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        log.file.write_all(&buffer[..read])?;
        pending.extend_from_slice(&buffer[..read]);
        while let Some(end) = pending
            .iter()
            .position(|&byte| byte == b'\n' || byte == b'\r')
        {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if line.is_empty() {
                continue;
            }
            watch(Some(&line));
            if tail.len() == TAIL {
                tail.remove(0);
            }
            tail.push(line);
        }
    }
    tail.push(String::from_utf8_lossy(&pending).trim_end().to_owned());
    Ok(tail.join("\n").trim_end().to_owned())
}

/// Runs a short command and returns what it printed.
pub(crate) fn capture(what: &str, command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("cannot start {what}"))?;
    stop_if_interrupted()?;
    if !output.status.success() {
        anyhow::bail!(
            "{what} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("{what} printed something odd"))
}
