//! Ctrl-C and SIGTERM: everything that waits gives up, and what was started is taken down in order.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result, bail};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
};

static INTERRUPTED: std::sync::OnceLock<Arc<AtomicBool>> = std::sync::OnceLock::new();

/// Catches the signals from now on; a second one ends the program at once.
pub fn install() -> Result<()> {
    let interrupted = INTERRUPTED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        flag::register_conditional_shutdown(signal, 130, Arc::clone(interrupted))
            .context("catch a signal")?;
        flag::register(signal, Arc::clone(interrupted)).context("catch a signal")?;
    }
    Ok(())
}

/// Fails once a signal has come.
pub fn check() -> Result<()> {
    if INTERRUPTED
        .get()
        .is_some_and(|interrupted| interrupted.load(Ordering::Relaxed))
    {
        bail!("interrupted");
    }
    Ok(())
}
