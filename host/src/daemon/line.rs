// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The connection by which one engine is asked, the thread that serves it, and what the engine's
//! guest is to report again: that is kept until an engine has answered, whatever connections come
//! and go meanwhile.
//!
//! `tests/line.rs` compiles this file again with `loom`'s types in place of those of
//! [`super::primitives`].

use super::primitives::{
    AtomicBool, Builder, JoinHandle, Mutex, MutexGuard, Ordering, Receiver, Sender, ThreadId,
    channel, current,
};
use std::io;
use std::sync::{Arc, PoisonError};

/// Most spans kept for an engine that is not connected or slow; where there would be more, its
/// guest is asked for everything instead.
pub(super) const MAX_REPORTS: usize = 4096;

/// For the thread of a connection.
enum Job<Q> {
    Ask(Q),
    Report,
}

/// What the thread of a connection has to do.
pub(super) enum Work<Q, S> {
    Ask(Q),
    Report(Reports<S>),
}

/// What the guest is to report again.
#[derive(Debug)]
pub(super) enum Reports<S> {
    Spans(Vec<S>),
    Everything,
}

impl<S> Reports<S> {
    fn none() -> Self {
        Self::Spans(Vec::new())
    }

    fn is_empty(&self) -> bool {
        matches!(self, Self::Spans(spans) if spans.is_empty())
    }

    fn add(&mut self, more: Self) {
        match (&mut *self, more) {
            (Self::Spans(spans), Self::Spans(more)) if spans.len() + more.len() <= MAX_REPORTS => {
                spans.extend(more);
            }
            _ => *self = Self::Everything,
        }
    }
}

/// A connection in use. Dropping `_end` ends it.
struct Link<Q, E> {
    jobs: Sender<Job<Q>>,
    /// Who serves it.
    thread: ThreadId,
    _end: E,
}

/// The daemon's end of one VM's control connection, if there is one: requests `Q`, spans `S`, and
/// what ends a connection when it is dropped, `E`.
pub(super) struct Line<Q, S, E> {
    link: Arc<Mutex<Option<Link<Q, E>>>>,
    reports: Arc<Mutex<Reports<S>>>,
    /// Whether sharing is paused, so that nothing need be reported until it goes on.
    paused: Arc<AtomicBool>,
}

/// What comes to the thread of one connection.
pub(super) struct Inbox<Q, S> {
    jobs: Receiver<Job<Q>>,
    reports: Arc<Mutex<Reports<S>>>,
    paused: Arc<AtomicBool>,
}

impl<Q, S, E> Line<Q, S, E>
where
    Q: Send + 'static,
    S: Send + 'static,
    E: Send + 'static,
{
    /// Nobody is connected.
    pub(super) fn new() -> Self {
        Self {
            link: Arc::new(Mutex::new(None)),
            reports: Arc::new(Mutex::new(Reports::none())),
            paused: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Takes a connection into use in place of the one before it, with a thread that runs `serve`.
    /// `end` is dropped when the connection is to end.
    pub(super) fn connect(
        &self,
        end: E,
        serve: impl FnOnce(&Inbox<Q, S>) + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let (jobs, receiver) = channel();
        let inbox = Inbox {
            jobs: receiver,
            reports: self.reports.clone(),
            paused: self.paused.clone(),
        };
        let held = Arc::downgrade(&self.link);
        // Until the link is there: only then may its thread end, and whoever knows that the engine
        // was greeted can ask it.
        let mut link = lock(&self.link);
        let serving = Builder::new().name("control".into()).spawn(move || {
            serve(&inbox);
            if let Some(link) = held.upgrade() {
                leave(&link);
            }
        })?;
        let thread = serving.thread().id();
        let before = link.replace(Link {
            jobs,
            thread,
            _end: end,
        });
        drop(link);
        drop(before);
        wake(&self.link);
        Ok(serving)
    }

    /// Ends the connection.
    pub(super) fn disconnect(&self) {
        let link = lock(&self.link).take();
        drop(link);
    }

    /// Whether somebody is connected, who is then asked this.
    pub(super) fn ask(&self, request: Q) -> bool {
        let mut link = lock(&self.link);
        let asked = link
            .as_ref()
            .is_some_and(|it| it.jobs.send(Job::Ask(request)).is_ok());
        if !asked {
            *link = None;
        }
        asked
    }

    /// Notes whether sharing is paused, before the engine is told.
    pub(super) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }

    /// Has the guest report these pages again, as soon as the engine listens.
    pub(super) fn report(&self, spans: Vec<S>) {
        let mut reports = lock(&self.reports);
        let begins = reports.is_empty();
        reports.add(Reports::Spans(spans));
        drop(reports);
        if begins {
            wake(&self.link);
        }
    }
}

impl<Q, S> Inbox<Q, S> {
    /// Waits for something to do; `None` when the connection is to end.
    pub(super) fn next(&self) -> Option<Work<Q, S>> {
        loop {
            match self.jobs.recv().ok()? {
                Job::Ask(request) => return Some(Work::Ask(request)),
                Job::Report => {
                    let taken = std::mem::replace(&mut *lock(&self.reports), Reports::none());
                    // An engine that goes on has its guest report everything. Whoever pauses it
                    // after this look tells it behind us.
                    let needless = match &taken {
                        Reports::Spans(spans) => spans.is_empty(),
                        Reports::Everything => self.paused.load(Ordering::SeqCst),
                    };
                    if !needless {
                        return Some(Work::Report(taken));
                    }
                }
            }
        }
    }

    /// Has the next connection ask for what this one could not. To ask twice does no harm.
    pub(super) fn put_back(&self, reports: Reports<S>) {
        lock(&self.reports).add(reports);
    }
}

fn wake<Q, E>(link: &Mutex<Option<Link<Q, E>>>) {
    if let Some(link) = &*lock(link) {
        // If the thread has ended, the next one takes the reports.
        let _ = link.jobs.send(Job::Report);
    }
}

/// The thread that calls this serves no more. The engine is told so, and connects again; another
/// connection that is there already takes the reports that this one could not make.
fn leave<Q, E>(link: &Mutex<Option<Link<Q, E>>>) {
    let mut held = lock(link);
    let is_own = |it: &Link<Q, E>| it.thread == current().id();
    if held.as_ref().is_some_and(is_own) {
        *held = None;
        return;
    }
    drop(held);
    wake(link);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
