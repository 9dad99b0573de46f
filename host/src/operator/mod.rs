// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What `pagefusionctl` does for an operator.

mod doctor;
mod explain;
mod host_facts;
mod launch;
mod logs;
mod screen;
mod size;
mod table;
mod top;

pub use doctor::{Finding, Verdict, findings_text, judge};
pub use explain::{Cause, Explanation, explain, explanation_text, find};
pub use host_facts::{Facts, NoAnswer, Tmpfs};
pub use launch::{Launch, LaunchError};
pub use logs::{LogFormat, start_logging};
pub use size::{parse_memory, parse_size};
pub use table::{files_text, groups_text, human_bytes, human_pages, status_text, vms_text};
pub use top::top;
