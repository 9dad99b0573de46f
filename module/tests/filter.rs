// SPDX-License-Identifier: GPL-2.0

use crate::filter::{Filter, Word, WORDS};
use proptest::prelude::*;
use std::cell::Cell;

struct Bits(Cell<u64>);

impl Word for Bits {
    fn load(&self) -> u64 {
        self.0.get()
    }

    fn store(&self, bits: u64) {
        self.0.set(bits);
    }
}

fn filter() -> Filter<Bits> {
    Filter::new([const { Bits(Cell::new(0)) }; WORDS])
}

/// Hashes of files as the kernel has them: addresses of slabs, small numbers.
fn hash(i: u64) -> u64 {
    0xffff_8880_0000_0000 + i * 1088
}

proptest! {
    #[test]
    fn what_was_met_is_never_new(hashes in prop::collection::vec(any::<u64>(), 1..200)) {
        let filter = filter();
        for hash in &hashes {
            filter.insert(*hash);
        }
        filter.thin_out();
        for hash in &hashes {
            prop_assert!(!filter.insert(*hash));
        }
    }
}

#[test]
fn nearly_all_files_of_a_guest_are_told_apart() {
    let filter = filter();
    let new = (0..2000).filter(|i| filter.insert(hash(*i))).count();
    assert!(new >= 1990, "{new}");
}

#[test]
fn a_crowded_filter_is_emptied_and_a_usual_one_is_not() {
    let filter = filter();
    for i in 0..3000 {
        filter.insert(hash(i));
    }
    filter.thin_out();
    assert!(!filter.insert(hash(7)));
    for i in 0..20_000 {
        filter.insert(hash(i));
    }
    filter.thin_out();
    assert!(filter.insert(hash(7)));
}
