//! The agent in a guest: serves the harness on a serial port (`/dev/ttyS1` unless another is named).

use std::{env, fs::OpenOptions, process::ExitCode};

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pf-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let path = env::args().nth(1).unwrap_or_else(|| "/dev/ttyS1".to_owned());
    let port = OpenOptions::new().read(true).write(true).open(&path).with_context(|| format!("open {path}"))?;
    let mut settings = tcgetattr(&port).with_context(|| format!("{path} is no terminal"))?;
    settings.make_raw();
    tcsetattr(&port, OptionalActions::Flush, &settings).context("make the port raw")?;
    qemu_tests::agent::serve(port)
}
