//! Runs one program, with a time limit.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::serve::{Line, send};
use crate::protocol::{Message, RunOutcome};

/// How much output of a program is kept.
const KEPT: usize = 64 << 10;

/// Runs `argv`. With `relay` its output goes out line by line under that request id and is not kept.
pub(super) fn run(
    argv: &[String],
    timeout_ms: u64,
    relay: Option<(Line, u64)>,
) -> Result<RunOutcome> {
    let (program, arguments) = argv.split_first().context("no program given")?;
    let mut child = Command::new(program)
        .args(arguments)
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let stdout = collect(child.stdout.take(), relay.clone(), false);
    let stderr = collect(child.stderr.take(), relay, true);

    let pid = Pid::from_child(&child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open")?;
    let deadline = Instant::now() + Duration::from_millis(timeout_ms);
    let timed_out = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)) {
            Ok(0) => break true,
            Ok(_) => break false,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for the program"),
        }
    };
    if timed_out {
        child.kill().context("kill the program")?;
    }
    let status = child.wait().context("reap the program")?;
    let text = |reader: thread::JoinHandle<String>| reader.join().unwrap_or_default();
    Ok(RunOutcome {
        status: status.code(),
        timed_out,
        stdout: text(stdout),
        stderr: text(stderr),
    })
}

/// Reads one stream to its end in a thread of its own.
fn collect(
    stream: Option<impl Read + Send + 'static>,
    relay: Option<(Line, u64)>,
    stderr: bool,
) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let Some(stream) = stream else {
            return String::new();
        };
        let mut kept = VecDeque::new();
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(read) if read > 0) {
            if let Some((port, id)) = &relay {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                // A harness that has gone away needs no output; the program runs on.
                let _ = send(
                    port,
                    &Message::Output {
                        id: *id,
                        line,
                        stderr,
                    },
                );
            } else {
                kept.extend(line.iter().copied());
                let excess = kept.len().saturating_sub(KEPT);
                kept.drain(..excess);
            }
            line.clear();
        }
        String::from_utf8_lossy(kept.make_contiguous()).into_owned()
    })
}
