//! Parts come and go while guests run.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    Stage,
    shared_files::{DISK, SharedFiles, with_disk},
    steps::{
        answered, hold, nothing_is_abandoned, release, spec, unit, unmount, wait_until,
        with_reports_in_flight, write,
    },
};
use crate::{
    guest::Guest,
    protocol::{Op, Unmounts},
    services,
    settle::settle,
};

/// How long a guest's passes and the answers to them may take on a busy host.
const PASS_LIMIT: Duration = Duration::from_secs(120);
/// A host that is busy elsewhere has undone all sharing of a guest by then.
const UNDO_LIMIT: Duration = Duration::from_secs(60);
/// How often the module is unloaded at another moment of its pass.
const UNLOADS: u32 = 8;

pub(super) fn unload_and_reload(stage: &mut Stage) -> Result<()> {
    // Unloading undoes all sharing, that of frames which the guest has freed since with it, so
    // only what two reloads bring can be compared.
    let before = reload(stage)?;
    let after = reload(stage)?;
    ensure!(
        after >= before * 9 / 10,
        "{after} pages are shared after the second reload, {before} were after the first"
    );
    Ok(())
}

/// Returns how many pages of the guest are shared then.
fn reload(stage: &mut Stage) -> Result<u64> {
    let before = stage.shared_by(0)?;
    stage.world.guests[0].unload_module()?;
    // The module waits for the host's answer for half a second only, however much there is to undo.
    let deadline = Instant::now() + UNDO_LIMIT;
    loop {
        let left = stage.shared_by(0)?;
        if left == 0 {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "{left} of {before} pages are shared without a module"
        );
        crate::interrupt::check()?;
        std::thread::sleep(Duration::from_millis(50));
    }
    stage.files_are_right()?;
    let left = stage.shared_by(0)?;
    ensure!(left == 0, "{left} pages are shared again without a module");
    stage.world.guests[0].load_hurried_module()?;
    settle(&mut stage.world, Instant::now())?;
    let after = stage.shared_by(0)?;
    ensure!(
        after >= before / 2,
        "{after} pages are shared after the reload, {before} were before"
    );
    stage.files_are_right()?;
    Ok(after)
}

pub(super) fn unload_at_any_moment_of_a_pass(stage: &mut Stage) -> Result<()> {
    for round in 0..UNLOADS {
        let guest = &mut stage.world.guests[0];
        guest
            .unload_module()
            .with_context(|| format!("round {round}"))?;
        guest.load_hurried_module()?;
        // Each round unloads later in the first pass, when most is reported.
        let reported = u64::from(round) * 400;
        if reported > 0 {
            let path = format!("{}/pages_reported", crate::guest::SYSFS);
            guest.request::<u64>(Op::WaitCounter {
                path,
                at_least: reported,
                timeout_ms: 60_000,
            })?;
        }
    }
    settle(&mut stage.world, Instant::now())?;
    ensure!(
        stage.shared_by(0)? > 0,
        "nothing is shared after all the unloading"
    );
    stage.files_are_right()
}

/// An engine that does not answer keeps neither the module nor what it has reported.
pub(super) fn unload_with_reports_in_flight(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let standstill = with_reports_in_flight(world, &mut files)?;
        let guest = &mut world.guests[0];
        guest.unload_module().context("with reports in flight")?;
        // Nor does it keep one that has only just come.
        guest.load_hurried_module()?;
        guest
            .unload_module()
            .context("before the host has answered")?;
        nothing_is_abandoned(guest)?;
        files.are_right(world)?;
        drop(standstill);
        files.are_right(world)?;
        world.guests[0].load_hurried_module()?;
        files.are_shared(world)?;
        files.add(world)?;
        files.are_right(world)
    })
}

/// Whatever each load would leave open is left as often as the module is loaded. In a guest without services nobody else
/// opens files.
pub(super) fn nothing_is_open_after_unloading(stage: &mut Stage) -> Result<()> {
    const LOADS: u64 = 12;
    /// The kernel frees what was open a little later.
    const SLACK: u64 = LOADS / 2;
    const TMPFS: &str = "/fs/tmpfs";
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let guest = &mut world.guests[0];
        guest.unload_module()?;
        let disk = spec("ext4", "/dev/vda", DISK, "ro");
        unit(guest, Op::Mount(disk.clone()))?;
        unit(guest, Op::Mount(spec("tmpfs", "tmpfs", TMPFS, "")))?;
        let (library, own) = (format!("{DISK}/library"), format!("{TMPFS}/own"));
        write(guest, &own, seed, 0, 1 << 20)?;
        for path in [&library, &own] {
            hold(guest, path)?;
        }
        let before = open_files(guest)?;
        for round in 0..LOADS {
            guest.load_hurried_module()?;
            // All kinds of walks.
            if round % 2 == 1 {
                guest.set("scope", "clean")?;
            }
            guest.wait_passes(2, PASS_LIMIT)?;
            let seen = guest.counter("pages_seen")?;
            ensure!(seen >= 256, "only {seen} pages were looked at");
            guest.unload_module()?;
        }
        wait_until("files that were open are closed", || {
            Ok(open_files(guest)? <= before + SLACK)
        })
        .with_context(|| format!("{before} files were open before {LOADS} loads"))?;
        for path in [&library, &own] {
            release(guest, path)?;
        }
        for target in [DISK, TMPFS] {
            unmount(guest, target)?;
        }
        // Looks, too, whether the disk is nobody's afterwards.
        let op = Op::UnmountOften {
            mount: disk,
            file: library,
            rounds: 1,
        };
        let unmounts: Unmounts = guest.request(op)?;
        ensure!(
            unmounts.busy == 0,
            "the file system is in use: {unmounts:?}"
        );
        guest.load_hurried_module()
    })
}

/// What the kernel itself counts: mappings of each page, open files, and pages that cannot be dropped because somebody
/// has a reference to them.
pub(super) fn nothing_is_held_after_unloading(stage: &mut Stage) -> Result<()> {
    const PAGES: u64 = 256;
    /// How often each of the frames given, one after the other, is mapped.
    const MAPPINGS: &str = "import sys
with open('/proc/kpagecount', 'rb', 0) as file:
    for frame in sys.argv[1].split():
        file.seek(int(frame) * 8)
        print(int.from_bytes(file.read(8), 'little'))";
    /// Pages of a file that are in memory.
    const CACHED: &str = "import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
file = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(file).st_size
address = libc.mmap(None, ctypes.c_size_t(size), 1, 1, file, ctypes.c_long(0))
pages = (ctypes.c_ubyte * (size // 4096))()
assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
print(sum(page & 1 for page in pages))";
    /// Services open and close files all the time.
    const OTHERS_FILES: u64 = 64;

    let seed = stage.seed();
    let guest = &mut stage.world.guests[0];
    let path = "/var/tmp/pf-held";
    guest.unload_module()?;
    write(guest, path, seed, 0, PAGES * 4096)?;
    hold(guest, path)?;
    let frames: Vec<u64> = guest.request(Op::HeldFrames { path: path.into() })?;
    let frames: Vec<String> = frames.iter().map(u64::to_string).collect();
    let frames = frames.join(" ");
    let mappings = guest.output(&["python3", "-c", MAPPINGS, &frames])?;
    let files = open_files(guest)?;

    guest.load_hurried_module()?;
    guest.wait_passes(3, PASS_LIMIT)?;
    let reported = guest.counter("pages_reported")?;
    ensure!(reported >= PAGES, "only {reported} pages were reported");
    guest.unload_module()?;

    let after = guest.output(&["python3", "-c", MAPPINGS, &frames])?;
    ensure!(
        after == mappings,
        "pages are mapped {after:?} times after the module, and were {mappings:?} times before"
    );
    let deadline = Instant::now() + UNDO_LIMIT;
    while open_files(guest)? > files + OTHERS_FILES {
        ensure!(
            Instant::now() < deadline,
            "{} files are open after the module, and {files} were before",
            open_files(guest)?
        );
        crate::interrupt::check()?;
        std::thread::sleep(Duration::from_millis(100));
    }
    let cached = guest.output(&["python3", "-c", CACHED, path])?;
    ensure!(
        cached.trim() == PAGES.to_string(),
        "{cached} pages of the file were in memory, not {PAGES}"
    );
    release(guest, path)?;
    guest.request::<Value>(Op::Evict)?;
    let cached = guest.output(&["python3", "-c", CACHED, path])?;
    ensure!(
        cached.trim() == "0",
        "somebody holds {cached} pages of a file that nobody uses"
    );
    guest.request::<Value>(Op::Delete { path: path.into() })?;
    guest.load_hurried_module()?;
    settle(&mut stage.world, Instant::now())?;
    stage.files_are_right()
}

fn open_files(guest: &mut Guest) -> Result<u64> {
    let text: String = guest.request(Op::Read {
        path: "/proc/sys/fs/file-nr".into(),
    })?;
    let open = text.split_whitespace().next();
    open.and_then(|open| open.parse().ok())
        .with_context(|| format!("file-nr holds {text:?}"))
}

pub(super) fn daemon_killed_and_restarted(stage: &mut Stage) -> Result<()> {
    let before = stage.world.status()?.pages_shared;
    stage.world.daemon.take().context("no daemon")?.kill()?;
    // The guests run on their overlays.
    stage.files_are_right()?;
    let world = &mut stage.world;
    world.daemon = Some(world.site.start(&world.cgroup)?);
    settle(world, Instant::now())?;
    let after = world.status()?.pages_shared;
    ensure!(
        after >= before * 9 / 10,
        "{after} pages are shared under the new daemon, {before} under the old"
    );
    // Sharing goes on: new files are shared, and right.
    super::sharing::a_write_is_seen_by_its_guest_alone(stage)?;
    stage.files_are_right()
}

pub(super) fn a_third_guest_shares_at_once(stage: &mut Stage) -> Result<()> {
    let world = &mut stage.world;
    let from = world.guests.len();
    world.start_guest()?;
    world.wait_booted(from)?;
    // For minutes after its boot a kernel joins pages of files into huge pages, and reads whatever of these is not
    // there: what the first two come to share by that is not the third one's doing.
    services::stop_joining_pages(&mut world.guests)?;
    let shares = third_shares_at_once(stage);
    services::join_pages_again(&mut stage.world.guests)?;
    shares?;
    stage.files_are_right()
}

/// The last guest has not loaded the module yet.
fn third_shares_at_once(stage: &mut Stage) -> Result<()> {
    let world = &mut stage.world;
    let third = world.guests.pop().context("no guest")?;
    settle(world, Instant::now()).context("without the third guest")?;
    let store = world.status()?.store_pages;
    let from = world.guests.len();
    world.guests.push(third);
    let guest = &mut world.guests[from];
    guest.load_hurried_module()?;
    guest.wait_passes(2, PASS_LIMIT)?;
    answered(guest)?;
    let at_once = stage.shared_by(from)?;
    settle(&mut stage.world, Instant::now())?;
    let (third, first) = (stage.shared_by(from)?, stage.shared_by(0)?);
    ensure!(
        third >= first / 2,
        "the third guest shares {third} pages, the first {first}"
    );
    ensure!(
        at_once >= third * 9 / 10,
        "the third guest shares {at_once} pages after two passes, and {third} in the end"
    );
    let grown = stage.world.status()?.store_pages;
    println!(
        "{at_once} pages shared at once, {third} in the end; the store went from {store} to {grown}"
    );
    ensure!(
        grown <= store + store / 4,
        "the store grew from {store} to {grown} pages for a third guest of the same image"
    );
    Ok(())
}

pub(super) fn a_guest_killed_while_sharing(stage: &mut Stage) -> Result<()> {
    let mut victim = stage.world.guests.remove(0);
    let name = victim.name().to_owned();
    victim.kill()?;
    drop(victim);
    stage.files_are_right()?;
    let deadline = Instant::now() + UNDO_LIMIT;
    loop {
        crate::interrupt::check()?;
        // The daemon learns of the death by an event; how long it takes to tell has none.
        let status = stage.world.site.status()?;
        if status.vm(&name).map_or(0, |vm| vm.pages_shared) == 0 {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "the daemon still counts pages of the dead {name}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    for guest in &mut stage.world.guests {
        // New programs start from shared files, and old memory is reused.
        guest
            .output(&[
                "python3",
                "-c",
                "import json, sqlite3, email; bytearray(200 << 20)",
            ])
            .or_else(|error| {
                // A build of Python without SQLite is as good.
                if error.to_string().contains("sqlite3") {
                    Ok(String::new())
                } else {
                    Err(error)
                }
            })?;
    }
    stage.files_are_right()
}
