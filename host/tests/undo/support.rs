// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A guest with some of two files.

use crate::common::{Random, Vm, file, fill};
use pagefusion_host::engine::{ReportedRun, file_uses};
use pagefusion_host::store::{Group, LocalStore, PAGE};
use std::sync::{Arc, Mutex};

/// Of each file.
pub(crate) const PAGES: usize = 256;
pub(crate) const RUN: usize = 16;

pub(crate) struct Shared {
    pub(crate) vm: Vm,
    pub(crate) content: [Vec<u8>; 2],
    /// Others who have the same pages.
    pub(crate) held: Vec<[LocalStore; 2]>,
}

impl Shared {
    /// A guest in which runs of two files take turns, all of them shared.
    pub(crate) fn new() -> Self {
        let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
        let content = [3, 4].map(|seed| Random(seed).bytes(PAGES * PAGE));
        let held = [1, 2].map(|number| fill(&group, file(number), &content[number as usize - 1]));
        let vm = Vm::new(&group, 1, 2 * PAGES, true);
        let this = Self {
            vm,
            content,
            held: held.into(),
        };
        for frame in 0..2 * PAGES {
            this.vm.ram.write_page(frame, this.expected(frame));
        }
        this.share();
        this
    }

    pub(crate) fn share(&self) {
        let run = |turn: usize| ReportedRun {
            file: file(turn as u64 % 2 + 1),
            page: (turn / 2 * RUN) as u64,
            gfn: (turn * RUN) as u64,
            pages: RUN as u32,
        };
        let runs: Vec<_> = (0..2 * PAGES / RUN).map(run).collect();
        let outcomes = self.vm.sharing.share(&runs);
        assert!(outcomes.iter().all(|it| usize::from(it.shared) == RUN));
    }

    pub(crate) fn expected(&self, frame: usize) -> &[u8] {
        let turn = frame / RUN;
        let page = turn / 2 * RUN + frame % RUN;
        &self.content[turn % 2][page * PAGE..][..PAGE]
    }

    /// Pages shared by file 1 and by file 2.
    pub(crate) fn uses(&self) -> [u64; 2] {
        let uses = file_uses(&self.vm.sharing, None, 10, |_| Some("x")).unwrap();
        [1, 2].map(|number| {
            let found = uses.iter().find(|it| it.file == file(number));
            found.map_or(0, |it| it.pages_shared)
        })
    }

    pub(crate) fn check(&self) {
        for frame in 0..2 * PAGES {
            assert_eq!(
                self.vm.ram.read_page(frame),
                self.expected(frame),
                "{frame}"
            );
        }
    }
}
