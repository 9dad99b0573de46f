// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the memory of a region is made of: whether it may be shared at all, and what the VMM
//! has set on it.

#![expect(unsafe_code, reason = "maps a page to see what new memory is like")]

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::numa::MemoryPolicy;
use crate::store::PAGE;

/// Attributes that the VMM has set on a range, and that what replaces it must have too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// `MADV_DONTFORK`
    pub dont_fork: bool,
    /// `MADV_DONTDUMP`
    pub dont_dump: bool,
    /// `MADV_HUGEPAGE`
    pub huge_page: bool,
    /// `MADV_NOHUGEPAGE`
    pub no_huge_page: bool,
    /// `MADV_MERGEABLE`
    pub mergeable: bool,
    /// `MAP_NORESERVE`
    pub no_reserve: bool,
    /// `mbind`
    pub policy: Option<MemoryPolicy>,
}

/// Why a range of guest memory cannot be shared, as the operator reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
pub enum Unsuitable {
    /// Another process may map it.
    #[error("guest memory is shared with other processes (share=on)")]
    SharedMapping,
    /// It comes from a file or a memfd.
    #[error("guest memory is backed by a file")]
    FileBacked,
    /// hugetlbfs.
    #[error("guest memory is made of hugetlbfs pages")]
    HugeTlb,
    /// `mlock`, `mlockall`.
    #[error("guest memory is locked (mlock)")]
    Locked,
    /// Device memory.
    #[error("guest memory is device memory")]
    Device,
    /// Read-only, executable, or not mapped.
    #[error("guest memory is not mapped for reading and writing and nothing else")]
    NotWritable,
    /// `MADV_WIPEONFORK`, which no overlay can have.
    #[error("guest memory is wiped on fork (MADV_WIPEONFORK)")]
    WipedOnFork,
    /// A mapping can have one `userfaultfd` only.
    #[error("the VMM uses userfaultfd on guest memory (postcopy, background snapshot)")]
    Userfaultfd,
    /// Of which the guest has pages that the VMM cannot map.
    #[error("guest memory is private to the guest (guest_memfd)")]
    GuestMemfd,
}

impl Unsuitable {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::SharedMapping,
        Self::FileBacked,
        Self::HugeTlb,
        Self::Locked,
        Self::Device,
        Self::NotWritable,
        Self::WipedOnFork,
        Self::Userfaultfd,
        Self::GuestMemfd,
    ];

    /// Name by which refused pages are counted, as those of
    /// [`reason::name`](pagefusion_abi::wire::reason::name) are.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SharedMapping => "memory-share-on",
            Self::FileBacked => "memory-file",
            Self::HugeTlb => "memory-hugetlbfs",
            Self::Locked => "memory-locked",
            Self::Device => "memory-device",
            Self::NotWritable => "memory-protected",
            Self::WipedOnFork => "memory-wiped-on-fork",
            Self::Userfaultfd => "memory-userfaultfd",
            Self::GuestMemfd => "memory-guest-memfd",
        }
    }
}

/// Attributes of a whole region, which need not be the same everywhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct AttributeMap {
    /// Ends and attributes of ranges, ascending; two that meet differ.
    ranges: Vec<(usize, Attributes)>,
}

impl AttributeMap {
    /// Attributes at `address`, and where they end.
    pub(super) fn at(&self, address: usize) -> Option<(&Attributes, usize)> {
        let index = self.ranges.partition_point(|(end, _)| *end <= address);
        self.ranges.get(index).map(|(end, it)| (it, *end))
    }

    /// Attributes of all of `range`, if they are the same everywhere, and where they end.
    pub(super) fn of(&self, range: &Range<usize>) -> Option<(&Attributes, usize)> {
        self.at(range.start).filter(|(_, end)| range.end <= *end)
    }

    /// Adds what follows; `None` is an overlay, which has what its neighbours have.
    fn push(&mut self, end: usize, attributes: Option<Attributes>) {
        match (self.ranges.last_mut(), attributes) {
            (Some(last), None) => last.0 = end,
            (Some(last), Some(here)) if last.1 == here => last.0 = end,
            (_, Some(here)) => self.ranges.push((end, here)),
            // What comes next begins here as well.
            (None, None) => {}
        }
    }
}

/// Looks at what `range` is made of. Parts that are overlays already (their addresses satisfy
/// `is_overlay`) count as suitable.
pub(super) fn examine(
    range: &Range<usize>,
    is_overlay: impl Fn(usize) -> bool,
) -> io::Result<Result<AttributeMap, Unsuitable>> {
    // After mlockall(MCL_FUTURE) guest memory need not be locked, but an overlay would be.
    let Some(sample) = Sample::map()? else {
        return Ok(Err(Unsuitable::Locked));
    };
    let smaps = read_smaps()?;
    if is_locked(&smaps, sample.0) {
        return Ok(Err(Unsuitable::Locked));
    }
    Ok(inspect(&smaps, range, is_overlay, MemoryPolicy::at))
}

/// What this process's mappings are and their flags, from `/proc/self/smaps`. Line by line: all that it
/// says of many mappings comes to megabytes, and having freed such an amount the allocator
/// keeps twice as much of all that is freed later.
pub(super) fn read_smaps() -> io::Result<String> {
    wanted_of(BufReader::new(File::open("/proc/self/smaps")?))
}

fn wanted_of(mut smaps: impl BufRead) -> io::Result<String> {
    let mut wanted = String::new();
    let mut line = Vec::new();
    while smaps.read_until(b'\n', &mut line)? > 0 {
        // Only headers begin in small letters or with digits.
        if !line[0].is_ascii_uppercase() || line.starts_with(b"VmFlags:") {
            wanted.push_str(&String::from_utf8_lossy(&line));
        }
        line.clear();
    }
    Ok(wanted)
}

/// A page of new memory.
struct Sample(usize);

impl Sample {
    /// `None` if new memory is locked, and there may be no more of that.
    fn map() -> io::Result<Option<Self>> {
        // SAFETY: fresh memory that nobody touches.
        let mapped =
            unsafe { mmap_anonymous(ptr::null_mut(), PAGE, ProtFlags::empty(), MapFlags::PRIVATE) };
        match mapped {
            Ok(address) => Ok(Some(Self(address as usize))),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

impl Drop for Sample {
    fn drop(&mut self) {
        // SAFETY: the page mapped in `map`.
        let _ = unsafe { munmap(self.0 as *mut _, PAGE) };
    }
}

fn is_locked(smaps: &str, address: usize) -> bool {
    let mut inside = false;
    for line in smaps.lines() {
        if let Some(mapping) = parse_header(line) {
            inside = (mapping.start..mapping.end).contains(&address);
        } else if let (true, Some(flags)) = (inside, line.strip_prefix("VmFlags:")) {
            return flags.split_ascii_whitespace().any(|it| it == "lo");
        }
    }
    false
}

/// Whether any of `range` is registered with a `userfaultfd`, by the text of `/proc/self/smaps`.
pub(super) fn has_userfaultfd(smaps: &str, range: &Range<usize>) -> bool {
    let mut inside = false;
    smaps.lines().any(|line| {
        if let Some(mapping) = parse_header(line) {
            inside = mapping.start < range.end && range.start < mapping.end;
        }
        let flags = line.strip_prefix("VmFlags:").unwrap_or_default();
        let is_registered = |flag| matches!(flag, "um" | "uw" | "ui");
        inside && flags.split_ascii_whitespace().any(is_registered)
    })
}

/// As [`examine`], from the text of `/proc/self/smaps`.
fn inspect(
    smaps: &str,
    range: &Range<usize>,
    is_overlay: impl Fn(usize) -> bool,
    policy_at: impl Fn(usize) -> Option<MemoryPolicy>,
) -> Result<AttributeMap, Unsuitable> {
    let mut covered = range.start;
    let mut attributes = AttributeMap::default();
    // The mapping whose lines come, and where it begins and ends within the range.
    let mut current: Option<Range<usize>> = None;
    for line in smaps.lines() {
        if let Some(mapping) = parse_header(line) {
            current = None;
            let part = mapping.start.max(range.start)..mapping.end.min(range.end);
            if part.is_empty() {
                continue;
            }
            if part.start > covered {
                return Err(Unsuitable::NotWritable);
            }
            covered = part.end;
            if is_overlay(part.start) {
                attributes.push(part.end, None);
                continue;
            }
            mapping.check()?;
            current = Some(part);
        } else if let (Some(flags), Some(part)) = (line.strip_prefix("VmFlags:"), &current) {
            let has = |flag| flags.split_ascii_whitespace().any(|f| f == flag);
            if has("lo") {
                return Err(Unsuitable::Locked);
            }
            if has("ht") {
                return Err(Unsuitable::HugeTlb);
            }
            if has("pf") || has("io") || has("mm") {
                return Err(Unsuitable::Device);
            }
            if has("wf") {
                return Err(Unsuitable::WipedOnFork);
            }
            let here = Attributes {
                dont_fork: has("dc"),
                dont_dump: has("dd"),
                huge_page: has("hg"),
                no_huge_page: has("nh"),
                mergeable: has("mg"),
                no_reserve: has("nr"),
                policy: policy_at(part.start),
            };
            attributes.push(part.end, Some(here));
        }
    }
    if covered < range.end {
        return Err(Unsuitable::NotWritable);
    }
    if attributes.ranges.is_empty() {
        attributes.push(range.end, Some(Attributes::default()));
    }
    Ok(attributes)
}

struct Mapping<'a> {
    start: usize,
    end: usize,
    permissions: &'a str,
    inode: u64,
    path: &'a str,
}

impl Mapping<'_> {
    fn check(&self) -> Result<(), Unsuitable> {
        if self.path.contains("hugepage") || self.path.starts_with("/dev/hugepages") {
            return Err(Unsuitable::HugeTlb);
        }
        if self.permissions.ends_with('s') {
            return Err(Unsuitable::SharedMapping);
        }
        if self.inode != 0 {
            return Err(Unsuitable::FileBacked);
        }
        if self.permissions != "rw-p" {
            return Err(Unsuitable::NotWritable);
        }
        Ok(())
    }
}

/// `start-end perms offset dev inode path`
fn parse_header(line: &str) -> Option<Mapping<'_>> {
    let mut rest = line;
    let mut field = || {
        let trimmed = rest.trim_start();
        let (word, tail) = trimmed.split_once(' ').unwrap_or((trimmed, ""));
        rest = tail;
        word
    };
    let (start, end) = field().split_once('-')?;
    let permissions = field();
    if permissions.len() != 4 {
        return None;
    }
    let (_offset, _device, inode) = (field(), field(), field());
    Some(Mapping {
        start: usize::from_str_radix(start, 16).ok()?,
        end: usize::from_str_radix(end, 16).ok()?,
        permissions,
        inode: inode.parse().ok()?,
        path: rest.trim(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000100000 rw-p 00000000 00:00 0 
Size: 1024 kB
VmFlags: rd wr mr mw me ac dc hg mg 
7f0000100000-7f0000200000 rw-s 00000000 00:01 77 /memfd:ram (deleted)
VmFlags: rd wr sh mr mw me ms sd 
7f0000200000-7f0000300000 rw-p 00000000 00:00 0 
VmFlags: rd wr mr mw me lo ac 
7f0000300000-7f0000400000 rw-p 00000000 00:0f 9 /anon_hugepage (deleted)
VmFlags: rd wr mr mw me de ht 
7f0000500000-7f0000600000 rw-p 00000000 00:00 0 
VmFlags: rd wr mr mw me ac dd 
7f0000600000-7f0000700000 rw-p 00001000 00:01 78 /dev/shm/a.pages
VmFlags: rd wr mr mw me 
7f0000700000-7f0000800000 rw-p 00000000 00:00 0 
VmFlags: rd wr mr mw me ac dd 
7f0000800000-7f0000900000 rw-p 00000000 00:00 0 
VmFlags: rd wr mr mw me ac dd nh 
7f0000900000-7f0000a00000 rwxp 00000000 00:00 0 
VmFlags: rd wr ex mr mw me ac 
7f0000a00000-7f0000b00000 rw-p 00000000 00:00 0 
VmFlags: rd wr mr mw me ac wf 
";
    const BASE: usize = 0x7f00_0000_0000;

    fn ask(from: usize, to: usize) -> Result<AttributeMap, Unsuitable> {
        let is_overlay = |address: usize| (0x60_0000..0x70_0000).contains(&(address - BASE));
        inspect(SMAPS, &(BASE + from..BASE + to), is_overlay, |_| None)
    }

    #[test]
    fn anonymous_private_memory_is_suitable_and_keeps_its_attributes() {
        let found = ask(0x1000, 0x10_0000).unwrap();
        let expected = Attributes {
            dont_fork: true,
            huge_page: true,
            mergeable: true,
            ..Attributes::default()
        };
        assert_eq!(found.at(BASE + 0x1000), Some((&expected, BASE + 0x10_0000)));
    }

    #[test]
    fn attributes_may_change_within_a_region_and_overlays_have_their_neighbours() {
        let found = ask(0x50_0000, 0x90_0000).unwrap();
        let at = |offset: usize| found.at(BASE + offset);
        let dont_dump = Attributes {
            dont_dump: true,
            ..Attributes::default()
        };
        for inside in [0x50_0000, 0x60_0000, 0x7f_f000] {
            assert_eq!(at(inside), Some((&dont_dump, BASE + 0x80_0000)));
        }
        assert!(at(0x80_0000).unwrap().0.no_huge_page);
        assert_eq!(at(0x90_0000), None);
        let of = |from: usize, to: usize| found.of(&(BASE + from..BASE + to)).map(|(it, _)| it);
        assert_eq!(of(0x7f_f000, 0x80_0000), Some(&dont_dump));
        assert_eq!(of(0x7f_f000, 0x80_1000), None);
    }

    #[test]
    fn a_region_of_overlays_alone_has_no_attributes() {
        let found = ask(0x60_0000, 0x70_0000).unwrap();
        assert_eq!(
            found.of(&(BASE + 0x60_0000..BASE + 0x70_0000)),
            Some((&Attributes::default(), BASE + 0x70_0000))
        );
        // One that begins with an overlay has those of what follows.
        let found = ask(0x60_0000, 0x80_0000).unwrap();
        assert!(found.at(BASE + 0x60_0000).unwrap().0.dont_dump);
    }

    #[test]
    fn unsuitable_memory_is_refused_by_name() {
        for (from, to, why) in [
            (0x8_0000, 0x18_0000, Unsuitable::SharedMapping),
            (0x20_0000, 0x30_0000, Unsuitable::Locked),
            (0x30_0000, 0x40_0000, Unsuitable::HugeTlb),
            (0x40_0000, 0x50_0000, Unsuitable::NotWritable),
            (0x90_0000, 0xa0_0000, Unsuitable::NotWritable),
            (0xa0_0000, 0xb0_0000, Unsuitable::WipedOnFork),
        ] {
            assert_eq!(ask(from, to), Err(why));
        }
    }

    #[test]
    fn of_what_is_said_of_mappings_the_flags_are_kept() {
        let smaps = "7f00-7f10 rw-p 00000000 00:00 0 /a\u{e9}\nRss: 4 kB\nVmFlags: rd wr \n\
                     a000-b000 r--p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: rd ";
        let mut bytes = smaps.as_bytes().to_vec();
        // No UTF-8.
        bytes[smaps.find('\u{e9}').unwrap()] = 0xff;
        let wanted = wanted_of(&bytes[..]).unwrap();
        assert_eq!(wanted.lines().count(), 4, "{wanted}");
        assert!(!wanted.contains("kB") && wanted.ends_with("VmFlags: rd "));
        let mappings: Vec<_> = wanted.lines().filter_map(parse_header).collect();
        assert_eq!(mappings.len(), 2);
        assert_eq!((mappings[1].start, mappings[1].end), (0xa000, 0xb000));
    }

    #[test]
    fn locked_memory_is_found_by_address() {
        assert!(is_locked(SMAPS, BASE + 0x20_0000));
        assert!(!is_locked(SMAPS, BASE + 0x1f_ffff));
        assert!(!is_locked(SMAPS, BASE + 0x40_0000));
    }
}
