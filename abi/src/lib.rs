// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Wire format between a pagefusion guest and its host.
//!
//! The normative text is `docs/abi.md`; this crate is its only implementation. The kernel
//! module includes [`wire`] by path, so that both sides are built from the same lines.

#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod wire;
