//! What the module costs a guest, in instructions.
//!
//! The guest's clock counts instructions (`-icount`), so that the CPU time its kernel notes for the module's thread is
//! a count, the same on every machine, and not a time.

mod fit;
mod measure;
mod plan;
mod table;

use std::path::Path;

use anyhow::Result;

pub use self::table::Table;
use super::image;
use crate::artifacts::Artifacts;

/// Measures and makes the table.
pub fn guest(artifacts: &Artifacts, quick: bool, logs: Option<&Path>) -> Result<Table> {
    let plan = plan::Plan::new(quick);
    let measured = measure::run(artifacts, &plan, logs)?;
    Table::new(artifacts, &measured)
}
