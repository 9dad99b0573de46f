//! What the agent asks of its kernel.

use std::{
    ffi::CString,
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::protocol::ThreadTime;

/// How often a counter is read. sysfs has no event for a statistic.
const COUNTER_INTERVAL: Duration = Duration::from_millis(20);

/// `uname -r`.
pub(super) fn release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// Seconds since the kernel started.
pub(super) fn uptime() -> Result<f64> {
    let text = fs::read_to_string("/proc/uptime").context("read /proc/uptime")?;
    text.split(' ')
        .next()
        .and_then(|seconds| seconds.parse().ok())
        .context("parse /proc/uptime")
}

/// `finit_module`.
pub(super) fn load_module(path: &str, params: &str) -> Result<()> {
    let file = File::open(path).with_context(|| format!("open {path}"))?;
    let params = CString::new(params)?;
    rustix::system::finit_module(&file, &params, 0).with_context(|| format!("load {path}"))
}

/// `delete_module`, which waits for nothing: a module in use is an error.
pub(super) fn unload_module(name: &str) -> Result<()> {
    let c_name = CString::new(name)?;
    let nonblock = libc::O_NONBLOCK;
    rustix::system::delete_module(&c_name, nonblock).with_context(|| format!("unload {name}"))
}

/// Waits until the number in `path` has reached `at_least`.
pub(super) fn wait_counter(path: &str, at_least: u64, timeout_ms: u64) -> Result<u64> {
    let deadline = Instant::now() + Duration::from_millis(timeout_ms);
    loop {
        let value = number(path)?;
        if value >= at_least {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{path} is {value} and did not reach {at_least} within {timeout_ms} ms");
        }
        thread::sleep(COUNTER_INTERVAL);
    }
}

/// What a kernel thread has used when it sleeps, and what `counter` says then.
pub(super) fn thread_time(name: &str, counter: &str) -> Result<ThreadTime> {
    let directory = thread_directory(name)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        let count = number(counter)?;
        let stat = fs::read_to_string(directory.join("stat")).context("read its state")?;
        let schedstat = fs::read_to_string(directory.join("schedstat")).context("read its time")?;
        // The name, in brackets, may hold anything.
        let asleep = stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with(['S', 'I']));
        if asleep && number(counter)? == count {
            let cpu_ns = schedstat
                .split(' ')
                .next()
                .and_then(|text| text.parse().ok());
            return Ok(ThreadTime {
                cpu_ns: cpu_ns.with_context(|| format!("schedstat holds {schedstat:?}"))?,
                count,
            });
        }
        thread::sleep(COUNTER_INTERVAL);
    }
    bail!("{name} never sleeps")
}

/// Gives a kernel thread another priority.
pub(super) fn renice(name: &str, nice: i32) -> Result<()> {
    let directory = thread_directory(name)?;
    let number = directory.file_name().and_then(|name| name.to_str());
    let number = number.and_then(|number| number.parse().ok());
    let process = number
        .and_then(rustix::process::Pid::from_raw)
        .with_context(|| format!("{} is no process", directory.display()))?;
    rustix::process::setpriority_process(Some(process), nice)
        .with_context(|| format!("renice {name}"))
}

fn thread_directory(name: &str) -> Result<PathBuf> {
    for entry in fs::read_dir("/proc").context("list /proc")? {
        let path = entry?.path();
        if fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name) {
            return Ok(path);
        }
    }
    bail!("there is no thread {name}")
}

fn number(path: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{path} holds {text:?}"))
}

/// Writes everything back and drops what is clean.
pub(super) fn evict() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop caches")
}

/// What the kernel has said, oldest first.
pub(super) fn log() -> Result<Vec<String>> {
    let mut device = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .context("open /dev/kmsg")?;
    let mut messages = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        match device.read(&mut buffer) {
            // One message a read: numbers, a semicolon, the text, then lines about devices.
            Ok(length) => {
                let record = String::from_utf8_lossy(&buffer[..length]);
                let text = record.split_once(';').map_or("", |(_, text)| text);
                messages.push(text.lines().next().unwrap_or_default().to_owned());
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(messages),
            // It was overwritten before it could be read.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) => return Err(error).context("read /dev/kmsg"),
        }
    }
}
