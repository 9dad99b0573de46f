// SPDX-License-Identifier: GPL-2.0

use crate::policy::{backoff_passes, most_in_flight, Schedule};

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
fn a_limit_below_the_sleep_does_not_shorten_it() {
    let mut schedule = Schedule::new();
    schedule.pass_ended(0, false, 1000, 10);
    assert_eq!(schedule.wait_ms(0), 1000);
}

#[test]
fn numbers_at_their_limits() {
    assert_eq!(most_in_flight(0, 0), 1);
    assert_eq!(most_in_flight(u64::MAX, u64::MAX), 8192);
    assert_eq!(most_in_flight(4096, 16_000), 1000);
    assert_eq!(backoff_passes(0), 1);
    assert_eq!(backoff_passes(u8::MAX), 64);
    let mut schedule = Schedule::new();
    for _ in 0..40 {
        schedule.pass_ended(u64::MAX / 2, false, 3_600_000, 3_600_000);
    }
    assert_eq!(schedule.wait_ms(u64::MAX / 2), 3_600_000);
}
