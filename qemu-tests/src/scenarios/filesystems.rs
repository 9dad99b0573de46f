//! Every file system shares, and what happens to a file in one guest stays there.
//!
//! The guests are small ones of their own, with nothing but the agent and a disk for each kind of file system.

use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{
    Stage,
    knobs::seen_by_host,
    steps::{
        all_same, answered, each, hold, release, same, spec, unit, unmount, wait_until, write,
    },
};
use crate::{
    guest::Guest,
    initramfs,
    integrity::Integrity,
    pattern::Expected,
    protocol::{MountSpec, Op, Unmounts},
    settle::settle,
    world::{Small, World},
};

/// Kinds of file systems on disks, in the order of the disks, and whether they can be written.
const DISKS: [(&str, bool); 5] = [
    ("ext4", true),
    ("xfs", true),
    ("btrfs", true),
    ("erofs", false),
    ("squashfs", false),
];
/// The files that each of them has.
const FILES: [&str; 3] = ["library", "program", "shell"];
/// Size of a file of our own; the last page of it has a tail.
const BYTES: u64 = (1 << 20) + 777;
const PAGE: u64 = 4096;
/// How long passes may take.
const LIMIT: Duration = Duration::from_secs(120);
const SHM: &str = "memory";

/// What is in the files, as SHA-256.
pub(super) type Sums = BTreeMap<String, String>;

pub(super) fn disk_file_systems_share(stage: &mut Stage) -> Result<()> {
    with_two(stage, |world, sums, seed| {
        for (kind, writable) in DISKS {
            on_disk(world, sums, seed, kind, writable).context(kind)?;
        }
        Ok(())
    })
}

fn on_disk(world: &mut World, sums: &Sums, seed: u64, kind: &str, writable: bool) -> Result<()> {
    let mut integrity = Integrity::default();
    let disk = disk(kind)?;
    let path = |name: &str| format!("{}/{name}", disk.target);
    let mut part = None;
    each(world, |guest| {
        unit(guest, Op::Mount(disk.clone()))?;
        hold(guest, &path("library"))?;
        hold(guest, &path("program"))?;
        hold_part(guest, &path("shell"), &path("part"), writable, &mut part)
    })?;
    for name in ["library", "program", "part"] {
        all_same(world, &path(name))?;
    }
    contents(world, &mut integrity, sums, &disk.target)?;
    if writable {
        changes(world, &mut integrity, seed, &disk.target)?;
        let (first, _) = world.pair()?;
        for readonly in [true, false] {
            let target = disk.target.clone();
            unit(first, Op::Remount { target, readonly })?;
        }
        contents(world, &mut integrity, sums, &disk.target)?;
    }

    let (first, _) = world.pair()?;
    for name in ["library", "program", "part"] {
        release(first, &path(name))?;
    }
    unmount(first, &disk.target).context("with the module at work")?;
    unit(first, Op::Mount(disk.clone()))?;
    hold(first, &path("library"))?;
    all_same(world, &path("library"))?;
    contents(world, &mut integrity, sums, &disk.target)?;

    let (first, second) = world.pair()?;
    release(first, &path("library"))?;
    for name in ["library", "program", "part"] {
        release(second, &path(name))?;
    }
    each(world, |guest| unmount(guest, &disk.target))?;
    integrity.verdict()
}

/// Holds a part of a file, the same in each guest, whose first and last page lie in the middle of `large` folios.
fn hold_part(
    guest: &mut Guest,
    path: &str,
    name: &str,
    large: bool,
    part: &mut Option<Range<usize>>,
) -> Result<()> {
    // To look at them maps all of the file, which is no business of a pass.
    guest.set("run", "0")?;
    unit(
        guest,
        Op::Cache {
            paths: vec![path.into()],
            singly: false,
        },
    )?;
    let tails: Vec<bool> = guest.request(Op::Tails { path: path.into() })?;
    let part = part.get_or_insert_with(|| part_of_folios(&tails).unwrap_or(7..48));
    ensure!(
        !large || tails[part.start] && tails[part.end],
        "pages {part:?} are not parts of large folios, where these pages are: {:?}",
        (0..tails.len())
            .filter(|page| tails[*page])
            .collect::<Vec<_>>()
    );
    let (path, name) = (path.into(), name.into());
    unit(
        guest,
        Op::HoldPart {
            path,
            name,
            offset: part.start as u64 * PAGE,
            bytes: part.len() as u64 * PAGE,
        },
    )?;
    guest.set("run", "1")
}

/// Some pages, before and behind which their folios go on. The kernel takes single pages at first, and more together as the
/// reader goes on.
fn part_of_folios(tails: &[bool]) -> Option<Range<usize>> {
    const LEAST: usize = 40;
    let tail_from = |page| (page..tails.len()).find(|page| tails[*page]);
    let start = tail_from(0)?;
    Some(start..tail_from(start + LEAST)?)
}

/// Files of our own that are rewritten, truncated and replaced in the first guest.
fn changes(world: &mut World, integrity: &mut Integrity, seed: u64, directory: &str) -> Result<()> {
    let names = ["rewritten", "truncated", "replaced"];
    let path = |name: &str| format!("{directory}/{name}");
    let before: Vec<_> = (0..3)
        .map(|index| Expected::new(seed + index, BYTES).sha256())
        .collect();
    each(world, |guest| {
        for (index, name) in names.iter().enumerate() {
            write(guest, &path(name), seed + index as u64, 0, BYTES)?;
            hold(guest, &path(name))?;
        }
        Ok(())
    })?;
    for name in names {
        all_same(world, &path(name))?;
    }

    let (first, second) = world.pair()?;
    let mut rewritten = Expected::new(seed, BYTES);
    rewritten.rewrite(seed + 10, 3 * PAGE + 100, 2 * PAGE);
    let rewritten = rewritten.sha256();
    write(
        first,
        &path("rewritten"),
        seed + 10,
        3 * PAGE + 100,
        2 * PAGE,
    )?;
    integrity.file(first, &path("rewritten"), &rewritten)?;
    integrity.held(first, &path("rewritten"), &rewritten)?;

    let rest = 5 * PAGE + 17;
    release(first, &path("truncated"))?;
    unit(
        first,
        Op::Truncate {
            path: path("truncated"),
            bytes: rest,
        },
    )?;
    integrity.file(
        first,
        &path("truncated"),
        &Expected::new(seed + 1, rest).sha256(),
    )?;

    let fresh = Expected::new(seed + 12, BYTES).sha256();
    write(first, &path("fresh"), seed + 12, 0, BYTES)?;
    let (from, to) = (path("fresh"), path("replaced"));
    unit(first, Op::Rename { from, to })?;
    integrity.file(first, &path("replaced"), &fresh)?;
    integrity.held(first, &path("replaced"), &before[2])?;

    // The module has seen all of it by now, and has told the host.
    first.wait_passes(3, Duration::from_secs(60))?;
    integrity.file(first, &path("rewritten"), &rewritten)?;
    integrity.file(first, &path("replaced"), &fresh)?;
    for (name, before) in names.iter().zip(&before) {
        integrity.file(second, &path(name), before)?;
        integrity.held(second, &path(name), before)?;
    }
    release(first, &path("rewritten"))?;
    release(first, &path("replaced"))?;
    for name in names {
        release(second, &path(name))?;
    }
    Ok(())
}

pub(super) fn stacked_and_memory_file_systems_share(stage: &mut Stage) -> Result<()> {
    with_two(stage, |world, sums, seed| {
        let mut integrity = Integrity::default();
        let lower = disk("ext4")?;
        let tmpfs = spec("tmpfs", "tmpfs", "/fs/tmpfs", "");
        each(world, |guest| {
            unit(guest, Op::Mount(lower.clone()))?;
            unit(guest, Op::Mount(tmpfs.clone()))
        })?;
        overlays(world, &mut integrity, sums, seed, &lower, &tmpfs).context("overlayfs")?;
        in_memory(world, &mut integrity, seed + 100, &tmpfs).context("tmpfs and memfds")?;
        integrity.verdict()
    })
}

/// Two overlays with one lower directory, as two containers of one image have.
fn overlays(
    world: &mut World,
    integrity: &mut Integrity,
    sums: &Sums,
    seed: u64,
    lower: &MountSpec,
    tmpfs: &MountSpec,
) -> Result<()> {
    let containers = ["/fs/container1", "/fs/container2"];
    let path = |container: &str| format!("{container}/library");
    each(world, |guest| {
        for (index, container) in containers.iter().enumerate() {
            let upper = format!("{}/upper{index}", tmpfs.target);
            let work = format!("{}/work{index}", tmpfs.target);
            for path in [&upper, &work] {
                unit(guest, Op::MakeDirectory { path: path.clone() })?;
            }
            let data = format!("lowerdir={},upperdir={upper},workdir={work}", lower.target);
            unit(
                guest,
                Op::Mount(spec("overlay", "overlay", container, &data)),
            )?;
            hold(guest, &path(container))?;
        }
        let [one, other] = containers.map(path);
        let one: Vec<u64> = guest.request(Op::HeldFrames { path: one })?;
        let other: Vec<u64> = guest.request(Op::HeldFrames { path: other })?;
        ensure!(one == other, "two containers do not share a page cache");
        Ok(())
    })?;
    all_same(world, &path(containers[0]))?;

    let (first, second) = world.pair()?;
    write(first, &path(containers[0]), seed, 100, 3 * PAGE)?;
    first.wait_passes(3, Duration::from_secs(60))?;
    let untouched = sum(sums, "library")?;
    integrity.file(first, &path(containers[1]), untouched)?;
    integrity.held(first, &path(containers[1]), untouched)?;
    for container in containers {
        integrity.file(second, &path(container), untouched)?;
        integrity.held(second, &path(container), untouched)?;
    }
    each(world, |guest| {
        for container in containers {
            release(guest, &path(container))?;
            unmount(guest, container)?;
        }
        Ok(())
    })
}

/// A file on tmpfs that nobody has open for writing, a sealed memfd, and one that is not sealed.
fn in_memory(
    world: &mut World,
    integrity: &mut Integrity,
    seed: u64,
    tmpfs: &MountSpec,
) -> Result<()> {
    let file = format!("{}/file", tmpfs.target);
    let open = "open memory";
    let hold_memory = |name: &str, seed, sealed| Op::HoldMemory {
        name: name.into(),
        seed,
        bytes: BYTES,
        sealed,
    };
    each(world, |guest| {
        write(guest, &file, seed, 0, BYTES)?;
        hold(guest, &file)?;
        unit(guest, hold_memory(SHM, seed + 1, true))?;
        unit(guest, hold_memory(open, seed + 2, false))
    })?;
    all_same(world, &file)?;
    all_same(world, SHM)?;
    let (same, _) = same(world, open)?;
    ensure!(same == 0, "{same} pages of an unsealed memfd are shared");

    let (first, second) = world.pair()?;
    let before = Expected::new(seed, BYTES).sha256();
    let mut after = Expected::new(seed, BYTES);
    after.rewrite(seed + 10, 2 * PAGE + 5, PAGE);
    write(first, &file, seed + 10, 2 * PAGE + 5, PAGE)?;
    first.wait_passes(3, Duration::from_secs(60))?;
    integrity.file(first, &file, &after.sha256())?;
    integrity.held(first, &file, &after.sha256())?;
    integrity.file(second, &file, &before)?;
    integrity.held(second, &file, &before)?;
    let sealed = Expected::new(seed + 1, BYTES).sha256();
    each(world, |guest| integrity.held(guest, SHM, &sealed))?;
    each(world, |guest| {
        for name in [&file, SHM, open] {
            release(guest, name)?;
        }
        Ok(())
    })
}

pub(super) fn unmounting_is_never_busy(stage: &mut Stage) -> Result<()> {
    const ROUNDS: [(&str, u32); 2] = [("readonly", 20), ("clean", 10)];
    with_two(stage, |world, _, seed| {
        let (first, _) = world.pair()?;
        // As many passes as possible, each of which finds the file system.
        first.set("sleep_millisecs", "10")?;
        first.set("max_sleep_millisecs", "10")?;
        for (scope, rounds) in ROUNDS {
            first.set("scope", scope)?;
            for (kind, _) in DISKS {
                let mount = disk(kind)?;
                let file = format!("{}/library", mount.target);
                let op = Op::UnmountOften {
                    mount,
                    file,
                    rounds,
                };
                let result: Unmounts = first
                    .request_for(op, Duration::from_secs(600), |_| {})
                    .context(kind)?;
                let (all, longest) = (result.total_us / 1000, result.longest_us / 1000);
                println!(
                    "{scope}: {kind}: {rounds} times unmounted in {all} ms, the longest took {longest} ms"
                );
                ensure!(
                    result.busy == 0,
                    "{scope}: {kind}: {} tries to unmount found it busy: {result:?}",
                    result.busy
                );
            }
        }
        unmounted_during_a_walk_of_inodes(world, seed)
    })
}

/// It does not wait for the end of the pass, which is at work on that very file system.
fn unmounted_during_a_walk_of_inodes(world: &mut World, seed: u64) -> Result<()> {
    /// After each of them the pass rests for 10 ms.
    const FILES: u64 = 1000;
    /// The pass is among them after so many more reports.
    const SOME: u64 = 50;
    let disk = disk("ext4")?;
    let library = format!("{}/library", disk.target);
    let (first, _) = world.pair()?;
    unit(first, Op::Mount(disk.clone()))?;
    hold(first, &library)?;
    first.wait_passes(2, LIMIT)?;
    first.set("run", "0")?;
    unit(
        first,
        Op::ManyFiles {
            directory: format!("{}/many", disk.target),
            seed,
            files: FILES,
        },
    )?;
    // Writes them back.
    for readonly in [true, false] {
        let target = disk.target.clone();
        unit(first, Op::Remount { target, readonly })?;
    }
    answered(first)?;
    first.set("pages_to_scan", "1")?;
    let before = seen_by_host(world)?;
    world.guests[0].set("run", "1")?;
    wait_until("the pass has come to the many files", || {
        Ok(seen_by_host(world)? >= before + SOME)
    })?;
    let (first, _) = world.pair()?;
    release(first, &library)?;
    unmount(first, &disk.target).context("in the middle of a walk of its inodes")?;
    let told = seen_by_host(world)? - before;
    ensure!(told < FILES, "the walk was over: it reported {told} pages");
    let (first, _) = world.pair()?;
    first.set("pages_to_scan", "65536")?;
    first.wait_passes(1, LIMIT).map(drop)
}

/// What each scope adds, and that a stream is left alone. Files are mapped to be looked at only while the module rests:
/// that would make them eligible.
pub(super) fn scopes_see_what_they_name(stage: &mut Stage) -> Result<()> {
    /// Of what else the guests map.
    const NOISE: u64 = 20;
    const FILES: [(&str, u32); 4] = [("part", 1), ("often", 4), ("once", 1), ("other", 4)];
    with_two(stage, |world, _, seed| {
        let disk = disk("ext4")?;
        let path = |name: &str| format!("{}/{name}", disk.target);
        each(world, |guest| {
            unit(guest, Op::Mount(disk.clone()))?;
            for (index, (name, _)) in FILES.iter().enumerate() {
                write(guest, &path(name), seed + index as u64, 0, BYTES)?;
            }
            unit(guest, Op::Evict)?;
            unit(
                guest,
                Op::HoldPart {
                    path: path("part"),
                    name: "ten pages".into(),
                    offset: 5 * PAGE,
                    bytes: 10 * PAGE,
                },
            )?;
            for (name, times) in FILES {
                let path = path(name);
                unit(guest, Op::ReadThrough { path, times })?;
            }
            Ok(())
        })?;

        all_same(world, "ten pages")?;
        let mut tracked = [0; 3];
        let part = shared_pages(world, "readonly", &[path("part")])?;
        tracked[0] = world.guests[0].counter("pages_tracked")?;
        ensure!(
            part[0].0 == 10,
            "readonly: {} pages of a file are shared of which ten are mapped",
            part[0].0
        );
        let cached = shared_pages(world, "cached", &[path("part"), path("other")])?;
        tracked[1] = world.guests[0].counter("pages_tracked")?;
        ensure!(
            is_most(cached[0]) && cached[1].0 == 0,
            "cached: {cached:?} pages are shared of a file with a mapped part, and of one without"
        );
        let clean = shared_pages(world, "clean", &[path("often"), path("once")])?;
        tracked[2] = world.guests[0].counter("pages_tracked")?;
        ensure!(
            is_most(clean[0]) && clean[1].0 == 0,
            "clean: {clean:?} pages are shared of a file that was read often, and of one that was read once"
        );
        // What does not belong to a smaller scope is not remembered as reported any more.
        let [in_readonly, in_cached, in_clean] = tracked;
        let pages = BYTES / PAGE;
        ensure!(
            in_cached + NOISE >= in_readonly + pages && in_clean + NOISE >= in_cached + pages,
            "{tracked:?} pages are remembered as the scope grows"
        );
        for (scope, before) in [("cached", in_cached), ("readonly", in_readonly)] {
            shared_pages(world, scope, &[])?;
            let after = world.guests[0].counter("pages_tracked")?;
            ensure!(
                after <= before + NOISE,
                "{scope}: {after} pages are remembered after a larger scope, and {before} were before"
            );
        }

        let mut integrity = Integrity::default();
        for (index, (name, _)) in FILES.iter().enumerate() {
            let expected = Expected::new(seed + index as u64, BYTES).sha256();
            each(world, |guest| integrity.file(guest, &path(name), &expected))?;
        }
        integrity.verdict()
    })
}

/// How many pages of files that nobody has to map are shared in a scope, and of how many.
pub(super) fn shared_pages(
    world: &mut World,
    scope: &str,
    files: &[String],
) -> Result<Vec<(usize, usize)>> {
    each(world, |guest| {
        guest.set("scope", scope)?;
        guest.set("run", "1")
    })?;
    settle(world, Instant::now())?;
    each(world, |guest| {
        guest.set("run", "0")?;
        files.iter().try_for_each(|file| hold(guest, file))
    })?;
    let shared = files.iter().map(|file| same(world, file)).collect();
    each(world, |guest| {
        files.iter().try_for_each(|file| release(guest, file))
    })?;
    shared
}

fn is_most((some, all): (usize, usize)) -> bool {
    some * 10 >= all * 9
}

/// Plays with two small guests that share and have a disk of each kind.
fn with_two(
    stage: &mut Stage,
    play: impl FnOnce(&mut World, &Sums, u64) -> Result<()>,
) -> Result<()> {
    let seed = stage.seed();
    let sums = sums(&stage.world)?;
    let images = DISKS.map(|(kind, _)| image(&stage.world, kind));
    let small = Small {
        disks: images.into_iter().collect::<Result<_>>()?,
        modules: &initramfs::FILESYSTEM_MODULES,
        ..Small::default()
    };
    stage.with_small_pair(&small, |world| play(world, &sums, seed))
}

/// The disk with a file system of this kind.
pub(super) fn image(world: &World, kind: &str) -> Result<PathBuf> {
    let directory = world.artifacts.filesystems.as_ref();
    let directory = directory.context("there are no images of file systems")?;
    Ok(directory.join("images").join(kind))
}

/// What is in the files of each of them.
pub(super) fn sums(world: &World) -> Result<Sums> {
    let directory = world.artifacts.filesystems.as_ref();
    let directory = directory.context("there are no images of file systems")?;
    let text = fs::read_to_string(directory.join("files.sha256"))?;
    let lines = text.lines().filter_map(|line| line.split_once("  "));
    Ok(lines.map(|(sum, name)| (name.into(), sum.into())).collect())
}

fn disk(kind: &str) -> Result<MountSpec> {
    let index = DISKS.iter().position(|(name, _)| *name == kind);
    let letter = index
        .and_then(|index| b"abcde".get(index))
        .context("disk")?;
    let source = format!("/dev/vd{}", char::from(*letter));
    Ok(spec(kind, &source, &format!("/fs/{kind}"), ""))
}

fn sum<'a>(sums: &'a Sums, name: &str) -> Result<&'a str> {
    let sum = sums.get(name).context("a file without a checksum")?;
    Ok(sum)
}

/// The files of the image are what they are in every guest.
fn contents(
    world: &mut World,
    integrity: &mut Integrity,
    sums: &Sums,
    directory: &str,
) -> Result<()> {
    each(world, |guest| {
        for name in FILES {
            integrity.file(guest, &format!("{directory}/{name}"), sum(sums, name)?)?;
        }
        Ok(())
    })
}
