// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The store of canonical pages of one trust group.
//!
//! [`Group`] is the store. An engine reaches it through [`PageStore`]: in the same process
//! by [`LocalStore`], otherwise by the client in [`crate::protocol`].
//!
//! A page takes this way: one reporter *sights* it, which costs an index entry. When another
//! reporter sights the same content, it is asked to *publish*; the store takes its copy,
//! *grants* it to the publisher and asks the first reporter to report again. Whoever looks
//! the page up from then on is granted it. When no process has it any more, its memory goes
//! back to the host.

mod adoption;
pub(crate) mod batches;
mod estimate;
mod file;
mod files;
mod group;
mod index;
mod local;
#[cfg(test)]
mod model;
mod pages;
mod places;
mod references;
mod sightings;
mod space;
#[cfg(test)]
mod tests;

pub use file::StoreFile;
#[cfg(feature = "cli")]
pub(crate) use group::check_spans;
pub use group::{Group, GroupStatistics, Limits, MAX_REQUEST_PAGES, VmLimits, VmStatistics};
pub use local::LocalStore;

use crate::protocol::{FileSpan, Holding, Segment, Sighting, StorePage, StoreSpan, Verdict};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Content hash of a page; a hint that finds candidates, never proof.
pub fn hash_page(seed: u64, page: &[u8; PAGE]) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(page, seed)
}

/// The whole pages of `bytes`.
pub(crate) fn whole_pages(bytes: &[u8]) -> impl Iterator<Item = &[u8; PAGE]> {
    bytes
        .chunks_exact(PAGE)
        .filter_map(|page| page.try_into().ok())
}

/// Why a store could not answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The connection is gone; try again after connecting.
    #[error("the page store cannot be reached: {0}")]
    Unreachable(#[source] std::io::Error),
    /// The store refused.
    #[error("the page store refused: {0}")]
    Refused(String),
}

/// What an engine asks of a store, whether through a socket or in the same process. The
/// calls are those of [`crate::protocol::EngineRequest`], with the same meaning.
///
/// A process is granted a store page or not, however often it maps the page: it releases
/// the page when the last of its mappings is gone.
pub trait PageStore: Send {
    /// Appends segments that cover `spans` in order to `out`.
    fn lookup(&mut self, spans: &[FileSpan], out: &mut Vec<Segment>) -> Result<(), StoreError>;
    /// Appends one verdict per page to `out`.
    fn sight(&mut self, sightings: Vec<Sighting>, out: &mut Vec<Verdict>)
    -> Result<(), StoreError>;
    /// Publishes `spans`, whose content is `bytes`; appends one position per page to `out`.
    fn publish(
        &mut self,
        spans: &[FileSpan],
        bytes: &[u8],
        out: &mut Vec<Option<StorePage>>,
    ) -> Result<(), StoreError>;
    /// Gives granted pages back.
    fn release(&mut self, spans: Vec<StoreSpan>) -> Result<(), StoreError>;
    /// Tells what is mapped, after the connection was renewed.
    fn announce(&mut self, holdings: Vec<Holding>) -> Result<(), StoreError>;
    /// Tells that the guest does not have these file pages any more.
    fn forget(&mut self, span: FileSpan) -> Result<(), StoreError>;
}
