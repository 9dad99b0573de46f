// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is logged of that which guests can do as often as they like.

mod common;

use std::cell::RefCell;
use std::sync::{Arc, Mutex};

use common::Vm;
use common::guest_side::Shared;
use log::{LevelFilter, Log, Metadata, Record};
use pagefusion_host::engine::Guest;
use pagefusion_host::protocol::EngineStatus;
use pagefusion_host::store::Group;

thread_local! {
    /// What this thread has logged.
    static LOGGED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        LOGGED.with_borrow_mut(|logged| logged.push(record.args().to_string()));
    }

    fn flush(&self) {}
}

#[test]
fn a_guest_that_breaks_its_ring_again_and_again_is_logged_less_and_less_often() {
    log::set_logger(&Logger).unwrap();
    log::set_max_level(LevelFilter::Warn);
    let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
    let vm = Vm::new(&group, 1, 1, false);
    let shared = Shared::new();
    let mut guest = Guest::new(&shared.words[..], shared.layout, 77, 1024);
    let mut logged = Vec::new();
    for times in 1..=9 {
        shared.attach(times);
        shared.set_head(shared.layout.ring_slots + 1);
        while guest.progress(&vm.sharing).busy {}
        for line in LOGGED.take() {
            let is_this = line.contains(&format!("({times} times so far)"));
            assert!(
                is_this && line.contains("ignored until it attaches again"),
                "{line}"
            );
            logged.push(times);
        }
    }
    assert_eq!(logged, [1, 2, 4, 8]);
    let mut status = EngineStatus::default();
    guest.fill_status(&mut status);
    assert_eq!(status.guest_errors, 9);
}
