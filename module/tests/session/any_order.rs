// SPDX-License-Identifier: GPL-2.0

//! Steps in any order, with a host that keeps to the protocol and with one that writes whatever it likes.

use super::host::{Held, Host, Shared};
use super::{report, session};
use crate::list::deny;
use crate::ranges::Range;
use crate::ring::State;
use crate::session::Why;
use crate::wire::{Layout, Request};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Report(usize, u64, u64, u64),
    Retire(usize),
    Publish,
    Service(u64),
    Pass,
    Revoke,
    Attach,
    Claim,
    Acknowledge(bool),
    Request(u32, u64, u64),
    Rescan,
    Restart,
    /// Some of the next allocations fail.
    Deny(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1..80_usize, 0..50_u64, 1..40_u64, 0..3_u64).prop_map(|(k, p, n, f)| Step::Report(k, p, n, f)),
        2 => (1..80_usize).prop_map(Step::Retire),
        4 => Just(Step::Publish),
        6 => (0..300_u64).prop_map(Step::Service),
        2 => Just(Step::Pass),
        1 => Just(Step::Revoke),
        4 => Just(Step::Attach),
        4 => Just(Step::Claim),
        4 => any::<bool>().prop_map(Step::Acknowledge),
        1 => (0..80_u32, 0..50_u64, 0..50_u64).prop_map(|(f, p, n)| Step::Request(f, p, n)),
        1 => Just(Step::Rescan),
        1 => Just(Step::Restart),
        1 => any::<u64>().prop_map(Step::Deny),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn nothing_the_host_works_on_is_let_go(steps in prop::collection::vec(step(), 0..300)) {
        let (shared, held) = (Shared::new(), Held::default());
        let (mut host, mut session) = (Host::new(&shared), session(&shared));
        let mut now = 0;
        for step in steps {
            match step {
                Step::Report(key, page, pages, choice) => {
                    let range = Range { start: page, end: page + pages };
                    let frame = key as u64 * 1000 + choice * 200_000 + page;
                    report(&mut session, &held, key * 64, range, frame);
                }
                Step::Retire(key) => {
                    if let Some(id) = session.tracker.find(key * 64) {
                        let _ = session.retire(id, Why::Gone);
                    }
                }
                Step::Publish => session.publish(),
                Step::Service(ms) => {
                    now += ms;
                    session.service(now);
                }
                Step::Pass => {
                    session.begin_pass();
                }
                Step::Revoke => session.revoke(),
                Step::Attach => host.attach(),
                Step::Claim => host.claim(&held),
                Step::Acknowledge(refuse) => host.acknowledge(refuse),
                Step::Request(file, page, pages) => host.request(Request::Report { file, page, pages }),
                Step::Rescan => host.request(Request::Rescan),
                Step::Restart => host.restart(),
                Step::Deny(allocations) => deny(allocations),
            }
            host.check(&held);
            prop_assert!(session.pages_in_flight() <= 4096);
            prop_assert_eq!(session.pages_in_flight(), held.total());
            prop_assert_eq!(session.ring().lies(), 0);
        }
        deny(0);
        // A host that answers gets the guest to let go of everything.
        for _ in 0..4 {
            session.publish();
            session.service(now);
            host.attach();
            host.claim(&held);
            host.acknowledge(false);
        }
        session.service(now);
        prop_assert_eq!(held.total(), 0);
        prop_assert_eq!(session.ring().state(), State::Attached);
        // And all that is new is reported then.
        let range = Range { start: 0, end: 10 };
        prop_assert_eq!(report(&mut session, &held, 12_345 * 64, range, 7), 10);
        prop_assert_eq!(report(&mut session, &held, 12_345 * 64, range, 7), 0);
    }

    #[test]
    fn a_host_that_writes_anything_breaks_nothing(
        steps in prop::collection::vec((step(), 0..600_usize, prop_oneof![any::<u64>(), 0..50_u64]), 0..200),
    ) {
        let (shared, held) = (Shared::new(), Held::default());
        let mut session = session(&shared);
        let layout = Layout::for_size(Layout::MIN_BYTES).expect("smallest size");
        let mut now = 0;
        for (step, at, value) in steps {
            match step {
                Step::Report(key, page, pages, choice) => {
                    let range = Range { start: page, end: page + pages };
                    report(&mut session, &held, key * 64, range, key as u64 * 1000 + choice * 200_000);
                }
                Step::Publish => session.publish(),
                Step::Revoke => session.revoke(),
                Step::Service(ms) => {
                    now += ms * 100;
                    session.service(now);
                }
                Step::Deny(allocations) => deny(allocations),
                // Every other word goes into the positions, the rest anywhere in pages it owns.
                _ if at % 2 == 0 => shared.set(layout.host_area + at as u64 / 2 % 8 * 8, value),
                _ => shared.set((layout.requests + at as u64 * 8) & !7, value),
            }
            prop_assert_eq!(session.pages_in_flight(), held.total());
        }
        deny(0);
        session.abandon();
    }
}
