// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Every thread that waits for a page is let go on, in every order in which the thread that
//! hears of faults and two that lock guest memory may run and see each other's writes.
//!
//! `loom` goes through all executions that the memory model allows with at most three
//! preemptions.

use loom::sync::{Arc, Mutex};
use loom::thread;
use std::sync::TryLockError;
use waiters::Waiters;

mod primitives {
    pub(crate) use loom::sync::Mutex;
    pub(crate) use loom::sync::atomic::AtomicBool;
    pub(crate) use std::sync::atomic::Ordering;
}
#[path = "../src/engine/waiters.rs"]
mod waiters;

/// Guest memory and its lock, as `Sharing` has them.
struct Sharing {
    /// Who has been let go on.
    memory: Mutex<Vec<usize>>,
    waiters: Waiters,
}

impl Sharing {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            memory: Mutex::new(Vec::new()),
            waiters: Waiters::new(),
        })
    }

    /// Somebody else who wants to work on guest memory.
    fn lock(&self) {
        let mut memory = self.memory.lock().unwrap();
        memory.extend(self.waiters.take());
    }

    /// A fault, and what the thread that heard of it does then. That it tries again after a
    /// while is for when nobody else comes.
    fn fault(&self, address: usize) {
        self.waiters.add(address);
        if self.waiters.any() {
            match self.memory.try_lock() {
                Ok(mut memory) => memory.extend(self.waiters.take()),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Poisoned(_)) => panic!("a thread panicked"),
            }
        }
    }

    /// Whoever has not been let go on is still announced, and found by the next one.
    fn end(&self, mut expected: Vec<usize>) {
        if self.waiters.any() {
            self.lock();
        }
        let mut released = self.memory.lock().unwrap().clone();
        released.sort_unstable();
        expected.sort_unstable();
        assert_eq!(released, expected);
    }
}

fn check(play: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(play);
}

#[test]
fn whoever_waits_is_let_go_on_once_by_one_of_two() {
    check(|| {
        let sharing = Sharing::new();
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let sharing = Arc::clone(&sharing);
                thread::spawn(move || sharing.lock())
            })
            .collect();
        sharing.fault(0x1000);
        sharing.fault(0x2000);
        workers.into_iter().for_each(|it| it.join().unwrap());
        sharing.end(vec![0x1000, 0x2000]);
    });
}

#[test]
fn nobody_is_lost_when_two_hear_of_faults() {
    check(|| {
        let sharing = Sharing::new();
        let other = {
            let sharing = Arc::clone(&sharing);
            thread::spawn(move || sharing.fault(0x2000))
        };
        sharing.fault(0x1000);
        sharing.lock();
        other.join().unwrap();
        sharing.end(vec![0x1000, 0x2000]);
    });
}
