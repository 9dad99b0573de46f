// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which files overlays come from: what an operator looks at, and what is undone file by file.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use super::memory::{Memory, WINDOW_PAGES};
use super::pagemap::Pagemap;
use super::sharing::Sharing;
use crate::protocol::{FileKey, FileSpan, FileUse, Undo};
use crate::store::PAGE;

/// Addresses and lengths, in pages, of the overlays of each file.
type ByFile = BTreeMap<FileKey, Vec<(usize, usize)>>;

/// The files behind `after` that have overlays, at most `most`, in order. `name_of` is what
/// the guest calls a file.
pub fn file_uses<'a>(
    sharing: &Sharing,
    after: Option<FileKey>,
    most: usize,
    name_of: impl Fn(&FileKey) -> Option<&'a str>,
) -> io::Result<Vec<FileUse>> {
    let overlays = by_file(&sharing.memory(), |file| after.is_none_or(|it| file > it));
    let mut pagemap = Pagemap::open()?;
    let count = |(file, overlays): (FileKey, Vec<(usize, usize)>)| {
        let mut counted = FileUse {
            file,
            name: name_of(&file).unwrap_or_default().to_owned(),
            pages_shared: 0,
            pages_broken: 0,
        };
        for (address, pages) in overlays {
            for from in (0..pages).step_by(WINDOW_PAGES) {
                let some = WINDOW_PAGES.min(pages - from);
                let intact = pagemap.intact_lately(address + from * PAGE, some)?;
                let intact = u64::from(intact.count_ones());
                counted.pages_shared += intact;
                counted.pages_broken += some as u64 - intact;
            }
        }
        Ok(counted)
    };
    overlays.into_iter().take(most).map(count).collect()
}

/// Addresses that an undo is about.
pub(super) fn ranges(memory: &Memory, what: &Undo) -> Vec<Range<usize>> {
    match what {
        Undo::All => std::iter::once(0..usize::MAX).collect(),
        Undo::Files(files) => by_file(memory, |file| files.contains(&file))
            .into_values()
            .flatten()
            .map(|(address, pages)| address..address + pages * PAGE)
            .collect(),
        Undo::Pages { gfn, pages } => memory
            .pieces(*gfn, *pages)
            .map(|piece| piece.hva..piece.hva + piece.pages * PAGE)
            .collect(),
    }
}

/// Addresses of what is shared of these pages of files.
pub(super) fn ranges_of(memory: &Memory, spans: &[FileSpan]) -> Vec<Range<usize>> {
    let overlays = memory.overlays();
    let parts = overlays.iter().flat_map(|(address, overlay)| {
        let file = memory.file_key(overlay.file);
        let (page, end) = (overlay.page, overlay.page + u64::from(overlay.pages));
        let of_file = spans.iter().filter(move |span| span.file == file);
        of_file.filter_map(move |span| {
            let (from, to) = (span.page.max(page), span.end().min(end));
            let at = |wanted: u64| address + (wanted - page) as usize * PAGE;
            (from < to).then(|| at(from)..at(to))
        })
    });
    parts.collect()
}

fn by_file(memory: &Memory, wanted: impl Fn(FileKey) -> bool) -> ByFile {
    let mut overlays = ByFile::new();
    for (address, overlay) in memory.overlays().iter() {
        let file = memory.file_key(overlay.file);
        if wanted(file) {
            let pages = overlay.pages as usize;
            overlays.entry(file).or_default().push((address, pages));
        }
    }
    overlays
}
