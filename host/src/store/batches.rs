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
    batches_of(items, MAX_REQUEST_PAGES)
}

/// Cuts `items`, in order, into batches of at most `most` pages.
pub(crate) fn batches_of<T: Pages>(
    items: impl IntoIterator<Item = T>,
    most: u64,
) -> impl Iterator<Item = Vec<T>> {
    let mut items = items.into_iter();
    let mut rest = None;
    std::iter::from_fn(move || {
        let mut batch = Vec::new();
        let mut room = most;
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
pub(crate) fn publications<'a>(
    spans: &[FileSpan],
    bytes: &'a [u8],
) -> Result<impl Iterator<Item = (Vec<FileSpan>, &'a [u8])>, StoreError> {
    check_bytes(spans, bytes)?;
    let mut rest = bytes;
    let batches = batches_of(spans.iter().copied(), MAX_PUBLISH_PAGES as u64);
    Ok(batches.map(move |spans| {
        let (here, behind) = rest.split_at(pages_of(&spans) as usize * PAGE);
        rest = behind;
        (spans, here)
    }))
}

/// Whether `bytes` are those of all pages.
pub(super) fn check_bytes(spans: &[FileSpan], bytes: &[u8]) -> Result<(), StoreError> {
    let pages = pages_of(spans);
    if bytes.len() as u64 == pages * PAGE as u64 {
        return Ok(());
    }
    Err(StoreError::Refused(format!(
        "{} bytes for {pages} pages",
        bytes.len()
    )))
}

/// Pages in all of `spans`.
pub(crate) fn pages_of(spans: &[FileSpan]) -> u64 {
    spans.iter().map(Pages::pages).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::FileKey;

    fn file_span() -> FileSpan {
        FileSpan {
            file: FileKey {
                fs_uuid: [0; 16],
                inode: 1,
                size: 0,
                mtime_ns: 0,
                generation: 0,
                kind: 1,
            },
            page: 0,
            pages: 0,
        }
    }

    #[test]
    fn long_spans_are_cut_and_nothing_is_lost() {
        let file = file_span().file;
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

    #[test]
    fn a_publication_is_cut_between_its_bytes_whatever_its_spans() {
        let most = MAX_PUBLISH_PAGES as u32;
        let span = |page, pages| FileSpan {
            page,
            pages,
            ..file_span()
        };
        let spans = [span(7, most - 1), span(100, 0), span(200, most + 2)];
        let bytes: Vec<u8> = (0..2 * most + 1)
            .flat_map(|page| [page as u8; PAGE])
            .collect();
        let cut: Vec<_> = publications(&spans, &bytes)
            .unwrap()
            .map(|(spans, bytes)| {
                let spans: Vec<_> = spans.iter().map(|it| (it.page, it.pages)).collect();
                (spans, bytes.len() / PAGE, bytes[0])
            })
            .collect();
        let middle = vec![(201, most)];
        let expected = [
            (vec![(7, most - 1), (100, 0), (200, 1)], most as usize, 0),
            (middle, most as usize, most as u8),
            (vec![(201 + u64::from(most), 1)], 1, 2 * most as u8),
        ];
        assert_eq!(cut, expected);
        assert!(publications(&spans, &bytes[PAGE..]).is_err());
    }
}
