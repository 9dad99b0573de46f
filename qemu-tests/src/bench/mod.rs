//! What pagefusion costs and brings.

pub mod compare;
mod guest;
mod image;

pub use self::guest::{Table, guest};
