// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Reads QEMU's `info mtree -f`: which guest addresses are ordinary memory.

use std::ops::RangeInclusive;

/// Ranges of ordinary memory in the flat view of the address space `memory`.
///
/// Such a view looks like this, one per root; only that of the system memory counts:
///
/// ```text
/// FlatView #1
///  AS "memory", root: system
///  Root memory region: system
///   0000000000000000-000000000009ffff (prio 0, ram): pc.ram
///   00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
/// ```
pub(crate) fn ram_ranges(text: &str) -> Vec<RangeInclusive<u64>> {
    let mut is_memory = false;
    let mut in_ranges = false;
    let mut ranges: Vec<RangeInclusive<u64>> = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with("FlatView") {
            if is_memory && !ranges.is_empty() {
                break;
            }
            is_memory = false;
            in_ranges = false;
        } else if line.starts_with("AS \"memory\"") {
            is_memory = true;
        } else if line.starts_with("Root memory region") {
            in_ranges = true;
        } else if is_memory && in_ranges && line.contains("(prio") && line.contains(", ram)") {
            let range = line.split(' ').next().and_then(|r| r.split_once('-'));
            let Some((start, end)) = range else { continue };
            let parse = |s: &str| u64::from_str_radix(s, 16);
            let (Ok(start), Ok(end)) = (parse(start), parse(end)) else {
                continue;
            };
            if start <= end {
                ranges.push(start..=end);
            }
        }
    }
    ranges
}

/// Reads the answer of `gpa2hva`: `Host virtual address for 0x0 (pc.ram) is 0x7f…`.
pub(crate) fn host_address(text: &str) -> Option<usize> {
    let address = text.trim().rsplit("is 0x").next()?;
    usize::from_str_radix(address, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TREE: &str = "FlatView #0\r
 AS \"I/O\", root: io\r
 Root memory region: io\r
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan\r
\r
FlatView #1\r
 AS \"memory\", root: system\r
 AS \"cpu-memory-0\", root: system\r
 Root memory region: system\r
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram\r
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem\r
  00000000000c0000-00000000000c3fff (prio 0, rom): pc.ram @00000000000c0000\r
  0000000000100000-000000002fffffff (prio 0, ram): pc.ram @0000000000100000\r
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram\r
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios\r
\r
FlatView #2\r
 AS \"bus\", root: bus\r
 Root memory region: bus\r
  0000000000000000-000000000009ffff (prio 0, ram): other\r
";

    #[test]
    fn ordinary_memory_of_the_system_is_found() {
        let expected = [
            0..=0x9_ffff,
            0x10_0000..=0x2fff_ffff,
            0xfd00_0000..=0xfdff_ffff,
        ];
        assert_eq!(ram_ranges(TREE), expected);
        assert_eq!(ram_ranges("nonsense\nmore (prio 0, ram): x"), []);
    }

    #[test]
    fn host_addresses_are_read_and_errors_are_not() {
        let answer = "Host virtual address for 0x100000 (pc.ram) is 0x7f0012345000\r\n";
        assert_eq!(host_address(answer), Some(0x7f00_1234_5000));
        assert_eq!(host_address("No memory is mapped at address 0x0\r\n"), None);
    }
}
