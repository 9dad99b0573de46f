// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the engine's threads and the VMM's hand to each other, in every order in which they may
//! run.
//!
//! `loom` goes through all executions that the memory model allows with at most three
//! preemptions.

use connection::Held;
use loom::sync::{Arc, Mutex};
use loom::thread;
use unmapped::Unmapped;

mod primitives {
    pub(crate) use loom::sync::Mutex;
}
#[path = "../src/connection.rs"]
mod connection;
#[path = "../src/unmapped.rs"]
mod unmapped;

fn check(play: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(play);
}

#[test]
fn no_connection_is_served_on_when_the_store_has_gone() {
    check(|| {
        let held = Arc::new(Held::new());
        let has_store = Arc::new(Mutex::new(true));
        let ring = {
            let (held, has_store) = (held.clone(), has_store.clone());
            thread::spawn(move || {
                *has_store.lock().unwrap() = false;
                held.take().is_some()
            })
        };
        let is_served = held.hold((), || *has_store.lock().unwrap());
        let is_ended = ring.join().unwrap();
        assert!(is_ended || !is_served);
    });
}

#[test]
fn nothing_is_taken_for_guest_memory_that_was_unmapped_since_the_monitor_was_asked() {
    check(|| {
        let unmapped = Arc::new(Unmapped::new());
        // What there is, and what the engine has for guest memory, which is what the lock is of.
        let (mapped, known) = (Arc::new(Mutex::new(true)), Arc::new(Mutex::new(false)));
        let vmm = {
            let (unmapped, mapped, known) = (unmapped.clone(), mapped.clone(), known.clone());
            thread::spawn(move || {
                let mut known = known.lock().unwrap();
                *mapped.lock().unwrap() = false;
                *known = false;
                unmapped.note(std::slice::from_ref(&(0..4096)));
            })
        };
        unmapped.begin();
        let found = *mapped.lock().unwrap();
        {
            let mut known = known.lock().unwrap();
            *known = found && unmapped.end().is_empty();
        }
        vmm.join().unwrap();
        assert!(!*known.lock().unwrap());
    });
}
