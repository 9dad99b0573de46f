//! The demo: boot guests, share their memory, prove it from outside, check that nothing broke.

use std::{path::Path, time::Instant};

use anyhow::{Context, Result, ensure};

use crate::{
    artifacts::Artifacts,
    changes,
    guest::Guest,
    integrity::Integrity,
    progress::Progress,
    proof,
    report::{GuestReport, Report},
    services::{self, Load},
    settle::settle,
    world::{Host, World},
};

/// Runs it with `vms` guests that carry this load. The report is complete even when something was wrong; ask [`verdict`].
pub fn run(
    artifacts: &Artifacts,
    host: Host,
    vms: u32,
    load: Load,
    logs: Option<&Path>,
) -> Result<Report> {
    ensure!(vms >= 2, "sharing takes at least two guests");
    let mut progress = Progress::new();
    progress.step("start the daemon");
    let mut world = World::new(artifacts, host, logs)?;
    world.load = load;

    progress.step(format!("boot {vms} Debian guests and their services"));
    for _ in 0..vms {
        world.start_guest()?;
    }
    let ready = world.wait_booted(0)?;

    if load == Load::Whole {
        progress.step("wait until the guests' kernels have tidied up after the boot");
        if !services::wait_quiet(&mut world.guests)? {
            progress.found("they still do");
        }
    }

    progress.step("load the module and wait until sharing settles");
    let loading = match load {
        Load::Whole => Guest::load_module,
        Load::Light => Guest::load_hurried_module,
    };
    world.guests.iter_mut().try_for_each(loading)?;
    let growth = settle(&mut world, Instant::now())?;

    progress.step("pause the guests, undo all sharing, compare");
    let proof = proof::take(&mut world)?;

    progress.step("wait until sharing is built again");
    let resumed = Instant::now();
    let rebuilt = settle(&mut world, resumed)?;
    let seconds_to_rebuild = rebuilt.time_to(0.95).unwrap_or_default().as_secs_f64();
    let status = world.status()?;
    let mut guests = Vec::new();
    for (guest, ready) in world.guests.iter().zip(ready) {
        let vm = status.vm(guest.name())?;
        guests.push(GuestReport {
            name: vm.name.clone(),
            pages_reported: vm.pages_reported,
            pages_shared: vm.pages_shared,
            pages_remembered: vm.pages_remembered,
            pages_refused: vm.pages_refused,
            pages_broken: vm.pages_broken,
            seconds_to_services: ready,
        });
    }

    progress.step("checksum every mapped file in every guest");
    let mut integrity = Integrity::default();
    let half = proof.pages_shared / 2;
    integrity.check(rebuilt.last() > half, || {
        format!("only {} pages are shared again", rebuilt.last())
    });
    check_guests(&mut world, &mut integrity)?;
    progress.step("rewrite, delete, reread and evict shared files");
    changes::run(&mut world, &mut integrity, 1)?;
    progress.step("checksum everything again");
    check_guests(&mut world, &mut integrity)?;
    world.healthy()?;

    progress.step("take everything down");
    world.close()?;
    drop(progress);
    for error in &integrity.errors {
        eprintln!("wrong: {error}");
    }
    Ok(Report {
        host: host.name().to_owned(),
        kernel: artifacts.kernel_release.clone(),
        qemu: artifacts.qemu_version()?,
        vms: vms.into(),
        pages_reported: guests.iter().map(|guest| guest.pages_reported).sum(),
        pages_shared: proof.pages_shared,
        store_pages: proof.store_pages,
        bytes_saved: proof.bytes_saved(),
        bytes_metadata_kept: -proof.net_unshared,
        charge_shared: proof.shared.charge,
        charge_unshared: proof.unshared.charge,
        frames_shared: proof.shared.frames,
        frames_unshared: proof.unshared.frames,
        seconds_to_95_percent: growth
            .time_to(0.95)
            .context("nothing was shared")?
            .as_secs_f64(),
        seconds_to_rebuild,
        integrity_checks: integrity.checks,
        integrity_errors: integrity.errors.len() as u64,
        guests,
    })
}

/// Fails unless memory was saved, as much as claimed, and nothing was wrong.
pub fn verdict(report: &Report) -> Result<()> {
    judge(report, proof::Proof::check)
}

/// The same for the nested host; see [`proof::Proof::check_nested`].
pub fn nested_verdict(report: &Report) -> Result<()> {
    judge(report, proof::Proof::check_nested)
}

fn judge(report: &Report, check: fn(&proof::Proof) -> Result<()>) -> Result<()> {
    let proof = proof::Proof {
        shared: proof::Reading {
            charge: report.charge_shared,
            frames: report.frames_shared,
        },
        unshared: proof::Reading {
            charge: report.charge_unshared,
            frames: report.frames_unshared,
        },
        net_shared: report.bytes_saved - report.bytes_metadata_kept,
        net_unshared: -report.bytes_metadata_kept,
        pages_shared: report.pages_shared,
        store_pages: report.store_pages,
    };
    check(&proof)?;
    ensure!(report.integrity_checks > 0, "nothing was checked");
    let (wrong, checks) = (report.integrity_errors, report.integrity_checks);
    ensure!(wrong == 0, "{wrong} of {checks} integrity checks failed");
    Ok(())
}

fn check_guests(world: &mut World, integrity: &mut Integrity) -> Result<()> {
    for guest in &mut world.guests {
        integrity.mapped_files(guest, &world.manifest)?;
        integrity.services(guest, world.load)?;
    }
    Ok(())
}
