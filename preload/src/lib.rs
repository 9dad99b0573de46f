// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Puts the pagefusion engine into an unmodified VMM by `LD_PRELOAD`.
//!
//! Without `PAGEFUSION_ENGINE_SOCKET` in the environment nothing happens at all: no thread,
//! no descriptor, and the interposed functions go straight on. Nor does it in a shell or the like, which
//! only becomes the VMM, and in any process but `PAGEFUSION_PROCESS`, if that is set. Where the engine
//! cannot start, one line on standard error says why, and it is the same from then on.

mod blkio;
mod connection;
mod device;
mod environment;
mod interpose;
mod kvm;
mod memory_calls;
mod memory_tree;
mod qmp;
mod runtime;
mod search;
mod service;
mod signals;
mod unmapped;

/// What threads meet at; the tests of such files put `loom`'s in place of these.
mod primitives {
    pub(crate) use std::sync::Mutex;
}
