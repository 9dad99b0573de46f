//! Builds, provisions and runs everything around pagefusion that cargo alone cannot.

mod apt;
mod artifacts;
mod cache;
mod fetch;
mod host_packages;
mod images;
mod kernel;
mod key;
mod namespace;
mod pins;
mod process;
mod rootfs;
mod sets;
mod space;
mod trouble;
mod ui;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};

use crate::{artifacts::Artifacts, cache::Cache};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Make one part of what the tests need (without a name: all of it)
    Provision { part: Option<Part> },
    /// Make everything the tests need and print where it is listed
    Artifacts,
    /// Renew the pins of one set of packages, or of all
    Pins { set: Option<String> },
    /// Remove the cache
    Clean,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Host,
    Kernel,
    GuestImage,
    LabImage,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            if process::interrupted() {
                ExitCode::from(130)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    process::catch_interrupts().context("cannot catch signals")?;
    let cache = Cache::open()?;
    match &arguments.task {
        Task::Provision { part } => {
            let qemu = host_packages::provision(&cache)?;
            let kernel = kernel::find("7.3")?;
            let mut a = Artifacts { qemu: Some(qemu), cache: Some(cache.root().to_owned()), ..Artifacts::default() };
            let un = kernel.provision(&cache)?;
            a.kernel = Some(un.image.clone());
            a.lab_kernel = Some(un.image.clone());
            a.modules_dir = Some(un.modules.clone());
            a.kernel_release = Some(un.release.clone());
            if part.is_none_or(|p| p == Part::GuestImage) {
                let g = images::guest(&cache)?;
                a.guest_image = Some(g.image);
                a.guest_manifest = Some(g.manifest);
            }
            if part.is_none_or(|p| p == Part::LabImage) {
                a.lab_image = Some(images::lab(&cache, &un)?);
            }
            let dir = PathBuf::from("target/pagefusion");
            println!("{}", a.write(&dir)?.display());
        }
        Task::Artifacts => {}
        Task::Pins { set } => {
            for s in sets::ALL {
                if set.as_ref().is_some_and(|n| n != s.name) { continue; }
                let new = s.resolve(&cache)?;
                std::fs::write(format!("xtask/pins/{}.pins", s.name), pins::render(s.name, &new))?;
            }
        }
        Task::Clean => {}
    }
    Ok(ExitCode::SUCCESS)
}
