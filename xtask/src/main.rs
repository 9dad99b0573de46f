//! Builds, provisions and runs everything around pagefusion that cargo alone cannot.

mod apt;
mod artifacts;
mod cache;
mod counts;
mod debug_kernel;
mod fetch;
mod headers;
mod host_packages;
mod images;
mod kernel;
mod key;
mod library;
mod module;
mod namespace;
mod older_qemu;
mod pins;
mod process;
mod provision;
mod rootfs;
mod runner;
mod sets;
mod space;
mod trouble;
mod ui;
mod watched;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::{
    provision::{Part, Project},
    runner::{BenchArguments, DemoArguments, GuestBenchArguments, TestArguments},
};

/// Builds, provisions and runs everything around pagefusion that cargo alone cannot.
///
/// What is made is kept in $PAGEFUSION_CACHE, else $XDG_CACHE_HOME/pagefusion, else ~/.cache/pagefusion.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
    /// The kernel to build for and to boot: a stock one, or the usual one with detectors of every kind
    #[arg(long, global = true, default_value = kernel::USUAL, value_name = "7.3|7.2|debug")]
    kernel: String,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Show guests sharing memory, and prove it
    Demo(DemoArguments),
    /// Run all tests
    Test(TestArguments),
    /// Measure pagefusion against KSM, and both against what could be shared
    #[command(args_conflicts_with_subcommands = true)]
    Bench {
        #[command(flatten)]
        compare: BenchArguments,
        #[command(subcommand)]
        other: Option<Bench>,
    },
    /// Formatting, lints and licences
    Check,
    /// Build the kernel module and print where it is
    Module {
        /// Run the kernel's clippy instead
        #[arg(long)]
        clippy: bool,
    },
    /// Make everything the tests need and print where it is listed
    Artifacts,
    /// Make one part of it
    Provision { part: Part },
    /// Renew the pins of a set of packages, or of all sets
    Pins { set: Option<String> },
    /// Remove the cache
    Clean {
        /// Only what was not used for so many days
        #[arg(long, value_name = "DAYS")]
        unused_for: Option<u32>,
    },
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// What the module costs a guest, in instructions
    Guest(GuestBenchArguments),
    /// Write the tables of results into a document, and the plots beside it
    Document {
        /// The results
        #[arg(default_value = "docs/benchmarks/results.json")]
        json: PathBuf,
        /// The document
        #[arg(default_value = "docs/benchmarks.md")]
        document: PathBuf,
    },
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
    if let Task::Clean { unused_for } = arguments.task {
        clean(unused_for)?;
        return Ok(ExitCode::SUCCESS);
    }
    let project = Project::new(&arguments.kernel)?;
    match &arguments.task {
        Task::Demo(demo) => return runner::demo(&project, demo),
        Task::Test(test) => return runner::test(&project, test),
        Task::Bench {
            other: Some(Bench::Guest(bench)),
            ..
        } => return runner::bench_guest(&project, bench),
        Task::Bench {
            other: Some(Bench::Document { json, document }),
            ..
        } => return runner::bench_document(&project, json, document),
        Task::Bench {
            compare,
            other: None,
        } => return runner::bench(&project, compare),
        Task::Check => return runner::check(&project),
        Task::Module { clippy: true } => runner::lint_module(&project)?,
        Task::Module { clippy: false } => println!("{}", project.module()?.display()),
        Task::Artifacts => println!("{}", project.everything()?.display()),
        Task::Provision { part } => project.part(*part)?,
        Task::Pins { set } => project.renew_pins(set.as_deref())?,
        Task::Clean { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn clean(unused_for: Option<u32>) -> Result<()> {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    let cache = cache::Cache::open()?;
    let root = cache.root().to_owned();
    let sizes = cache.remove(unused_for.map(|days| DAY * days))?;
    for (name, size) in &sizes {
        println!("{:>10}  {name}", space::human(*size));
    }
    let total = sizes.iter().map(|(_, size)| size).sum();
    println!(
        "{:>10}  removed from {}",
        space::human(total),
        root.display()
    );
    Ok(())
}
