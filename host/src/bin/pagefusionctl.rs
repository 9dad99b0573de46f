// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Starts VMs that share memory, shows what they share, and undoes it.

use clap::{Args, Parser, Subcommand};
use pagefusion_host::operator::{Launch, status_text, vms_text};
use pagefusion_host::protocol::{AdminClient, Outcome, Scope};
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Controls pagefusiond. Exit status: 0 done, 1 failed, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Runtime directory of the daemon.
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/run/pagefusion",
        global = true
    )]
    runtime_dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows what is shared and what that saves.
    Status {
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Shows the VMs.
    Vms {
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Turns shared memory back into ordinary memory; sharing stays off until resumed.
    Undo(ScopeArguments),
    /// Shares again.
    Resume(ScopeArguments),
    /// Starts a VM that shares memory with the others of its group.
    Run {
        /// Trust group; without one the VM shares with nobody but itself.
        #[arg(long)]
        group: Option<String>,
        /// Name of the VM.
        #[arg(long)]
        name: Option<String>,
        /// The library libpagefusion_preload.so, unless it is in its usual place.
        #[arg(long, value_name = "PATH")]
        preload: Option<PathBuf>,
        /// Command line of QEMU.
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct ScopeArguments {
    /// Every VM, and those started later.
    #[arg(long)]
    all: bool,
    /// VMs of a trust group, and those started later.
    #[arg(long, value_name = "NAME")]
    group: Option<String>,
    /// One VM, by name or number.
    #[arg(long, value_name = "VM")]
    vm: Option<String>,
}

impl From<ScopeArguments> for Scope {
    fn from(arguments: ScopeArguments) -> Self {
        match arguments {
            ScopeArguments {
                group: Some(group), ..
            } => Scope::Group(group),
            ScopeArguments { vm: Some(vm), .. } => Scope::Vm(vm),
            _ => Scope::All,
        }
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pagefusionctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(
    Arguments {
        runtime_dir,
        command,
    }: Arguments,
) -> anyhow::Result<ExitCode> {
    let connect = || AdminClient::connect(&runtime_dir);
    match command {
        Command::Status { json: true } => print(&json(&connect()?.status()?)?)?,
        Command::Status { json: false } => print(&status_text(&connect()?.status()?))?,
        Command::Vms { json: true } => print(&json(&connect()?.status()?.vms)?)?,
        Command::Vms { json: false } => print(&vms_text(&connect()?.status()?))?,
        Command::Undo(scope) => return Ok(report("undone", connect()?.undo(scope.into())?)),
        Command::Resume(scope) => return Ok(report("resumed", connect()?.resume(scope.into())?)),
        Command::Run {
            group,
            name,
            preload,
            command,
        } => {
            return Err(Launch {
                runtime_dir,
                name,
                group,
                preload,
                command,
            }
            .exec()
            .into());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn json(value: &impl serde::Serialize) -> serde_json::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever read it has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

fn report(what: &str, Outcome { vms, failed }: Outcome) -> ExitCode {
    for (vm, reason) in &failed {
        eprintln!("pagefusionctl: {vm}: {reason}");
    }
    let done = vms - failed.len().min(vms);
    println!("{what} for {done} of {vms} VMs");
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
