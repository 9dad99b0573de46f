// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Hands on what is noted elsewhere, by several threads at once: what was noted last is what is
//! handed on last.
//!
//! `tests/word.rs` compiles this file again with `loom`'s types in place of those of
//! [`super::primitives`].

use super::primitives::Mutex;
use std::sync::PoisonError;

/// What an engine was told last of something that it is to keep to.
#[derive(Debug)]
pub(super) struct Word<T>(Mutex<Told<T>>);

#[derive(Debug)]
struct Told<T> {
    /// By the daemon's welcome, which comes before the connection by which it is told the rest.
    welcome: T,
    /// By that connection.
    last: T,
}

impl<T: Copy + PartialEq> Word<T> {
    /// An engine keeps to `first` until it is told something else.
    pub(super) fn new(first: T) -> Self {
        Self(Mutex::new(Told {
            welcome: first,
            last: first,
        }))
    }

    /// What `noted` says, for an engine that is welcomed now.
    pub(super) fn welcome(&self, noted: impl FnOnce() -> T) -> T {
        self.with(|told| {
            told.welcome = noted();
            told.welcome
        })
    }

    /// From `connect` on the engine that was welcomed last can be told more. What was told before
    /// was told to nobody, or to the engine as it was.
    pub(super) fn begin<R>(&self, connect: impl FnOnce() -> R) -> R {
        self.with(|told| {
            told.last = told.welcome;
            connect()
        })
    }

    /// Tells the engine what `noted` says, unless it knows, by `tell`, which only queues it. Where
    /// nobody is connected, it is told when it is.
    pub(super) fn tell<R>(
        &self,
        noted: impl FnOnce() -> T,
        tell: impl FnOnce(T) -> R,
    ) -> Option<R> {
        self.with(|told| {
            let noted = noted();
            (noted != told.last).then(|| told.tell(noted, tell))
        })
    }

    /// The same whether it knows or not.
    pub(super) fn tell_again<R>(&self, noted: impl FnOnce() -> T, tell: impl FnOnce(T) -> R) -> R {
        self.with(|told| told.tell(noted(), tell))
    }

    /// Looks at what is noted and hands it on, and nobody else does in between.
    fn with<R>(&self, act: impl FnOnce(&mut Told<T>) -> R) -> R {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T> Told<T> {
    fn tell<R>(&mut self, noted: T, tell: impl FnOnce(T) -> R) -> R
    where
        T: Copy,
    {
        self.last = noted;
        tell(noted)
    }
}
