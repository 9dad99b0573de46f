// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Cuts what an engine asks into requests of a size that a store accepts.

use super::{MAX_REQUEST_PAGES, PAGE, StoreError};
use crate::protocol::{FileSpan, Holding, MAX_PUBLISH_PAGES, Sighting};

/// Most items in one request, so that its encoding stays below
/// [`crate::protocol::MAX_MESSAGE`].
const MAX_ITEMS: usize = 4096;

/// Consecutive pages that can be cut in two.
pub(crate) trait Pages: Sized {
    fn pages(&self) -> u64;
    /// Keeps the first `at` pages and returns the rest.
    fn split_off(&mut self, at: u32) -> Self;
}

impl Pages for FileSpan {
    fn pages(&self) -> u64 {
        u64::from(self.pages)
    }

    fn split_off(&mut self, at: u32) -> Self {
        let rest = Self {
            page: self.page.saturating_add(u64::from(at)),
            pages: self.pages - at,
            ..*self
        };
        self.pages = at;
        rest
    }
}

impl Pages for Holding {
    fn pages(&self) -> u64 {
        self.span.pages()
    }

    fn split_off(&mut self, at: u32) -> Self {
        Self {
            span: self.span.split_off(at),
            store: self.store.saturating_add(at),
        }
    }
}

impl Pages for Sighting {
    fn pages(&self) -> u64 {
        self.hashes.len() as u64
    }

    fn split_off(&mut self, at: u32) -> Self {
        Self {
            file: self.file,
            page: self.page.saturating_add(u64::from(at)),
            hashes: self.hashes.split_off(at as usize),
        }
    }
}

/// Cuts `items`, in order, into requests.
pub(crate) fn batches<T: Pages>(
    items: impl IntoIterator<Item = T>,
) -> impl Iterator<Item = Vec<T>> {
    let mut items = items.into_iter();
    let mut rest = None;
    std::iter::from_fn(move || {
        let mut batch = Vec::new();
        let mut room = MAX_REQUEST_PAGES;
        while batch.len() < MAX_ITEMS && room > 0 {
            let Some(mut item) = rest.take().or_else(|| items.next()) else {
                break;
            };
            if item.pages() > room {
                rest = Some(item.split_off(room as u32));
            }
            room -= item.pages();
            batch.push(item);
        }
        (!batch.is_empty()).then_some(batch)
    })
}

/// Cuts a publication, in order, into requests.
pub(crate) fn publications(
    mut span: FileSpan,
    bytes: &[u8],
) -> Result<impl Iterator<Item = (FileSpan, &[u8])>, StoreError> {
    if bytes.len() as u64 != span.pages() * PAGE as u64 {
        return Err(StoreError::Refused(format!(
            "{} bytes for {} pages",
            bytes.len(),
            span.pages
        )));
    }
    Ok(bytes.chunks(MAX_PUBLISH_PAGES * PAGE).map(move |bytes| {
        let rest = span.split_off((bytes.len() / PAGE) as u32);
        (std::mem::replace(&mut span, rest), bytes)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::FileKey;

    #[test]
    fn long_spans_are_cut_and_nothing_is_lost() {
        let file = FileKey {
            fs_uuid: [0; 16],
            inode: 1,
            size: 0,
            mtime_ns: 0,
            generation: 0,
            kind: 1,
        };
        let limit = MAX_REQUEST_PAGES as u32;
        let spans = [
            FileSpan {
                file,
                page: 5,
                pages: limit - 1,
            },
            FileSpan {
                file,
                page: 0,
                pages: 2 * limit + 2,
            },
        ];
        let cut: Vec<Vec<_>> = batches(spans)
            .map(|batch| batch.iter().map(|span| (span.page, span.pages)).collect())
            .collect();
        let end = u64::from(limit);
        assert_eq!(
            cut,
            [
                vec![(5, limit - 1), (0, 1)],
                vec![(1, limit)],
                vec![(end + 1, limit)],
                vec![(2 * end + 1, 1)]
            ]
        );
    }
}
