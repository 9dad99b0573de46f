//! pagefusion against KSM, and both against what could be shared at most.
//!
//! Every run has guests of its own, in a memory cgroup of its own. What is saved is what the cgroup's charge says, CPU
//! time is what the host's kernel says of threads, and what could be shared is found by hashing all guest memory from
//! outside.

mod arguments;
mod churn;
mod conclusions;
mod ksm;
mod leave;
mod machine;
mod oracle;
mod plan;
mod plots;
mod remade;
mod requests;
mod results;
mod sample;
mod systems;
mod text;
mod trial;
mod workloads;

use std::{fs, path::Path};

use anyhow::{Context, Result};

pub use self::{arguments::Compare, results::Results};
use self::{ksm::Ksm, workloads::Disks};
use crate::{artifacts::Artifacts, progress::Progress, world::Host};

/// Makes all runs that are chosen.
pub fn run(
    artifacts: &Artifacts,
    compare: &Compare,
    host: Host,
    logs: Option<&Path>,
) -> Result<Results> {
    let machine = machine::describe(artifacts, host)?;
    let version = Some(machine.pagefusion.clone());
    let mut results = before(compare)?.go_on(machine)?;
    let ksm = Ksm::take()?;
    let disks = Disks::new(compare.apart.clone())?;
    let mut progress = Progress::new();
    let wanted = compare.wanted(host);
    let keep = |results: &Results| keep(compare, results);
    for trial in plan::trials(&wanted) {
        progress.step(format!("{}: {}", trial.workload, trial.title()));
        let mut run = trial::run(trial, host, artifacts, &ksm, &disks, logs)
            .with_context(|| format!("{}: {}", trial.workload, trial.title()))?;
        progress.found(&text::line(&run));
        run.pagefusion.clone_from(&version);
        results.runs.push(run);
        results.conclude();
        keep(&results)?;
    }
    for system in plan::served(&wanted) {
        let title = format!("requests: {}", system.name());
        progress.step(title.clone());
        let mut served =
            trial::with_two_guests(system, host, artifacts, &ksm, &disks, logs, requests::run)
                .context(title)?;
        progress.found(&text::served_line(&served));
        served.pagefusion.clone_from(&version);
        results.served.push(served);
        keep(&results)?;
    }
    for system in plan::churned(&wanted) {
        let title = format!("churn: {}", system.name());
        progress.step(title.clone());
        let mut churned =
            trial::with_two_guests(system, host, artifacts, &ksm, &disks, logs, churn::run)
                .context(title)?;
        progress.found(&text::churned_line(&churned));
        churned.pagefusion.clone_from(&version);
        results.churned.push(churned);
        keep(&results)?;
    }
    Ok(results)
}

/// Takes results of a host that knows no version of its own for what was to be measured, and keeps them as if it had been
/// here.
pub fn adopt(compare: &Compare, text: &str) -> Result<Results> {
    let found: Results = serde_json::from_str(text).context("parse the host's results")?;
    let found = found.made_with(&machine::revision());
    let mut results = before(compare)?.go_on(found.machine.clone())?;
    results.runs.extend(found.runs);
    results.served.extend(found.served);
    results.churned.extend(found.churned);
    results.conclude();
    keep(compare, &results)?;
    Ok(results)
}

fn before(compare: &Compare) -> Result<Results> {
    match &compare.json {
        Some(path) if compare.add && path.exists() => read(path),
        _ => Ok(Results::default()),
    }
}

fn keep(compare: &Compare, results: &Results) -> Result<()> {
    match &compare.json {
        Some(path) => write(path, results),
        None => Ok(()),
    }
}

/// Results that were written before.
pub fn read(path: &Path) -> Result<Results> {
    let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let mut results: Results =
        serde_json::from_slice(&bytes).with_context(|| format!("parse {}", path.display()))?;
    results.conclude();
    Ok(results)
}

fn write(path: &Path, results: &Results) -> Result<()> {
    let text = serde_json::to_string(results)? + "\n";
    // A second interrupt must not leave half of it.
    let partial = path.with_extension("json.new");
    fs::write(&partial, text).with_context(|| format!("write {}", partial.display()))?;
    fs::rename(&partial, path).with_context(|| format!("write {}", path.display()))
}

/// The tables, for a terminal.
pub fn tables(results: &Results) -> String {
    text::tables(results)
}

/// Writes the tables into `document`, between its marks, and the plots into a directory beside it of the same name.
pub fn document(results: &Results, document: &Path) -> Result<()> {
    let before =
        fs::read_to_string(document).with_context(|| format!("read {}", document.display()))?;
    let after = text::insert(&before, results)?;
    fs::write(document, after).with_context(|| format!("write {}", document.display()))?;
    let directory = document.with_extension("");
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    plots::draw(results, &directory)
}
