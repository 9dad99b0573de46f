// SPDX-License-Identifier: GPL-2.0

use crate::policy::{
    backoff_passes, may_load, most_in_flight, poll_ms, Moment, Schedule, ATTACH_POLL_MS, POLL_MS,
};
use proptest::prelude::*;

/// What happens to a schedule.
#[derive(Clone, Copy, Debug)]
enum Event {
    PassEnded(bool),
    Hurry,
    News,
    Rest,
    Due(u64),
    Nothing,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => any::<bool>().prop_map(Event::PassEnded),
        1 => Just(Event::Hurry),
        2 => Just(Event::News),
        1 => Just(Event::Rest),
        1 => (0..5000_u64).prop_map(Event::Due),
        3 => Just(Event::Nothing),
    ]
}

proptest! {
    /// Whatever happens in whatever order: nothing is looked for more often than the operator
    /// allows or while memory is short, and nothing is left for longer than the longest sleep.
    #[test]
    fn a_pass_is_neither_too_early_nor_too_late(
        events in prop::collection::vec((event(), 0..4000_u64), 1..100),
        sleep in 10..3000_u64,
        most in 10..20_000_u64,
    ) {
        let mut schedule = Schedule::new();
        // Until when memory being short puts a pass off, which it does once for each.
        let (mut now, mut ended, mut rested, mut may_rest) = (0, None, None, true);
        // What may cut the sleep short since the last pass, and when the pass is due by that.
        let (mut hurried, mut due) = (false, u64::MAX);
        for (event, after) in events {
            now += after;
            match event {
                Event::PassEnded(news) => {
                    schedule.pass_ended(now, news, sleep, most);
                    (ended, hurried, due) = (Some(now), false, u64::MAX);
                    may_rest = true;
                }
                Event::Hurry => {
                    schedule.hurry();
                    hurried = true;
                }
                Event::News => {
                    schedule.news(now);
                    due = due.min((now + 100).max(ended.map_or(0, |ended| ended + sleep)));
                }
                Event::Rest => {
                    schedule.rest(now);
                    if may_rest {
                        rested = Some(now + 10_000);
                    }
                    may_rest = false;
                }
                Event::Due(ms) => {
                    schedule.due_in(now, ms);
                    due = due.min(now + ms);
                }
                Event::Nothing => {}
            }
            let at = now + schedule.wait_ms(now);
            let resting = rested.unwrap_or(0);
            prop_assert!(at >= resting);
            let Some(ended) = ended else {
                prop_assert_eq!(at, now.max(resting));
                continue;
            };
            if hurried {
                prop_assert_eq!(at, now.max(resting));
            } else {
                prop_assert!(at >= (ended + sleep).min(due).max(resting));
                let latest = (ended + most.max(sleep)).min(due);
                prop_assert!(at <= latest.max(resting).max(now), "{at} and not {latest} at {now}");
            }
        }
    }
}

#[test]
fn a_confidential_guest_is_told_why() {
    assert_eq!(may_load(false), Ok(()));
    assert!(may_load(true).is_err_and(|why| why.contains("SEV, TDX")));
}

#[test]
fn what_is_due_earlier_is_not_put_off() {
    let mut schedule = Schedule::new();
    schedule.pass_ended(1000, true, 500, 5000);
    schedule.due_in(1000, 700);
    assert_eq!(schedule.wait_ms(1000), 500);
    schedule.due_in(1000, 200);
    assert_eq!(schedule.wait_ms(1000), 200);
}

#[test]
fn a_kernel_that_wants_memory_all_the_time_does_not_end_all_passes() {
    let mut schedule = Schedule::new();
    let mut passes = 0;
    for now in (0..60_000).step_by(100) {
        schedule.rest(now);
        if schedule.wait_ms(now) == 0 {
            schedule.pass_ended(now, true, 500, 5000);
            passes += 1;
        }
    }
    assert!(passes >= 5, "{passes} passes in a minute");
}

#[test]
fn nothing_is_older_than_it_is() {
    let far = (u64::from(u32::MAX) << 6) - 1;
    for now in [0, 1, 63, 64, 1000, 1_000_000, far] {
        let moment = Moment::at(now);
        for age in [0, 1, 64, 1000, 3_600_000] {
            let left = moment.until_age(age, now);
            assert!(left >= age && left <= age + 64, "{now} {age} {left}");
            assert_eq!(moment.until_age(age, now + left), 0);
        }
    }
}

#[test]
fn idle_passes_back_off_to_the_limit_and_news_ends_that() {
    let mut schedule = Schedule::new();
    assert_eq!(schedule.wait_ms(0), 0);
    schedule.pass_ended(100, true, 10, 35);
    assert_eq!(schedule.wait_ms(100), 10);
    schedule.pass_ended(110, false, 10, 35);
    assert_eq!(schedule.wait_ms(110), 20);
    schedule.pass_ended(130, false, 10, 35);
    assert_eq!(schedule.wait_ms(130), 35);
    for _ in 0..100 {
        schedule.pass_ended(130, false, 10, 35);
    }
    assert_eq!(schedule.wait_ms(130), 35);
    schedule.pass_ended(130, true, 10, 35);
    assert_eq!(schedule.wait_ms(130), 10);
    schedule.hurry();
    assert_eq!(schedule.wait_ms(130), 0);
}

#[test]
fn a_knob_holds_at_once_and_sleeps_stay_long() {
    let mut schedule = Schedule::new();
    for now in [100, 200, 300] {
        schedule.pass_ended(now, false, 10, 1000);
    }
    assert_eq!(schedule.wait_ms(300), 80);
    schedule.knob_written();
    assert_eq!(schedule.wait_ms(310), 0);
    schedule.pass_ended(320, false, 10, 1000);
    assert_eq!(schedule.wait_ms(320), 160);
}

#[test]
fn a_limit_below_the_sleep_does_not_shorten_it() {
    let mut schedule = Schedule::new();
    schedule.pass_ended(0, false, 1000, 10);
    assert_eq!(schedule.wait_ms(0), 1000);
}

#[test]
fn numbers_at_their_limits() {
    assert_eq!(most_in_flight(0, 0, 0), 1);
    assert_eq!(most_in_flight(u64::MAX, 8192, u64::MAX), 8192);
    assert_eq!(most_in_flight(4096, 8192, 16_000), 1000);
    assert_eq!(most_in_flight(4096, 1, 1 << 20), 1);
    assert_eq!(backoff_passes(0), 1);
    assert_eq!(backoff_passes(u8::MAX), 64);
    let mut schedule = Schedule::new();
    for _ in 0..40 {
        schedule.pass_ended(u64::MAX / 2, false, 3_600_000, 3_600_000);
    }
    assert_eq!(schedule.wait_ms(u64::MAX / 2), 3_600_000);
}

#[test]
fn a_new_file_ends_a_long_sleep_but_not_the_shortest() {
    let mut schedule = Schedule::new();
    schedule.pass_ended(10_000, false, 1000, 60_000);
    assert_eq!(schedule.wait_ms(10_000), 2000);
    schedule.news(10_000);
    assert_eq!(schedule.wait_ms(10_000), 1000);
    // It was a long time ago: at once, but not before the rest of it was touched.
    schedule.pass_ended(20_000, false, 1000, 60_000);
    schedule.pass_ended(22_000, false, 1000, 60_000);
    schedule.pass_ended(26_000, false, 1000, 60_000);
    assert_eq!(schedule.wait_ms(31_000), 3000);
    schedule.news(31_000);
    assert_eq!(schedule.wait_ms(31_000), 100);
    // More of them do not put it off.
    schedule.news(31_050);
    assert_eq!(schedule.wait_ms(31_050), 50);
    // The sleeps begin anew.
    schedule.pass_ended(31_100, false, 1000, 60_000);
    assert_eq!(schedule.wait_ms(31_100), 2000);
}

#[test]
fn after_memory_was_short_nothing_hurries() {
    let mut schedule = Schedule::new();
    schedule.rest(1000);
    schedule.hurry();
    schedule.news(1000);
    assert_eq!(schedule.wait_ms(1000), 10_000);
    assert_eq!(schedule.wait_ms(11_000), 0);
}

#[test]
fn without_interrupts_a_silent_host_is_looked_at_less_and_less() {
    assert_eq!(poll_ms(true, 0), POLL_MS);
    assert_eq!(poll_ms(true, 400), 100);
    assert_eq!(poll_ms(true, u64::MAX), ATTACH_POLL_MS);
    assert!(
        poll_ms(false, 0) >= 5_000,
        "nothing is waited for: every look is a waste"
    );
}
