// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How many mappings (VMAs, about 230 bytes of kernel memory each, and limited in number) a
//! gibibyte saved costs, when the store has its pages in the order of the files.
//!
//! Runs lie in guest memory in an order of their own. Where one touches the next, each costs a
//! mapping; with other memory between them two. What continues both in guest memory and in the
//! store is one mapping, however it was reported: runs of 64 pages are cut out of longer ones
//! here as well.

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::{Arc, Mutex};

use common::{Random, Vm, file, fill};
use pagefusion_host::engine::{ReportedRun, audit};
use pagefusion_host::store::{Group, PAGE};

const PAGES: usize = 16_384;
const BATCH: usize = 256;

/// Lengths of runs, and how many in a hundred runs have them. Assumed, not measured: to be replaced
/// by the histogram of a real guest before anything is concluded from it.
const ASSUMED: [(usize, usize); 8] = [
    (1, 32),
    (2, 14),
    (3, 9),
    (4, 14),
    (8, 12),
    (16, 14),
    (32, 3),
    (64, 2),
];

fn lengths(of: &[(usize, usize)], random: &mut Random) -> Vec<usize> {
    let hundred: Vec<usize> = of
        .iter()
        .flat_map(|&(length, count)| std::iter::repeat_n(length, count))
        .collect();
    let mut lengths = Vec::new();
    let mut rest = PAGES;
    while rest > 0 {
        let length = hundred[random.below(hundred.len())].min(rest);
        lengths.push(length);
        rest -= length;
    }
    lengths
}

/// Overlays runs of these lengths, permuted in guest memory; mappings for it.
fn mappings(group: &Arc<Mutex<Group>>, bytes: &[u8], lengths: &[usize], gap: usize) -> u64 {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    let mut random = Random(5);
    for i in (1..order.len()).rev() {
        order.swap(i, random.below(i + 1));
    }
    let mut places = vec![0; lengths.len()];
    let mut next = 0;
    for index in order {
        places[index] = next;
        next += lengths[index] + gap;
    }
    let vm = Vm::new(group, 1, next, false);
    let mut page = 0;
    let mut runs = Vec::new();
    for (&length, &place) in lengths.iter().zip(&places) {
        for i in 0..length {
            let content = &bytes[(page + i) * PAGE..][..PAGE];
            vm.ram.write_page(place + i, content);
        }
        runs.push(ReportedRun {
            file: file(1),
            page: page as u64,
            gfn: place as u64,
            pages: length as u32,
        });
        page += length;
    }
    for batch in runs.chunks(BATCH) {
        vm.sharing.share(batch);
    }
    let found = audit(&vm.sharing).expect("an audit");
    assert_eq!(found.intact, PAGES as u64);
    found.overlay_mappings
}

fn main() {
    let group = Arc::new(Mutex::new(Group::anonymous().expect("a store")));
    let bytes = Random(1).bytes(PAGES * PAGE);
    let _held = fill(&group, file(1), &bytes);
    let per_gib = |mappings: u64| mappings * (1 << 30) / (PAGES * PAGE) as u64;
    println!(
        "| runs of pages | mappings per GiB saved, runs touching | with other memory between |"
    );
    println!("|---|---|---|");
    let fixed = [1, 4, 16, 64, 512].map(|run| (run.to_string(), vec![(run, 100)]));
    let mixed = ("mixed (assumed lengths)".to_owned(), ASSUMED.to_vec());
    for (name, distribution) in fixed.into_iter().chain([mixed]) {
        let lengths = lengths(&distribution, &mut Random(7));
        let [touching, apart] = [0, 1].map(|gap| mappings(&group, &bytes, &lengths, gap));
        println!("| {name} | {} | {} |", per_gib(touching), per_gib(apart));
    }
}
