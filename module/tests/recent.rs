// SPDX-License-Identifier: GPL-2.0

use crate::ranges::Range;
use crate::recent::Recent;
use proptest::prelude::*;
use std::collections::HashSet;

proptest! {
    #[test]
    fn only_what_was_noted_is_known(
        ops in prop::collection::vec((any::<bool>(), 0..60_usize, 0..40_u64, 0..3_u64), 0..2000),
    ) {
        let (mut recent, mut noted) = (Recent::new(), HashSet::new());
        let mut known = 0;
        for (note, key, start, pages) in ops {
            let (key, range) = (key * 64, Range { start, end: start + pages });
            if note {
                recent.note(key, range);
                noted.insert((key, start, pages));
                prop_assert_eq!(recent.knows(key, range), pages != 0);
            } else if recent.knows(key, range) {
                prop_assert!(noted.contains(&(key, start, pages)));
                known += 1;
            }
        }
        prop_assert!(known > 0 || noted.len() < 1000);
    }
}

#[test]
fn neither_many_ranges_of_a_file_nor_many_files_get_in_each_others_way() {
    let of_a_file = |i: u64| (0xffff_8880_0123_4560_usize, i * 128);
    let of_many_files = |i: u64| (0xffff_8880_0123_4560_usize + i as usize * 1096, 0);
    for item in [of_a_file as fn(u64) -> (usize, u64), of_many_files] {
        let mut recent = Recent::new();
        let range = |start| Range {
            start,
            end: start + 128,
        };
        for (key, start) in (0..128).map(item) {
            recent.note(key, range(start));
        }
        let known = (0..128)
            .map(item)
            .filter(|&(key, start)| recent.knows(key, range(start)));
        let known = known.count();
        assert!(known >= 100, "only {known} of 128 are still known");
    }
}
