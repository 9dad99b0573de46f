//! Files that change under sharing: rewritten, deleted, read again and evicted in one guest, while another has the same
//! files shared and must not notice.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    guest::Guest,
    integrity::{Integrity, sums},
    pattern::Expected,
    protocol::Op,
    settle::{same_memory, settle},
    world::World,
};

/// Where files of our own go.
const DIRECTORY: &str = "/var/lib/pagefusion-tests";
/// Size of a file of our own; not a whole number of pages, so that the last one has a tail.
const BYTES: u64 = (4 << 20) + 777;
/// Sizes of files of the image that are worth changing.
const IMAGE_BYTES: std::ops::Range<u64> = 128 << 10..4 << 20;

/// A file that both guests have and hold mapped.
#[derive(Clone, Debug)]
struct Subject {
    path: String,
    bytes: u64,
    before: String,
}

/// Changes files in the first guest and watches both.
pub fn run(world: &mut World, integrity: &mut Integrity, seed: u64) -> Result<()> {
    let subjects = prepare(world, seed)?;
    let [rewritten, deleted, reread, evicted] = &subjects;
    let (first, second) = world.pair()?;
    let retracted = first.counter("pages_retracted")?;

    let mut content = Expected::new(seed, BYTES);
    content.rewrite(seed + 100, 3 * 4096 + 100, 2 * 4096);
    rewrite(first, &rewritten.path, seed + 100, 3 * 4096 + 100, 2 * 4096)?;
    integrity.file(first, &rewritten.path, &content.sha256())?;
    integrity.held(first, &rewritten.path, &content.sha256())?;
    integrity.held(second, &rewritten.path, &rewritten.before)?;

    unit(
        first,
        Op::Delete {
            path: deleted.path.clone(),
        },
    )?;
    integrity.held(first, &deleted.path, &deleted.before)?;
    let anew = Expected::new(seed + 200, deleted.bytes).sha256();
    rewrite(first, &deleted.path, seed + 200, 0, deleted.bytes)?;
    integrity.file(first, &deleted.path, &anew)?;
    integrity.held(first, &deleted.path, &deleted.before)?;

    integrity.file(first, &reread.path, &reread.before)?;
    integrity.held(first, &reread.path, &reread.before)?;

    let frames = |guest: &mut Guest| -> Result<Vec<u64>> {
        let path = evicted.path.clone();
        guest.request(Op::HeldFrames { path })
    };
    let before = frames(first)?;
    unit(
        first,
        Op::Release {
            path: evicted.path.clone(),
        },
    )?;
    unit(first, Op::Evict)?;
    integrity.file(first, &evicted.path, &evicted.before)?;
    unit(
        first,
        Op::Hold {
            path: evicted.path.clone(),
        },
    )?;

    let after = frames(first)?;
    let moved = before
        .iter()
        .zip(&after)
        .filter(|(one, other)| one != other);
    ensure!(
        moved.count() * 2 > before.len(),
        "{} was read again into the same memory",
        evicted.path
    );

    second_is_untouched(second, integrity, &subjects)?;
    // What the guest reports now is new content under an old name; sharing must not bring the old bytes back.
    settle(world, Instant::now())?;
    same_memory(world, &evicted.path).context("evicted and read again")?;
    let (first, second) = world.pair()?;
    let withdrawn = first.counter("pages_retracted")? - retracted;
    ensure!(withdrawn > 0, "nothing of what changed was withdrawn");
    integrity.file(first, &rewritten.path, &content.sha256())?;
    integrity.held(first, &rewritten.path, &content.sha256())?;
    integrity.file(first, &deleted.path, &anew)?;
    integrity.held(first, &evicted.path, &evicted.before)?;
    second_is_untouched(second, integrity, &subjects)?;

    for subject in &subjects {
        unit(
            first,
            Op::Release {
                path: subject.path.clone(),
            },
        )?;
        unit(
            second,
            Op::Release {
                path: subject.path.clone(),
            },
        )?;
    }
    Ok(())
}

/// Three files of our own and one of the image, in both guests, mapped and shared.
fn prepare(world: &mut World, seed: u64) -> Result<[Subject; 4]> {
    let own = |name: &str, index: u64| Subject {
        path: format!("{DIRECTORY}/{name}-{seed}"),
        bytes: BYTES,
        before: Expected::new(seed + index, BYTES).sha256(),
    };
    let subjects = [
        own("rewritten", 0),
        own("deleted", 1),
        own("reread", 2),
        of_image(world)?,
    ];
    for guest in &mut world.guests[..2] {
        guest.output(&["mkdir", "-p", DIRECTORY])?;
        for (index, subject) in subjects.iter().enumerate() {
            if subject.path.starts_with(DIRECTORY) {
                rewrite(guest, &subject.path, seed + index as u64, 0, BYTES)?;
            }
            unit(
                guest,
                Op::Hold {
                    path: subject.path.clone(),
                },
            )?;
        }
    }
    for subject in &subjects {
        same_memory(world, &subject.path)?;
    }
    Ok(subjects)
}

/// A file of the image that nothing in the guest maps.
fn of_image(world: &mut World) -> Result<Subject> {
    let manifest = world.manifest.clone();
    let guest = world.guests.first_mut().context("no guest")?;
    let mapped: Vec<String> = guest.request(Op::MappedFiles)?;
    let (least, most) = (IMAGE_BYTES.start, IMAGE_BYTES.end);
    let size = [format!("+{}c", least - 1), format!("-{most}c")];
    let found = guest.output(&[
        "find",
        "/usr/share",
        "-type",
        "f",
        "-size",
        &size[0],
        "-size",
        &size[1],
    ])?;
    let mut candidates: Vec<_> = found.lines().filter(|path| manifest.has(path)).collect();
    candidates.sort_unstable();
    for path in candidates {
        if mapped.iter().any(|mapped| mapped == path) {
            continue;
        }
        for sum in sums(guest, vec![path.to_owned()])? {
            if manifest.compare(&sum).is_ok() {
                let before = sum.by_read.context("no hash")?;
                return Ok(Subject {
                    path: sum.path,
                    bytes: sum.bytes,
                    before,
                });
            }
        }
    }
    anyhow::bail!("the image has no file of {IMAGE_BYTES:?} bytes below /usr/share")
}

fn second_is_untouched(
    second: &mut Guest,
    integrity: &mut Integrity,
    subjects: &[Subject],
) -> Result<()> {
    for subject in subjects {
        integrity.file(second, &subject.path, &subject.before)?;
        integrity.held(second, &subject.path, &subject.before)?;
    }
    Ok(())
}

fn rewrite(guest: &mut Guest, path: &str, seed: u64, offset: u64, bytes: u64) -> Result<()> {
    unit(
        guest,
        Op::WritePattern {
            path: path.to_owned(),
            seed,
            offset,
            bytes,
        },
    )
}

fn unit(guest: &mut Guest, op: Op) -> Result<()> {
    guest.request::<Value>(op).map(drop)
}
