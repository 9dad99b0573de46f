// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Page fusion for Linux guests, host side.
//!
//! * [`engine`] lives in the process of a virtual machine monitor. It reads the guest's
//!   reports, compares every page with the store and maps the canonical copy over it.
//! * [`store`] holds the canonical pages of one trust group.
//! * [`protocol`] is what the two say to each other.
//! * [`daemon`] serves stores and devices to many VMMs on one host.
//! * `operator`, with the feature `cli`, is what `pagefusionctl` does.

pub mod daemon;
pub mod engine;
#[cfg(feature = "cli")]
pub mod operator;
pub mod protocol;
pub mod store;
