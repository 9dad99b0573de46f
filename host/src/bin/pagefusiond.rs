// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Serves page stores and devices to the VMMs of this host.

use anyhow::Context;
use clap::Parser;
use pagefusion_host::daemon::{Config, Daemon, PressureThresholds};
use pagefusion_host::operator::{LogFormat, parse_memory, start_logging};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

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
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    max_store: Option<u64>,
    /// Also give metrics out on this TCP address, to whoever can connect: 127.0.0.1:9753, say.
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
    /// Policy `pressure`: share from when on somebody waits for memory this part of the time; more
    /// than 100 is never.
    #[arg(long, value_name = "PERCENT", value_parser = parse_waiting, default_value_t = PressureThresholds::default().waiting)]
    pressure_waiting: f64,
    /// Policy `pressure`: share from when on only this part of the host's memory is available.
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent, default_value_t = PressureThresholds::default().available)]
    pressure_available: f64,
    /// Look so often for overlays that save nothing, because the guest has written them or nobody
    /// else has their pages any more, and make ordinary memory of them; 0 never does.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    tidy_interval: u64,
    /// By how much the daemon gives way to everything else, VMs above all; KSM's thread does by 5.
    #[arg(long, value_name = "NICE", default_value_t = 5, value_parser = clap::value_parser!(i32).range(0..=19))]
    nice: i32,
    /// How the log is written.
    #[arg(long, value_enum, default_value_t)]
    log_format: LogFormat,
}

/// Lets it have as many open files as it may: some for each VM.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let all = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(e) = setrlimit(Resource::Nofile, all) {
        log::warn!("the daemon keeps its limit of open files: {e}");
    }
}

fn parse_waiting(text: &str) -> Result<f64, String> {
    let percent = text.parse::<f64>().ok();
    let percent = percent.filter(|percent| percent.is_finite() && *percent >= 0.0);
    percent.ok_or_else(|| "a number from 0 on".into())
}

fn parse_percent(text: &str) -> Result<f64, String> {
    let percent = text.parse().ok();
    let percent = percent.filter(|percent| (0.0..=100.0).contains(percent));
    percent.ok_or_else(|| "a number from 0 to 100".into())
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
        metrics,
        pressure_waiting,
        pressure_available,
        tidy_interval,
        nice,
        log_format,
    }: Arguments,
) -> anyhow::Result<()> {
    start_logging(log_format);
    // Before there are threads, which have what the first one has.
    if let Err(e) = rustix::process::nice(nice) {
        log::warn!("the daemon keeps its priority: {e}");
    }
    raise_file_limit();
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
        metrics,
        pressure: PressureThresholds {
            waiting: pressure_waiting,
            available: pressure_available,
        },
        tidy: Some(Duration::from_secs(tidy_interval)).filter(|it| !it.is_zero()),
    })?;
    // Without systemd there is nobody to notify.
    let _ = sd_notify::notify(false, &[NotifyState::Ready]);
    log::info!("ready");
    daemon.run(&stop)?;
    log::info!("stopped; VMs keep what they share");
    Ok(())
}
