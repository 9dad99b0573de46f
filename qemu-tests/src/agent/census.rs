//! What the machine's frames hold, by the kernel's own account.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    ops::Range,
    os::unix::fs::MetadataExt,
};

use anyhow::{Context, Result};

use super::held::Held;
use crate::protocol::FrameKind;

// From `linux/kernel-page-flags.h`.
const UPTODATE: u64 = 1 << 3;
const DIRTY: u64 = 1 << 4;
const LRU: u64 = 1 << 5;
const WRITEBACK: u64 = 1 << 8;
const ANON: u64 = 1 << 12;
const SWAPBACKED: u64 = 1 << 14;
const UNEVICTABLE: u64 = 1 << 18;

/// Counts of frames in a row that hold the same, from frame 0 on.
pub(super) fn take() -> Result<Vec<(u64, FrameKind)>> {
    let mut bytes = Vec::new();
    File::open("/proc/kpageflags")
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .context("read /proc/kpageflags")?;
    let flags = bytes
        .chunks_exact(8)
        .filter_map(|entry| entry.try_into().ok());
    let mut kinds: Vec<_> = flags.map(u64::from_le_bytes).map(kind).collect();
    for frame in mapped()?.into_iter().flatten() {
        // A page that is not cached has none.
        if let Some(kind) = kinds
            .get_mut(usize::try_from(frame)?)
            .filter(|_| frame != 0)
        {
            *kind = FrameKind::Mapped;
        }
    }
    Ok(runs(&kinds))
}

/// How many mapped pages are in runs of one page, of 2 and 3, of 4 to 7 and so on.
pub(super) fn mapped_runs() -> Result<Vec<u64>> {
    Ok(run_lengths(&mapped()?))
}

fn run_lengths(parts: &[Vec<u64>]) -> Vec<u64> {
    let mut lengths = Vec::new();
    for part in parts {
        for run in part.chunk_by(|one, next| *one != 0 && one + 1 == *next) {
            if run[0] != 0 {
                let class = run.len().ilog2() as usize;
                lengths.resize(lengths.len().max(class + 1), 0);
                lengths[class] += run.len() as u64;
            }
        }
    }
    lengths
}

fn kind(flags: u64) -> FrameKind {
    if flags & ANON != 0 {
        FrameKind::Anonymous
    } else if flags & (LRU | UNEVICTABLE) == 0 {
        FrameKind::Other
    } else if flags & (SWAPBACKED | DIRTY | WRITEBACK) != 0 || flags & UPTODATE == 0 {
        FrameKind::Cache
    } else {
        FrameKind::Clean
    }
}

fn runs(kinds: &[FrameKind]) -> Vec<(u64, FrameKind)> {
    let mut runs: Vec<(u64, FrameKind)> = Vec::new();
    for kind in kinds {
        match runs.last_mut() {
            Some((count, last)) if last == kind => *count += 1,
            _ => runs.push((1, *kind)),
        }
    }
    runs
}

/// A file and which parts of it are mapped.
type MappedFile = (File, Vec<Range<u64>>);

/// The frames of all page cache that lies in the range of a readable mapping that is not writable, for each part of a
/// file; 0 for a page that is not cached.
fn mapped() -> Result<Vec<Vec<u64>>> {
    let mut files: BTreeMap<(u64, u64), MappedFile> = BTreeMap::new();
    for process in fs::read_dir("/proc").context("list /proc")? {
        let directory = process?.path();
        // Not a process, or one that has just ended.
        let Ok(maps) = fs::read_to_string(directory.join("maps")) else {
            continue;
        };
        for mapping in maps.lines().filter_map(Mapping::of_line) {
            let link = directory.join("map_files").join(mapping.range);
            // It may be gone by now.
            let Ok(metadata) = fs::metadata(&link) else {
                continue;
            };
            if !metadata.is_file() {
                continue;
            }
            let key = (metadata.dev(), metadata.ino());
            if let std::collections::btree_map::Entry::Vacant(entry) = files.entry(key) {
                let Ok(file) = File::open(&link) else {
                    continue;
                };
                entry.insert((file, Vec::new()));
            }
            if let Some((_, parts)) = files.get_mut(&key) {
                parts.push(mapping.part);
            }
        }
    }
    let mut mapped = Vec::new();
    for (file, parts) in files.into_values() {
        let end = file.metadata()?.len();
        for part in joined(parts) {
            let length = part.end.min(end).saturating_sub(part.start);
            if length > 0 {
                mapped.push(Held::cached_frames(&file, part.start, length)?);
            }
        }
    }
    Ok(mapped)
}

/// One line of `/proc/<pid>/maps`.
#[derive(Debug, PartialEq, Eq)]
struct Mapping<'a> {
    range: &'a str,
    part: Range<u64>,
}

impl<'a> Mapping<'a> {
    /// `None` where no file is mapped, or so that it can be written to, or not read.
    fn of_line(line: &'a str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let range = fields.next()?;
        let access = fields.next()?;
        let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        let inode = fields.nth(1)?;
        let (start, end) = range.split_once('-')?;
        let length = u64::from_str_radix(end, 16).ok()? - u64::from_str_radix(start, 16).ok()?;
        let readonly = access.starts_with("r-");
        (readonly && inode != "0").then_some(Self {
            range,
            part: offset..offset + length,
        })
    }
}

/// The same parts, none of which overlaps another.
fn joined(mut parts: Vec<Range<u64>>) -> Vec<Range<u64>> {
    parts.sort_unstable_by_key(|part| part.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for part in parts {
        match joined.last_mut() {
            Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
            _ => joined.push(part),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_mapped_to_be_read_count() {
        let line = "7f00000-7f02000 r-xp 00003000 fe:00 77 /usr/lib/a b";
        let mapping = Mapping::of_line(line).unwrap();
        assert_eq!(mapping.range, "7f00000-7f02000");
        assert_eq!(mapping.part, 0x3000..0x5000);
        for line in [
            "7f00000-7f02000 rw-p 00003000 fe:00 77 /usr/lib/a",
            "7f00000-7f02000 ---p 00003000 fe:00 77 /usr/lib/a",
            "7f00000-7f02000 r--p 00000000 00:00 0 [vvar]",
        ] {
            assert_eq!(Mapping::of_line(line), None, "{line}");
        }
    }

    #[test]
    fn parts_that_overlap_are_one() {
        assert_eq!(joined(vec![8..12, 0..4, 3..6, 12..13]), [0..6, 8..13]);
    }

    #[test]
    fn a_run_ends_where_a_page_is_elsewhere_or_not_there() {
        let parts = [
            vec![7, 8, 9, 0, 0, 10, 5],
            vec![6],
            vec![1, 2, 3, 4],
            vec![],
        ];
        // 10, 5 and 6; 7 to 9; 1 to 4.
        assert_eq!(run_lengths(&parts), [3, 3, 4]);
    }

    #[test]
    fn frames_are_what_their_flags_say() {
        assert_eq!(kind(LRU | UPTODATE), FrameKind::Clean);
        assert_eq!(kind(LRU | UPTODATE | DIRTY), FrameKind::Cache);
        assert_eq!(kind(LRU | UPTODATE | SWAPBACKED), FrameKind::Cache);
        assert_eq!(
            kind(LRU | UPTODATE | ANON | SWAPBACKED),
            FrameKind::Anonymous
        );
        assert_eq!(kind(UPTODATE), FrameKind::Other);
        use FrameKind::{Clean, Other};
        assert_eq!(
            runs(&[Other, Other, Clean, Other]),
            [(2, Other), (1, Clean), (1, Other)]
        );
    }
}
