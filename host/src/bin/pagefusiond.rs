// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Serves page stores and devices to the VMMs of this host.

use anyhow::Context;
use clap::Parser;
use pagefusion_host::daemon::{Config, Daemon};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

/// Shares equal pages between the VMs of a trust group.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Directory of sockets and of what the next daemon must know.
    #[arg(long, value_name = "DIR", default_value = "/run/pagefusion")]
    runtime_dir: PathBuf,
    /// Directory of the shared pages, on a tmpfs.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm/pagefusion")]
    store_dir: PathBuf,
    /// Most memory for the shared pages of one trust group: bytes, or with K, M, G or T.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_store: Option<u64>,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "a number, with K, M, G or T if you like")?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".into())
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pagefusiond: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(
    Arguments {
        runtime_dir,
        store_dir,
        max_store,
    }: Arguments,
) -> anyhow::Result<()> {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let (stop, stopper) = UnixStream::pair().context("cannot prepare for signals")?;
    for signal in [SIGTERM, SIGINT] {
        let stopper = stopper.try_clone().context("cannot prepare for signals")?;
        signal_hook::low_level::pipe::register(signal, stopper)
            .context("cannot prepare for signals")?;
    }
    let daemon = Daemon::start(&Config {
        runtime_dir,
        store_dir,
        max_store,
    })?;
    // Without systemd there is nobody to notify.
    let _ = sd_notify::notify(false, &[NotifyState::Ready]);
    log::info!("ready");
    daemon.run(&stop)?;
    log::info!("stopped; VMs keep what they share");
    Ok(())
}
