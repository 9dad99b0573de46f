// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Where guest memory is in this process, and whether it may be shared at all.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::store::PAGE;

/// One gpa → hva range of ordinary guest memory; whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest frame.
    pub gfn: u64,
    /// Length, pages.
    pub pages: u64,
    /// Address in this process, page-aligned.
    pub hva: usize,
}

impl Region {
    /// Addresses of the region in this process.
    pub fn addresses(&self) -> Range<usize> {
        self.hva..self.hva + self.pages as usize * PAGE
    }
}

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
    /// Read-only, or not mapped.
    #[error("guest memory is not mapped readable and writable")]
    NotWritable,
}

/// The regions of a VM, by the key its VMM gives them (a KVM slot, say).
#[derive(Debug, Default)]
pub struct Regions {
    by_key: BTreeMap<u64, Region>,
    sorted: Vec<Region>,
}

impl Regions {
    /// Sets or replaces the region `key`.
    pub fn insert(&mut self, key: u64, region: Region) {
        self.by_key.insert(key, region);
        self.sort();
    }

    /// Removes the region `key`.
    pub fn remove(&mut self, key: u64) -> Option<Region> {
        let old = self.by_key.remove(&key);
        self.sort();
        old
    }

    /// The region `key`.
    pub fn get(&self, key: u64) -> Option<Region> {
        self.by_key.get(&key).copied()
    }

    /// The region that has this address of the process, with its key.
    pub fn find(&self, address: usize) -> Option<(u64, Region)> {
        let holds = |r: &Region| r.addresses().contains(&address);
        self.by_key
            .iter()
            .find(|(_, r)| holds(r))
            .map(|(key, r)| (*key, *r))
    }

    fn sort(&mut self) {
        self.sorted = self.by_key.values().copied().collect();
        self.sorted.sort_by_key(|r| r.gfn);
    }

    /// Sum of all regions, bytes.
    pub fn bytes(&self) -> u64 {
        self.sorted.iter().map(|r| r.pages * PAGE as u64).sum()
    }

    /// All regions by guest frame.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.sorted.iter()
    }

    /// Cuts guest frames into pieces that are contiguous in this process. What lies outside
    /// of guest memory is left out.
    pub fn pieces(&self, gfn: u64, pages: u64) -> impl Iterator<Item = Piece> + '_ {
        let end = gfn.saturating_add(pages);
        let from = self.sorted.partition_point(|r| r.gfn + r.pages <= gfn);
        self.sorted[from..]
            .iter()
            .take_while(move |r| r.gfn < end)
            .map(move |r| {
                let start = gfn.max(r.gfn);
                let stop = end.min(r.gfn + r.pages);
                Piece {
                    offset: start - gfn,
                    pages: (stop - start) as usize,
                    hva: r.hva + (start - r.gfn) as usize * PAGE,
                }
            })
    }
}

/// Part of a run, contiguous in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Pages from the start of the run.
    pub offset: u64,
    /// Length, pages.
    pub pages: usize,
    /// Address of the first page.
    pub hva: usize,
}

/// Checks what `range` is made of, from the text of `/proc/self/smaps`. Parts that are
/// overlays already (their addresses satisfy `is_overlay`) count as suitable.
pub(super) fn inspect(
    smaps: &str,
    range: &Range<usize>,
    is_overlay: impl Fn(usize) -> bool,
) -> Result<Attributes, Unsuitable> {
    let mut covered = range.start;
    let mut attributes: Option<Attributes> = None;
    let mut current: Option<(usize, usize)> = None;
    for line in smaps.lines() {
        if let Some(mapping) = parse_header(line) {
            current = None;
            if mapping.end <= range.start || mapping.start >= range.end {
                continue;
            }
            if mapping.start > covered {
                return Err(Unsuitable::NotWritable);
            }
            covered = mapping.end;
            if is_overlay(mapping.start.max(range.start)) {
                continue;
            }
            mapping.check()?;
            current = Some((mapping.start, mapping.end));
        } else if let (Some(flags), Some(_)) = (line.strip_prefix("VmFlags:"), current) {
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
            let here = Attributes {
                dont_fork: has("dc"),
                dont_dump: has("dd"),
                huge_page: has("hg"),
                no_huge_page: has("nh"),
                mergeable: has("mg"),
                no_reserve: has("nr"),
            };
            attributes.get_or_insert(here);
        }
    }
    if covered < range.end {
        return Err(Unsuitable::NotWritable);
    }
    Ok(attributes.unwrap_or_default())
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
        if !self.permissions.starts_with("rw") {
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

    #[test]
    fn pieces_follow_regions_and_leave_out_holes() {
        let mut regions = Regions::default();
        regions.insert(
            0,
            Region {
                gfn: 0,
                pages: 16,
                hva: 0x10000,
            },
        );
        regions.insert(
            1,
            Region {
                gfn: 32,
                pages: 16,
                hva: 0x80000,
            },
        );
        let pieces: Vec<_> = regions.pieces(8, 32).collect();
        assert_eq!(
            pieces,
            [
                Piece {
                    offset: 0,
                    pages: 8,
                    hva: 0x10000 + 8 * PAGE
                },
                Piece {
                    offset: 24,
                    pages: 8,
                    hva: 0x80000
                },
            ]
        );
        assert_eq!(regions.pieces(u64::MAX - 1, 4).count(), 0);
        assert_eq!(regions.pieces(16, 16).count(), 0);
    }

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
";

    #[test]
    fn anonymous_private_memory_is_suitable_and_keeps_its_attributes() {
        let found = inspect(SMAPS, &(0x7f00_0000_1000..0x7f00_0010_0000), |_| false);
        let expected = Attributes {
            dont_fork: true,
            huge_page: true,
            mergeable: true,
            ..Attributes::default()
        };
        assert_eq!(found, Ok(expected));
    }

    #[test]
    fn shared_locked_huge_and_missing_memory_is_refused_by_name() {
        let ask = |from: usize, to: usize| {
            inspect(
                SMAPS,
                &(0x7f00_0000_0000 + from..0x7f00_0000_0000 + to),
                |_| false,
            )
        };
        assert_eq!(ask(0x8_0000, 0x18_0000), Err(Unsuitable::SharedMapping));
        assert_eq!(ask(0x20_0000, 0x30_0000), Err(Unsuitable::Locked));
        assert_eq!(ask(0x30_0000, 0x40_0000), Err(Unsuitable::HugeTlb));
        assert_eq!(ask(0x40_0000, 0x50_0000), Err(Unsuitable::NotWritable));
    }
}
