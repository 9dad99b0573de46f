// SPDX-License-Identifier: GPL-2.0

use crate::runs::{Pin, PinnedRun, RunBuilder};
use proptest::prelude::*;

struct Frames(Vec<u64>);

impl Pin for Frames {
    fn join(&mut self, mut next: Self) {
        self.0.append(&mut next.0);
    }
}

proptest! {
    #[test]
    fn runs_hold_every_page_and_are_as_long_as_can_be(
        pieces in prop::collection::vec((0..2_u64, 0..2_u64, 1..9_u64), 0..60),
        most in 8..40_u64,
    ) {
        let mut builder = RunBuilder::new(most);
        let (mut runs, mut expected) = (Vec::new(), Vec::new());
        let (mut page, mut frame) = (0, 1000);
        for (gap, jump, pages) in pieces {
            page += gap;
            frame += gap + 10 * jump;
            expected.extend((0..pages).map(|i| (page + i, frame + i)));
            let pin = Frames((frame..frame + pages).collect());
            runs.extend(builder.push(PinnedRun { page, frame, pages, pin }));
            page += pages;
            frame += pages;
        }
        runs.extend(builder.finish());
        prop_assert!(builder.finish().is_none());
        let mut found = Vec::new();
        for run in &runs {
            prop_assert!(run.pages <= most);
            prop_assert_eq!(&run.pin.0, &(run.frame..run.frame + run.pages).collect::<Vec<_>>());
            found.extend((0..run.pages).map(|i| (run.page + i, run.frame + i)));
        }
        prop_assert_eq!(found, expected);
        for pair in runs.windows(2) {
            let follows = pair[0].page + pair[0].pages == pair[1].page
                && pair[0].frame + pair[0].pages == pair[1].frame;
            // Pieces have at most eight pages, so only a full run is followed by its neighbour.
            prop_assert!(!follows || pair[0].pages + 8 > most);
        }
    }
}
