// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What VMMs do to memory, and hosts to VMMs, that an engine could trip over. Each test fails
//! without its guard.

mod attributes;
mod changes;
#[path = "../common/mod.rs"]
mod common;
mod limits;
mod refusals;
mod support;
