// SPDX-License-Identifier: GPL-2.0

use crate::filter::{Met, Word, WORDS};
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

fn nothing_met() -> Met<Bits> {
    let zero = || Bits(Cell::new(0));
    Met::new(
        [const { Bits(Cell::new(0)) }; WORDS],
        [const { Bits(Cell::new(0)) }; WORDS],
        zero(),
        zero(),
        zero(),
    )
}

/// Hashes of files as the kernel has them: addresses of slabs, small numbers.
fn hash(i: u64) -> u64 {
    0xffff_8880_0000_0000 + i * 1088
}

proptest! {
    #[test]
    fn what_was_met_is_never_new(hashes in prop::collection::vec(any::<u64>(), 1..200)) {
        let met = nothing_met();
        for hash in &hashes {
            met.insert(*hash);
        }
        met.begin_pass();
        met.end_pass();
        for hash in &hashes {
            prop_assert!(!met.insert(*hash));
        }
    }
}

#[test]
fn nearly_all_files_of_a_guest_are_told_apart() {
    let met = nothing_met();
    let new = (0..8000).filter(|i| met.insert(hash(*i))).count();
    assert!(new >= 7960, "{new}");
}

#[test]
fn what_a_pass_meets_is_known_before_it_and_after_and_the_rest_is_news_again() {
    const USUAL: u64 = 12_000;
    const CROWD: u64 = 20_000;
    for (files, forgets) in [(USUAL, false), (USUAL, true), (CROWD, false)] {
        let met = nothing_met();
        for i in 0..files {
            met.insert(hash(i));
        }
        if forgets {
            met.forget();
        }
        met.begin_pass();
        assert!(!met.insert(hash(7)), "known while the pass has not met it");
        assert!(!met.insert(hash(8)), "known while the pass has not met it");
        met.end_pass();
        assert!(!met.insert(hash(7)), "the pass has met it");
        let is_usual = files == USUAL && !forgets;
        assert_eq!(met.insert(hash(9)), !is_usual, "no pass has met it");
        // Once only.
        met.begin_pass();
        met.end_pass();
        assert!(!met.insert(hash(7)));
    }
}

#[test]
fn a_pass_that_does_not_come_to_its_end_leaves_everything_known() {
    let met = nothing_met();
    met.insert(hash(7));
    met.forget();
    met.begin_pass();
    met.begin_pass();
    assert!(!met.insert(hash(7)));
}
