// SPDX-License-Identifier: GPL-2.0

//! The module's files that know nothing of the kernel, as a crate of their own for `cargo test`.
//! The module's root is `main.rs`.

#![forbid(unsafe_code)]
#![allow(
    dead_code,
    reason = "the users of these files are in the kernel module"
)]
#![allow(unreachable_pub, reason = "the wire format is public in its own crate")]

mod exclude;
mod filter;
mod inflight;
mod iomem;
mod leaf;
mod leaves;
#[path = "list_std.rs"]
mod list;
mod pages;
mod policy;
mod ranges;
mod recent;
mod ring;
mod runs;
mod session;
mod sight;
mod tracker;
mod values;
// The rest is used elsewhere.
#[allow(unused_imports)]
#[rustfmt::skip] // Formatted with its own crate.
#[path = "../abi/src/wire/mod.rs"]
mod wire;

#[cfg(test)]
#[path = "tests"]
mod tests {
    mod exclude;
    mod fifo;
    mod filter;
    mod hand_off;
    mod iomem;
    mod list;
    mod pages;
    mod policy;
    mod ranges;
    mod recent;
    mod runs;
    mod session;
    mod sight;
    mod tracker;
    mod values;
}
