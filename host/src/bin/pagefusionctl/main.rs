// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Starts VMs that share memory, shows what they share, and undoes it.

mod arguments;

use anyhow::Context;
use arguments::{Arguments, Command, Format, selection};
use clap::{CommandFactory, Parser};
use pagefusion_host::operator::{
    self, Facts, Launch, LaunchError, Verdict, explain, explanation_text, files_text,
    findings_text, groups_text, status_text, vms_text,
};
use pagefusion_host::protocol::{AdminClient, AdminError, Outcome, Scope};
use signal_hook::consts::{SIGHUP, SIGTERM};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Exit status when the daemon cannot be reached.
const NO_DAEMON: u8 = 3;

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pagefusionctl: {error:#}");
            if is_unreachable(&error) {
                ExitCode::from(NO_DAEMON)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn is_unreachable(error: &anyhow::Error) -> bool {
    let from_daemon = error.downcast_ref::<AdminError>().or_else(|| {
        match error.downcast_ref::<LaunchError>()? {
            LaunchError::Daemon(error) => Some(error),
            _ => None,
        }
    });
    matches!(
        from_daemon,
        Some(AdminError::NotRunning(_) | AdminError::NotAllowed(_) | AdminError::Connection(_))
    )
}

fn run(
    Arguments {
        runtime_dir,
        command,
    }: Arguments,
) -> anyhow::Result<ExitCode> {
    let connect = || AdminClient::connect(&runtime_dir);
    match command {
        Command::Status(format) => {
            let status = connect()?.status()?;
            show(format, &status, || status_text(&status))?;
        }
        Command::Vms(format) => {
            let status = connect()?.status()?;
            show(format, &status.vms, || vms_text(&status))?;
        }
        Command::Groups(format) => {
            let status = connect()?.status()?;
            show(format, &status.groups, || groups_text(&status))?;
        }
        Command::Files {
            group,
            limit,
            format,
        } => {
            let scope = group.map_or(Scope::All, Scope::Group);
            let files = connect()?.files(scope, limit)?;
            show(format, &files, || files_text(&files))?;
        }
        Command::Explain { vm, format } => {
            let status = connect()?.status()?;
            let found = operator::find(&status, &vm).with_context(|| {
                let is_group = status.vms.iter().any(|it| it.group.as_ref() == Some(&vm));
                let group = if is_group {
                    format!("{vm} is a group; ")
                } else {
                    String::new()
                };
                format!("no VM {vm} is running; {group}pagefusionctl vms shows them")
            })?;
            let explanation = explain(&status, found);
            show(format, &explanation, || explanation_text(&explanation))?;
        }
        Command::Undo {
            scope,
            file,
            gfn,
            format,
        } => {
            let outcome = connect()?.undo(scope.into(), selection(file, gfn))?;
            return report("undone", format, &outcome);
        }
        Command::Pause { scope, format } => {
            return report("paused", format, &connect()?.pause(scope.into())?);
        }
        Command::Resume {
            scope,
            file,
            format,
        } => {
            return report("resumed", format, &connect()?.resume(scope.into(), file)?);
        }
        Command::Set {
            scope,
            each_vm,
            limits,
            format,
        } => {
            let (limits, policy) = limits.into();
            let outcome = connect()?.set(scope.into(), each_vm, limits, policy)?;
            return report("set", format, &outcome);
        }
        Command::Doctor {
            store_dir,
            qemu,
            preload,
            format,
        } => {
            let facts = Facts::gather(&runtime_dir, &store_dir, &qemu, preload.as_deref());
            let findings = operator::judge(&facts);
            show(format, &findings, || findings_text(&findings))?;
            if findings.iter().any(|it| it.verdict == Verdict::Bad) {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Top { interval } => top(&runtime_dir, Duration::from_secs(interval))?,
        Command::Run {
            group,
            name,
            user,
            preload,
            command,
        } => {
            return Err(Launch {
                runtime_dir,
                name,
                group,
                user,
                preload,
                command,
            }
            .exec()
            .into());
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            let mut command = Arguments::command();
            clap_complete::generate(shell, &mut command, "pagefusionctl", &mut script);
            print(&script)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn top(runtime_dir: &Path, interval: Duration) -> anyhow::Result<()> {
    // While there is still a command line to say it on.
    AdminClient::connect(runtime_dir)?;
    let (stop, stopper) = UnixStream::pair().context("cannot prepare for signals")?;
    for signal in [SIGTERM, SIGHUP] {
        let stopper = stopper.try_clone().context("cannot prepare for signals")?;
        signal_hook::low_level::pipe::register(signal, stopper)
            .context("cannot prepare for signals")?;
    }
    operator::top(runtime_dir, interval, &stop).context("cannot use the terminal")
}

fn show(
    format: Format,
    value: &impl serde::Serialize,
    text: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    let text = if format.json {
        serde_json::to_string_pretty(value)? + "\n"
    } else {
        text()
    };
    print(text.as_bytes())
}

fn print(text: &[u8]) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text) {
        // Whoever read it has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

fn report(what: &str, format: Format, outcome: &Outcome) -> anyhow::Result<ExitCode> {
    let Outcome { vms, failed } = outcome;
    for (vm, reason) in failed {
        eprintln!("pagefusionctl: {vm}: {reason}");
    }
    let done = vms - failed.len().min(*vms);
    show(format, outcome, || {
        format!("{what} for {done} of {vms} VMs\n")
    })?;
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
