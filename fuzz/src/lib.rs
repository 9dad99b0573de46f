// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is fuzzed. Each function takes any bytes, and panics when something is wrong.
//!
//! | function | whose bytes | what takes them |
//! |---|---|---|
//! | [`ring()`] | a guest's | the ring consumer, records |
//! | [`ivshmem()`] | a guest's and a VMM's | header, registers, handshake |
//! | [`protocol()`] | a VMM's, a daemon's, an operator's | messages, the daemon's answers, the store |
//! | [`qmp()`] | QEMU's monitor's | what the preloaded library reads of guest memory |
//!
//! `cargo fuzz run ring` looks for new inputs (`RUSTC_BOOTSTRAP=1` lets a stable compiler do
//! it); `cargo test -p pagefusion-fuzz` tries those of the corpora, and some like them;
//! `cargo run -p pagefusion-fuzz --bin ring FILE` tries one.
//!
//! This crate is in the workspace, beside those it fuzzes: it reaches into three of them, and
//! `cargo test` must not forget the corpora. libFuzzer is no part of any other build.

#![deny(missing_docs)]

mod input;
mod ivshmem;
mod monitor;
mod protocol;
mod ring;

// The library that QEMU preloads exports nothing but the functions it interposes.
#[path = "../../preload/src/memory_tree.rs"]
mod memory_tree;
#[allow(dead_code, reason = "connecting to the monitor is not what is fuzzed")]
#[path = "../../preload/src/qmp.rs"]
mod qmp;

pub use ivshmem::ivshmem;
pub use monitor::qmp;
pub use protocol::protocol;
pub use ring::ring;

/// Tries the files that the command line names.
pub fn replay_arguments(target: fn(&[u8])) -> std::io::Result<()> {
    for path in std::env::args_os().skip(1) {
        target(&std::fs::read(path)?);
    }
    Ok(())
}
