//! The agent: what runs inside a guest and does what the harness asks.

mod cache;
mod census;
mod command;
mod files;
mod held;
mod herd;
mod kernel;
mod kin;
mod mounts;
mod power;
mod scribble;
mod serve;

pub use mounts::{TOUCH, touch};
pub use serve::serve;
