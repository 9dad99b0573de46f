//! What the agent asks of its kernel.

use std::{
    ffi::CString,
    fs::{self, File},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

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
        let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
        let value: u64 = text
            .trim()
            .parse()
            .with_context(|| format!("{path} holds {text:?}"))?;
        if value >= at_least {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{path} is {value} and did not reach {at_least} within {timeout_ms} ms");
        }
        thread::sleep(COUNTER_INTERVAL);
    }
}

/// Writes everything back and drops what is clean.
pub(super) fn evict() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop caches")
}
