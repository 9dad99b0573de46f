//! The agent: what runs inside a guest and does what the harness asks.

mod command;
mod files;
mod held;
mod kernel;
mod serve;

pub use serve::serve;
