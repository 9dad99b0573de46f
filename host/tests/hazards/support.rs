// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A guest whose memory is as the store has it, and what the kernel says of that memory.

#![expect(unsafe_code, reason = "does to its own memory what VMMs do to theirs")]

use crate::common::{GuestRam, Random, Vm, file, fill};
use pagefusion_abi::wire::reason;
use pagefusion_host::engine::ReportedRun;
use pagefusion_host::store::{Group, LocalStore, PAGE};
use std::fs;
use std::sync::{Arc, Mutex};

pub(crate) const PAGES: usize = 128;

pub(crate) const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
pub(crate) const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// A guest whose memory is as the store has it.
pub(crate) struct Equal {
    pub(crate) vm: Vm,
    pub(crate) bytes: Vec<u8>,
    _held: [LocalStore; 2],
}

impl Equal {
    pub(crate) fn new() -> Self {
        Self::with(GuestRam::new(PAGES, false))
    }

    /// Memory that has been prepared somehow.
    pub(crate) fn with(ram: GuestRam) -> Self {
        let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
        let bytes = Random(1).bytes(ram.pages * PAGE);
        let held = fill(&group, file(1), &bytes);
        let vm = Vm::with_ram(&group, 1, ram);
        Self {
            vm,
            bytes,
            _held: held,
        }
    }

    pub(crate) fn write_all(&self) {
        for page in 0..self.vm.ram.pages {
            self.vm
                .ram
                .write_page(page, &self.bytes[page * PAGE..][..PAGE]);
        }
    }

    /// Pages shared of all, and why no more.
    pub(crate) fn share(&self) -> (usize, u8) {
        self.share_some(0, PAGES)
    }

    pub(crate) fn share_some(&self, first: usize, pages: usize) -> (usize, u8) {
        let run = ReportedRun {
            file: file(1),
            page: first as u64,
            gfn: first as u64,
            pages: pages as u32,
        };
        let outcome = self.vm.sharing.share(&[run])[0];
        (outcome.shared.into(), outcome.reason)
    }

    pub(crate) fn check(&self) {
        for page in 0..self.vm.ram.pages {
            let expected = &self.bytes[page * PAGE..][..PAGE];
            assert_eq!(self.vm.ram.read_page(page), expected, "page {page}");
        }
    }

    pub(crate) fn refusal(&self) -> String {
        self.vm.sharing.memory().disabled().unwrap_or_default()
    }

    pub(crate) fn range(&self) -> std::ops::Range<usize> {
        self.vm.ram.at(0)..self.vm.ram.at(self.vm.ram.pages)
    }

    /// `VmFlags` of the mapping of a page.
    pub(crate) fn flags(&self, page: usize) -> Vec<String> {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let address = self.vm.ram.at(page);
        let mut inside = false;
        for line in smaps.lines() {
            let bounds = line.split(' ').next().and_then(|it| it.split_once('-'));
            let number = |text| usize::from_str_radix(text, 16).ok();
            if let Some((Some(start), Some(end))) = bounds.map(|(a, b)| (number(a), number(b))) {
                inside = (start..end).contains(&address);
            } else if let (true, Some(flags)) = (inside, line.strip_prefix("VmFlags:")) {
                return flags.split_ascii_whitespace().map(str::to_owned).collect();
            }
        }
        panic!("page {page} is not mapped");
    }
}

pub(crate) fn advise(ram: &GuestRam, pages: std::ops::Range<usize>, advice: i32) {
    let bytes = pages.len() * PAGE;
    // SAFETY: memory of a test, none of it seen through references to plain data.
    let result = unsafe { libc::madvise(ram.at(pages.start) as *mut _, bytes, advice) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[track_caller]
pub(crate) fn is_refused(equal: &Equal, name: &str) {
    let before = maps_of(&equal.range());
    assert_eq!(equal.share(), (0, reason::UNSUITABLE_MEMORY));
    let refusal = equal.refusal();
    assert!(refusal.contains(name), "{refusal}");
    assert_eq!(maps_of(&equal.range()), before);
}

/// Start, end, permissions and file of every mapping that begins in `range`.
pub(crate) fn maps_of(range: &std::ops::Range<usize>) -> Vec<String> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let inside = |line: &&str| {
        let start = line.split('-').next().unwrap();
        range.contains(&usize::from_str_radix(start, 16).unwrap())
    };
    maps.lines()
        .filter(inside)
        .map(|line| {
            let words: Vec<_> = line.split_ascii_whitespace().collect();
            [words[0], words[4], words[1]].join(" ")
        })
        .collect()
}
