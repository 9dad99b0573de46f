// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An engine keeps to what was noted last, in every order in which those who note something and
//! the engine that connects may run.
//!
//! `loom` goes through all executions that the memory model allows with at most three
//! preemptions.

use loom::sync::{Arc, Mutex};
use loom::thread;
use word::Word;

mod primitives {
    pub(crate) use loom::sync::Mutex;
}
#[allow(dead_code, reason = "each test uses a part of it")]
#[path = "../src/daemon/word.rs"]
mod word;

/// How an engine can be reached.
enum Link {
    Nobody,
    /// The connection of an engine that has gone, and nobody has noticed.
    Dead,
    /// What is queued for it.
    Alive(Vec<u8>),
}

/// A VM as the daemon sees it.
struct Vm {
    noted: Mutex<u8>,
    word: Word<u8>,
    link: Mutex<Link>,
}

impl Vm {
    fn new(link: Link) -> Arc<Self> {
        Arc::new(Self {
            noted: Mutex::new(0),
            word: Word::new(0),
            link: Mutex::new(link),
        })
    }

    fn noted(&self) -> u8 {
        *self.noted.lock().unwrap()
    }

    fn ask(&self, what: u8) -> Option<()> {
        match &mut *self.link.lock().unwrap() {
            Link::Nobody => None,
            Link::Dead => Some(()),
            Link::Alive(queue) => {
                queue.push(what);
                Some(())
            }
        }
    }

    /// An operator, who has the engine told in any case, or only what is new to it.
    fn order(&self, what: u8, again: bool) {
        *self.noted.lock().unwrap() = what;
        if again {
            self.word.tell_again(|| self.noted(), |it| self.ask(it));
        } else {
            self.word.tell(|| self.noted(), |it| self.ask(it));
        }
    }

    /// An engine that has lost its connections makes them anew; what it was welcomed with.
    fn connect(&self) -> u8 {
        let welcome = self.word.welcome(|| self.noted());
        self.word
            .begin(|| *self.link.lock().unwrap() = Link::Alive(Vec::new()));
        self.word.tell(|| self.noted(), |it| self.ask(it));
        welcome
    }

    /// What an engine that was welcomed with this keeps to in the end.
    fn kept_to(&self, welcome: u8) -> u8 {
        match &*self.link.lock().unwrap() {
            Link::Alive(queue) => queue.last().copied().unwrap_or(welcome),
            _ => welcome,
        }
    }
}

fn check(play: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(play);
}

#[test]
fn of_two_operators_the_last_one_has_his_way() {
    for again in [true, false] {
        check(move || {
            let vm = Vm::new(Link::Alive(Vec::new()));
            let other = {
                let vm = vm.clone();
                thread::spawn(move || vm.order(2, again))
            };
            vm.order(1, again);
            vm.order(0, again);
            other.join().unwrap();
            assert_eq!(vm.kept_to(0), vm.noted());
        });
    }
}

#[test]
fn an_engine_that_connects_hears_of_what_is_changed_meanwhile() {
    for (again, is_noticed) in [(true, true), (true, false), (false, true), (false, false)] {
        for orders in [[1, 0], [1, 2]] {
            check(move || {
                let vm = Vm::new(if is_noticed { Link::Nobody } else { Link::Dead });
                let operator = {
                    let vm = vm.clone();
                    thread::spawn(move || orders.map(|it| vm.order(it, again)))
                };
                let welcome = vm.connect();
                operator.join().unwrap();
                assert_eq!(vm.kept_to(welcome), vm.noted());
            });
        }
    }
}
