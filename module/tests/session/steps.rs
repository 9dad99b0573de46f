// SPDX-License-Identifier: GPL-2.0

//! What is expected of a session, step by step.

use super::host::{Held, Host, Shared};
use super::{attached, report, session};
use crate::policy;
use crate::ranges::Range;
use crate::ring::State;
use crate::runs::PinnedRun;
use crate::session::{Refusal, Session, Why};
use crate::wire::{self, guest_area, FileIdentity, Request};

#[test]
fn the_whole_way() {
    let (shared, held) = (Shared::new(), Held::default());
    let (mut host, mut session) = (Host::new(&shared), session(&shared));
    let range = Range { start: 0, end: 100 };
    session.service(0);
    assert_eq!(session.ring().state(), State::Attaching);
    assert_eq!(report(&mut session, &held, 64, range, 500), 0);
    host.attach();
    assert!(session.service(0).wants_pass);
    session.begin_pass();
    assert_eq!(report(&mut session, &held, 64, range, 500), 100);
    assert_eq!(session.end_pass(1, 100), Ok(true));
    assert_eq!(held.total(), 100);
    assert!(session.ask_to_be_woken(true));
    host.claim(&held);
    host.acknowledge(false);
    assert!(!session.ask_to_be_woken(true));
    session.service(1);
    assert_eq!((held.total(), session.totals.remembered), (0, 100));

    // Nothing new, nothing said.
    let doorbells = shared.doorbells.get();
    session.begin_pass();
    assert_eq!(report(&mut session, &held, 64, range, 500), 0);
    assert_eq!(session.end_pass(2, 100), Ok(false));
    assert_eq!(shared.doorbells.get(), doorbells);

    // The host asks for a part.
    host.request(Request::Report {
        file: 0,
        page: 10,
        pages: 5,
    });
    assert!(session.service(2).wants_pass);
    session.begin_pass();
    assert_eq!(report(&mut session, &held, 64, range, 500), 5);
    session.publish();
    host.claim(&held);
    host.acknowledge(true);
    session.service(3);
    assert_eq!(session.totals.refused, 5);

    // Refused pages come again after a pass or more, less and less often.
    let mut tries = Vec::new();
    for pass in 0..100 {
        session.begin_pass();
        if report(&mut session, &held, 64, range, 500) != 0 {
            tries.push(pass);
        }
        session.publish();
        host.claim(&held);
        host.acknowledge(true);
        session.service(4);
    }
    assert!(tries.len() >= 4 && tries.len() <= 8, "{tries:?}");

    // Unloading.
    session.say_goodbye();
    assert!(!session.is_settled());
    host.claim(&held);
    host.acknowledge(false);
    assert!(session.is_settled());
    session.leave();
    assert_eq!(host.guest(guest_area::STATE), wire::guest_state::ABSENT);
}

#[test]
fn refused_pages_come_again_though_others_of_the_file_were_accepted_since() {
    let (_, held, mut host, mut session) = attached();
    let (refused, accepted) = (Range { start: 0, end: 5 }, Range { start: 10, end: 15 });
    let mut pass = |session: &mut Session<_, _>, range, frame, refuse| {
        let number = session.begin_pass();
        let reported = report(session, &held, 64, range, frame);
        if let Some(id) = session.tracker.find(64) {
            session.tracker.touch(id, number);
        }
        session.publish();
        host.claim(&held);
        host.acknowledge(refuse);
        session.service(1);
        assert!(session.end_pass(1, 10).is_ok());
        reported
    };
    assert_eq!(pass(&mut session, refused, 500, true), 5);
    assert_eq!(pass(&mut session, accepted, 900, false), 5);
    let again: Vec<_> = (0..6)
        .map(|_| pass(&mut session, refused, 500, false))
        .collect();
    assert_eq!(again.iter().sum::<u64>(), 5, "{again:?}");
    let id = session.tracker.find(64).expect("a file");
    session.begin_pass();
    assert!(!session.retries(id), "nothing is refused any more");
}

#[test]
fn pages_of_a_file_that_is_withdrawn_are_counted() {
    let (_, held, _, mut session) = attached();
    report(&mut session, &held, 64, Range { start: 0, end: 7 }, 500);
    let id = session.tracker.find(64).expect("a file");
    assert_eq!(session.retire(id, Why::Gone), Ok(()));
    assert_eq!(session.totals.retracted, 7);
}

#[test]
fn whoever_has_said_goodbye_is_woken_by_the_answer() {
    let (_, held, mut host, mut session) = attached();
    host.claim(&held);
    host.acknowledge(false);
    session.service(0);
    session.say_goodbye();
    assert!(session.ask_to_be_woken(true));
    let asked = host.guest(guest_area::NOTIFY_AT);
    assert_eq!(asked, host.guest(guest_area::HEAD));
}

#[test]
fn a_full_ring_and_a_full_house_say_busy() {
    let (_, held, mut host, mut session) = attached();
    let id = session.tracker.add(64, 0).expect("room");
    session
        .announce(id, FileIdentity::default(), &[])
        .expect("room");
    let mut reported = 0;
    loop {
        let pin = held.hold(reported, 1);
        match session.report(
            id,
            PinnedRun {
                page: reported * 2,
                frame: reported,
                pages: 1,
                pin,
            },
        ) {
            Ok(()) => reported += 1,
            Err((refusal, _)) => {
                assert_eq!(refusal, Refusal::Busy);
                break;
            }
        }
    }
    // Hello takes one slot, the file three.
    assert_eq!(reported, host.layout.ring_slots - 4);
    session.publish();
    host.claim(&held);
    host.acknowledge(false);
    session.service(0);
    assert_eq!(held.total(), 0);
    let pin = held.hold(9, 4096);
    assert!(session
        .report(
            id,
            PinnedRun {
                page: 0,
                frame: 9,
                pages: 4096,
                pin
            }
        )
        .is_ok());
    let pin = held.hold(0, 1);
    let refused = session.report(
        id,
        PinnedRun {
            page: 9999,
            frame: 0,
            pages: 1,
            pin,
        },
    );
    assert_eq!(
        refused.err().map(|(refusal, _)| refusal),
        Some(Refusal::Busy)
    );
}

#[test]
fn a_host_that_stalls_loses_what_it_has_not_claimed() {
    let (_, held, mut host, mut session) = attached();
    let range = Range { start: 0, end: 10 };
    report(&mut session, &held, 64, range, 500);
    session.publish();
    host.claim(&held);
    report(&mut session, &held, 128, range, 900);
    session.publish();
    session.service(1);
    assert_eq!(held.total(), 20);
    session.service(policy::STALL_MS + 2);
    assert!(matches!(session.ring().state(), State::Revoked { .. }));
    assert!(held.is_held(500) && !held.is_held(900));
    assert!(!session.is_settled());
    host.acknowledge(false);
    assert!(session.is_settled());
    assert_eq!(held.total(), 0);
}

#[test]
fn an_answer_is_owed_by_who_is_there_and_does_not_stand_still() {
    let (shared, held) = (Shared::new(), Held::default());
    let (mut host, mut session) = (Host::new(&shared), session(&shared));
    assert!(!session.is_owed());
    session.service(0);
    host.attach();
    session.service(0);
    // It has not answered the greeting, but that holds no page.
    assert!(!session.is_owed());
    let range = Range { start: 0, end: 10 };
    let again = |session: &mut _, key| {
        assert_eq!(report(session, &held, key, range, 500), 10);
        session.publish();
        assert!(session.is_owed());
    };

    again(&mut session, 64);
    host.claim(&held);
    assert!(session.is_owed());
    host.acknowledge(false);
    assert!(!session.is_owed());

    again(&mut session, 128);
    host.claim(&held);
    session.revoke();
    assert!(!session.is_owed());
    assert!(held.is_held(500));
    host.acknowledge(false);
    session.service(1);
    host.attach();
    session.service(2);

    again(&mut session, 192);
    shared.set(host.layout.host_area, 0);
    assert!(!session.is_owed());
}

#[test]
fn memory_is_given_back_of_files_that_no_whole_pass_has_found_since() {
    let (_, held, _, mut session) = attached();
    let range = Range { start: 0, end: 10 };
    let pass = |session: &mut Session<_, _>, keys: &[usize], is_whole| {
        let number = session.begin_pass();
        for &key in keys {
            report(session, &held, key, range, 500);
            let id = session.tracker.find(key).expect("reported");
            session.tracker.touch(id, number);
        }
        if is_whole {
            session.end_pass(1, 10).expect("room");
        }
    };
    pass(&mut session, &[64, 128], true);
    // One that was interrupted says nothing of what it has not come to.
    pass(&mut session, &[64], false);
    session.shrink(0);
    assert_eq!(session.tracker.files(), 2);
    pass(&mut session, &[64], true);
    session.shrink(0);
    assert_eq!(session.tracker.files(), 1);
    assert_eq!(session.tracker.find(128), None);
}

/// As after a kernel that has attached, too, has woken this one from the disk of the same machine.
#[test]
fn a_memory_that_another_kernel_has_used_is_attached_to_anew() {
    let (shared, held, mut host, mut session) = attached();
    let range = Range { start: 0, end: 10 };
    report(&mut session, &held, 64, range, 500);
    session.publish();
    assert!(!session.is_settled());

    let mut other = self::session(&shared);
    other.service(0);
    host.attach();
    other.service(0);

    assert!(session.is_settled());
    assert!(session.service(1).restarted);
    assert_eq!((held.total(), session.tracker.files()), (0, 0));
    host.attach();
    assert!(session.service(2).wants_pass);
    assert!(session.is_open());
}

#[test]
fn withdrawing_ends_when_the_host_has_undone_everything() {
    let (shared, held) = (Shared::new(), Held::default());
    let (mut host, mut session) = (Host::new(&shared), session(&shared));
    session.service(0);
    // A host that has not answered yet may share from the time before.
    assert!(!session.withdraw());
    host.attach();
    session.service(0);
    let range = Range { start: 0, end: 10 };
    assert_eq!(report(&mut session, &held, 64, range, 500), 10);
    session.publish();
    assert!(!session.is_leaving());
    assert!(!session.withdraw());
    session.service(1);
    assert!(!session.withdraw());
    // There is no way back: the host will have forgotten what was reported.
    assert!(session.is_leaving());
    assert!(held.is_held(500));
    host.claim(&held);
    host.acknowledge(false);
    session.service(2);
    assert!(session.withdraw());
    assert_eq!((held.total(), session.tracker.files()), (0, 0));
    assert_eq!(host.guest(guest_area::STATE), wire::guest_state::ABSENT);

    assert!(!session.is_leaving());

    // It attaches anew, and a host that is gone needs nothing.
    session.service(3);
    host.attach();
    assert!(session.service(3).wants_pass);
    assert_eq!(report(&mut session, &held, 64, range, 500), 10);
    session.publish();
    shared.set(host.layout.host_area, 0);
    session.service(4);
    assert!(session.withdraw());
    assert_eq!(held.total(), 0);
}
