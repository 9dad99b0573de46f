//! One line after the other, in one guest.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};

use super::{
    image::{self, Content, FILE_PAGES},
    plan::{Load, Plan},
};
use crate::{
    artifacts::Artifacts,
    guest::{Accelerator, Guest, Mode, SYSFS},
    progress::Progress,
    protocol::{FolioCount, MountSpec, Op, ThreadTime},
    report::grouped,
    workdir,
    world::{Host, World},
};

/// Where the guest mounts the disk.
const DISK: &str = "/tmp/disk";
/// The worker's name.
const THREAD: &str = "pagefusion";
/// Passes over which an unchanged one is averaged.
const PASSES: u64 = 5;
/// How often that is tried: the host may want to see pages again.
const MOST_WINDOWS: u32 = 20;
/// For what takes the guest long: its clock counts instructions, which are few in a second.
const LONG: Duration = Duration::from_secs(1800);

/// What was measured under one load. Times are the worker's CPU time, in instructions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    /// The load.
    pub(super) load: Load,
    /// Pages the module tracks, the kernel's own among them.
    pub(super) tracked: u64,
    /// Pages of the bench's files among them.
    pub(super) pages: u64,
    /// Address spaces of a pass.
    pub(super) mms: u64,
    /// VMAs of a pass.
    pub(super) vmas: u64,
    /// How the first file lies in memory.
    pub(super) folios: FolioCount,
    /// The first pass, which reports everything, with all that the host's answers cost.
    pub(super) first: u64,
    /// A pass in which nothing has changed.
    pub(super) unchanged: u64,
    /// Longest hold of an mmap lock.
    pub(super) hold: u64,
    /// Memory of the tracker.
    pub(super) tracker_bytes: u64,
}

/// Boots a guest and measures all of `plan`.
pub(super) fn run(
    artifacts: &Artifacts,
    plan: &Plan,
    logs: Option<&Path>,
) -> Result<Vec<Measured>> {
    let mut progress = Progress::new();
    progress.step("make a disk of files");
    let directory = workdir::create()?;
    let image = directory.path().join("files.ext4");
    image::make(directory.path(), &image, plan.files(), Content::Numbered)?;

    progress.step("boot a guest that counts its instructions");
    let host = Host {
        accelerator: Accelerator::Counted,
        nested: false,
    };
    let mut world = World::new(artifacts, host, logs)?;
    // The files, as much again in holes, and in what lies between them, and a thousand processes.
    let memory = plan.files() * FILE_PAGES / 256 * 5 / 2 + 1024;
    world.start(Mode::Agent, u32::try_from(memory)?, vec![image])?;
    let limit = world.limits.boot;
    let guest = world.guests.first_mut().context("no guest")?;
    guest.wait_agent(limit)?;
    guest.request::<()>(Op::Mount(MountSpec {
        source: "/dev/vda".into(),
        kind: "ext4".into(),
        target: DISK.into(),
        data: String::new(),
    }))?;
    // Memory in fragments would have the kernel evict what the bench has just cached.
    guest.request::<()>(Op::Write {
        path: "/proc/sys/vm/watermark_boost_factor".into(),
        data: "0".into(),
    })?;

    let mut measured = Vec::new();
    let mut before = None;
    for load in &plan.loads {
        if before != Some(load.singly) {
            cache(guest, plan.files(), load.singly, &mut progress)?;
            before = Some(load.singly);
        }
        let folios = cached(guest, plan.files(), load.singly, &mut progress)?;
        progress.step(format!(
            "{} MiB in {} processes, {} VMAs for each file",
            load.mib, load.processes, load.pieces
        ));
        let found = measure(guest, load, folios).with_context(|| format!("{load:?}"))?;
        progress.found(&format!(
            "{} instructions, {} for the first pass",
            grouped(found.unchanged),
            grouped(found.first)
        ));
        measured.push(found);
    }
    progress.step("take everything down");
    world.close()?;
    Ok(measured)
}

fn path(number: u64) -> String {
    format!("{DISK}/{}", image::file_name(number))
}

/// Makes sure that all files are in the page cache as they should be, and returns how the first one lies in memory.
fn cached(
    guest: &mut Guest,
    files: u64,
    singly: bool,
    progress: &mut Progress,
) -> Result<FolioCount> {
    // The guest's kernel may have evicted some meanwhile, and reads them as it likes when they are looked at.
    for _ in 0..3 {
        let mut right = true;
        let mut first = FolioCount::default();
        for number in (0..files).rev() {
            let path = path(number);
            first = guest.request_for(Op::Folios { path }, LONG, |_| {})?;
            right &= if singly {
                first.folios == first.pages
            } else {
                first.pages >= 8 * first.folios
            };
        }
        if right {
            return Ok(first);
        }
        cache(guest, files, singly, progress)?;
    }
    bail!("the guest's page cache does not become what was asked for")
}

/// Brings all files into the page cache.
fn cache(guest: &mut Guest, files: u64, singly: bool, progress: &mut Progress) -> Result<()> {
    progress.step(if singly {
        "read the files into single pages"
    } else {
        "read the files into large folios"
    });
    guest.request::<()>(Op::Evict)?;
    if singly {
        let bytes = (files * FILE_PAGES + files * FILE_PAGES / 16) * 4096;
        guest.request_for::<()>(Op::Fragment { bytes }, LONG, |_| {})?;
    }
    let paths = (0..files).map(path).collect();
    guest.request_for::<()>(Op::Cache { paths, singly }, LONG, |_| {})?;
    guest.request_for(Op::Fragment { bytes: 0 }, LONG, |_| {})
}

fn measure(guest: &mut Guest, load: &Load, folios: FolioCount) -> Result<Measured> {
    guest.request_for::<()>(
        Op::Herd {
            paths: (0..load.files()).map(path).collect(),
            processes: load.processes,
            pieces: load.pieces,
        },
        LONG,
        |_| {},
    )?;
    // While the guest waits for its host, its clock must not jump to the end of every time limit.
    guest.request::<()>(Op::Spin { on: true })?;
    guest.load_module()?;
    guest.set("pages_to_scan", "4294967296")?;
    guest.set("max_sleep_millisecs", "1000")?;
    let after_first = time_after(guest, 1)?;
    guest.request::<()>(Op::Spin { on: false })?;

    let unchanged = unchanged(guest)?;
    let measured = Measured {
        load: *load,
        tracked: guest.counter("pages_tracked")?,
        pages: load.files() * FILE_PAGES,
        mms: guest.counter("mms_visited")?,
        vmas: guest.counter("vmas_visited")?,
        folios,
        first: after_first
            .cpu_ns
            .saturating_sub((after_first.count - 1) * unchanged),
        unchanged,
        hold: guest.counter("max_mmap_lock_nsecs")?,
        tracker_bytes: guest.counter("tracker_bytes")?,
    };
    ensure!(
        measured.tracked >= measured.pages && measured.mms > load.processes,
        "not everything was found: {measured:?}"
    );
    guest.unload_module()?;
    guest.request_for::<()>(
        Op::Herd {
            paths: Vec::new(),
            processes: 0,
            pieces: 1,
        },
        LONG,
        |_| {},
    )?;
    Ok(measured)
}

/// CPU time of a pass, once some have gone by in which the host had no more questions.
fn unchanged(guest: &mut Guest) -> Result<u64> {
    let mut from = time_after(guest, 1)?;
    for _ in 0..MOST_WINDOWS {
        let reported = guest.counter("pages_reported")?;
        let to = time_after(guest, from.count + PASSES)?;
        if guest.counter("pages_reported")? == reported {
            return Ok((to.cpu_ns - from.cpu_ns) / (to.count - from.count));
        }
        from = to;
    }
    bail!("every pass reports something")
}

/// The worker's CPU time once it sleeps after so many passes.
fn time_after(guest: &mut Guest, passes: u64) -> Result<ThreadTime> {
    let counter = format!("{SYSFS}/full_scans");
    let op = Op::WaitCounter {
        path: counter.clone(),
        at_least: passes,
        timeout_ms: LONG.as_millis() as u64,
    };
    guest.request_for::<u64>(op, LONG, |_| {})?;
    guest.request(Op::ThreadTime {
        name: THREAD.into(),
        counter,
    })
}
