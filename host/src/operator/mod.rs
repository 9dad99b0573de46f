// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What `pagefusionctl` does for an operator.

mod launch;
mod table;

pub use launch::{Launch, LaunchError};
pub use table::{human_bytes, status_text, vms_text};
