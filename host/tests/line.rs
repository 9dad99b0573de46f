// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What an engine is to be asked is asked, in every order in which connections, their threads and
//! those who ask may run.
//!
//! `loom` goes through all executions that the memory model allows with at most three
//! preemptions, or two where there are many.

use line::{Inbox, Line, MAX_REPORTS, Reports, Work};
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use std::sync::Arc;

/// Loom's own channel does not tell a receiver that all senders have gone.
mod channel {
    use loom::sync::{Condvar, Mutex};
    use std::collections::VecDeque;
    use std::sync::Arc;
    use std::sync::mpsc::{RecvError, SendError};

    struct State<T> {
        queue: VecDeque<T>,
        has_sender: bool,
        has_receiver: bool,
    }

    struct Shared<T> {
        state: Mutex<State<T>>,
        changed: Condvar,
    }

    pub(crate) struct Sender<T>(Arc<Shared<T>>);
    pub(crate) struct Receiver<T>(Arc<Shared<T>>);

    pub(crate) fn channel<T>() -> (Sender<T>, Receiver<T>) {
        let state = Mutex::new(State {
            queue: VecDeque::new(),
            has_sender: true,
            has_receiver: true,
        });
        let changed = Condvar::new();
        let shared = Arc::new(Shared { state, changed });
        (Sender(shared.clone()), Receiver(shared))
    }

    impl<T> Sender<T> {
        pub(crate) fn send(&self, value: T) -> Result<(), SendError<T>> {
            let mut state = self.0.state.lock().unwrap();
            if !state.has_receiver {
                return Err(SendError(value));
            }
            state.queue.push_back(value);
            self.0.changed.notify_one();
            Ok(())
        }
    }

    impl<T> Receiver<T> {
        pub(crate) fn recv(&self) -> Result<T, RecvError> {
            let mut state = self.0.state.lock().unwrap();
            loop {
                if let Some(value) = state.queue.pop_front() {
                    return Ok(value);
                }
                if !state.has_sender {
                    return Err(RecvError);
                }
                state = self.0.changed.wait(state).unwrap();
            }
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            self.0.state.lock().unwrap().has_sender = false;
            self.0.changed.notify_one();
        }
    }

    impl<T> Drop for Receiver<T> {
        fn drop(&mut self) {
            let mut state = self.0.state.lock().unwrap();
            state.has_receiver = false;
            let left = std::mem::take(&mut state.queue);
            drop(state);
            drop(left);
        }
    }
}

mod primitives {
    pub(crate) use super::channel::{Receiver, Sender, channel};
    pub(crate) use loom::sync::atomic::{AtomicBool, Ordering};
    pub(crate) use loom::sync::{Mutex, MutexGuard};
    pub(crate) use loom::thread::{Builder, JoinHandle, ThreadId, current};
}
#[path = "../src/daemon/line.rs"]
mod line;

struct Pause;

/// An engine, as far as it has answered.
#[derive(Default)]
struct Engine {
    reported: Vec<usize>,
    paused: bool,
}

/// Tells that a connection has ended.
struct End(Arc<AtomicBool>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn end() -> End {
    End(Arc::new(AtomicBool::new(false)))
}

/// Serves as the daemon does. The engine answers `answers` times, and is then gone.
fn serve(inbox: &Inbox<Pause, usize>, engine: &Mutex<Engine>, answers: usize) {
    let mut left = answers;
    while let Some(work) = inbox.next() {
        if left == 0 {
            if let Work::Report(reports) = work {
                inbox.put_back(reports);
            }
            return;
        }
        left -= 1;
        let mut engine = engine.lock().unwrap();
        match work {
            Work::Ask(Pause) => engine.paused = true,
            Work::Report(Reports::Spans(spans)) => engine.reported.extend(spans),
            Work::Report(Reports::Everything) => engine.paused = false,
        }
    }
}

fn check(preemptions: usize, play: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(play);
}

/// A line, and the engine at its other end.
#[derive(Clone)]
struct Scene {
    line: Arc<Line<Pause, usize, End>>,
    engine: Arc<Mutex<Engine>>,
}

impl Scene {
    fn new() -> Self {
        Self {
            line: Arc::new(Line::new()),
            engine: Arc::default(),
        }
    }

    /// A connection on which the engine answers so many times.
    fn connect(&self, answers: usize) -> thread::JoinHandle<()> {
        let engine = self.engine.clone();
        let serve = move |inbox: &Inbox<_, _>| serve(inbox, &engine, answers);
        self.line.connect(end(), serve).unwrap()
    }

    /// By a thread of its own.
    fn report(&self, spans: Vec<usize>) -> thread::JoinHandle<()> {
        let line = self.line.clone();
        thread::spawn(move || line.report(spans))
    }

    /// What the engine was told when both of these have come to their end.
    fn reported(
        &self,
        reporter: thread::JoinHandle<()>,
        serving: thread::JoinHandle<()>,
    ) -> Vec<usize> {
        reporter.join().unwrap();
        self.line.disconnect();
        serving.join().unwrap();
        let mut reported = self.engine.lock().unwrap().reported.clone();
        reported.sort_unstable();
        reported
    }
}

#[test]
fn what_one_connection_cannot_ask_for_another_does() {
    // Four threads: with three, it takes longer than all others together.
    check(2, || {
        let scene = Scene::new();
        scene.line.report(vec![1]);
        let one = scene.connect(0);
        let reporter = scene.report(vec![2]);
        let other = scene.connect(usize::MAX);
        reporter.join().unwrap();
        assert_eq!(scene.reported(one, other), [1, 2]);
    });
}

#[test]
fn what_is_reported_before_an_engine_is_there_is_asked_for_when_it_is() {
    check(3, || {
        let scene = Scene::new();
        let reporter = scene.report(vec![1]);
        let serving = scene.connect(usize::MAX);
        assert_eq!(scene.reported(reporter, serving), [1]);
    });
}

#[test]
fn what_is_reported_while_an_engine_answers_is_asked_for_as_well() {
    check(3, || {
        let scene = Scene::new();
        let serving = scene.connect(usize::MAX);
        let reporter = scene.report(vec![2]);
        scene.line.report(vec![1]);
        assert_eq!(scene.reported(reporter, serving), [1, 2]);
    });
}

#[test]
fn who_is_paused_stays_so_whatever_is_to_be_reported() {
    check(3, || {
        let scene = Scene::new();
        let serving = scene.connect(usize::MAX);
        let reporter = scene.report(vec![0; MAX_REPORTS + 1]);
        scene.line.set_paused(true);
        assert!(scene.line.ask(Pause));
        scene.reported(reporter, serving);
        assert!(scene.engine.lock().unwrap().paused);
    });
}

#[test]
fn an_engine_that_is_greeted_can_be_asked_and_one_that_is_given_up_is_told() {
    check(3, || {
        let line = Arc::new(Line::<Pause, usize, End>::new());
        let asking = line.clone();
        let end = end();
        let has_ended = end.0.clone();
        let greet = move |_: &Inbox<_, _>| assert!(asking.ask(Pause));
        let serving = line.connect(end, greet).unwrap();
        serving.join().unwrap();
        assert!(has_ended.load(Ordering::SeqCst));
        assert!(!line.ask(Pause));
    });
}
