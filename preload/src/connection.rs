// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The control connection, held so that whoever finds the store gone can end it: both are made
//! anew then.
//!
//! `tests/hand_off.rs` compiles this file again with `loom`'s types in place of those of
//! [`crate::primitives`].

use crate::primitives::Mutex;
use std::sync::PoisonError;

/// A connection in use, or none.
#[derive(Debug)]
pub(crate) struct Held<S>(Mutex<Option<S>>);

impl<S> Held<S> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Holds a connection that was just made. Whether it can be used: not if the store is gone,
    /// as whoever has found that may have come before there was anything to end.
    pub(crate) fn hold(&self, connection: S, has_store: impl FnOnce() -> bool) -> bool {
        self.replace(Some(connection));
        has_store()
    }

    /// The connection, to end it: for who has found that the store is gone.
    pub(crate) fn take(&self) -> Option<S> {
        self.replace(None)
    }

    fn replace(&self, connection: Option<S>) -> Option<S> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut held, connection)
    }
}
