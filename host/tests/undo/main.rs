// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Overlays that become ordinary memory again, and others that stay.

#[path = "../common/mod.rs"]
mod common;
mod support;
mod tidying;
mod undoing;
mod written;
