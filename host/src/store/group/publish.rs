// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages become canonical ones.

use super::super::batches::{check_bytes, pages_of};
use super::super::index::{Dense, MAX_CANDIDATES};
use super::super::sightings::Reporter;
use super::super::{PAGE, StoreError, hash_page, whole_pages};
use super::{Group, Vm, check_spans};
use crate::protocol::{FileKey, FileSpan, MAX_PUBLISH_PAGES, StorePage};
use std::io;
use std::ops::Range;

/// A publication as it is worked on.
struct Publication<'a> {
    vm: u32,
    bytes: &'a [u8],
    /// One for each page.
    answers: &'a mut [Option<StorePage>],
    /// New content that is not written yet: side by side in `bytes` from page `first` on, and in the
    /// store from `store` on.
    new: Vec<NewPage<'a>>,
    first: usize,
    store: StorePage,
    /// Store pages that have been found or made holes.
    clean: Range<StorePage>,
    /// How much of the file at hand it has.
    dense: Dense,
}

struct NewPage<'a> {
    file: &'a FileKey,
    page: u64,
    hash: u64,
}

/// How much of a file such spans are.
fn dense(spans: &[FileSpan]) -> Dense {
    let first = spans.iter().map(|it| it.page).min().unwrap_or_default();
    let end = spans.iter().map(|it| it.page + u64::from(it.pages)).max();
    Dense {
        pages: pages_of(spans) as u32,
        extent: end.unwrap_or_default() - first,
    }
}

impl Publication<'_> {
    /// Whether page `index`, at `store`, continues what is new.
    fn is_continued_by(&self, index: usize, store: StorePage) -> bool {
        let next = self.store.checked_add(self.new.len() as u32);
        index == self.first + self.new.len() && next == Some(store)
    }
}

impl Group {
    /// [`crate::protocol::EngineRequest::Publish`]
    pub fn publish(
        &mut self,
        vm: u32,
        spans: &[FileSpan],
        bytes: &[u8],
        out: &mut Vec<Option<StorePage>>,
    ) -> Result<(), StoreError> {
        self.known(vm)?;
        let pages = pages_of(spans);
        if pages > MAX_PUBLISH_PAGES as u64 {
            return Err(StoreError::Refused(format!(
                "{pages} pages at once; the most is {MAX_PUBLISH_PAGES}"
            )));
        }
        check_bytes(spans, bytes)?;
        check_spans(spans.iter().map(|it| (it.page, u64::from(it.pages))))?;
        let begin = out.len();
        out.resize(begin + pages as usize, None);
        let mut work = Publication {
            vm,
            bytes,
            answers: &mut out[begin..],
            new: Vec::with_capacity(pages as usize),
            first: 0,
            store: 0,
            clean: 0..0,
            dense: dense(&[]),
        };
        let mut pages = whole_pages(bytes).enumerate();
        for of_file in spans.chunk_by(|a, b| a.file == b.file) {
            work.dense = dense(of_file);
            for span in of_file {
                let following = (1..=span.pages).rev();
                for (following, page) in following.zip(&mut pages) {
                    let of_file = span.page + u64::from(span.pages - following);
                    self.publish_page(&mut work, page, (&span.file, of_file), following);
                }
            }
        }
        self.write_new(&mut work);
        for span in spans {
            // It may be forgotten already, with the last sighting in it.
            if let Some(file) = self.files.find(&span.file) {
                self.files.prune(file);
            }
        }
        Ok(())
    }

    /// Page `index` of a publication, which is `page` of a file; `following` pages, this one among
    /// them, may come to lie side by side.
    fn publish_page<'a>(
        &mut self,
        work: &mut Publication<'a>,
        (index, bytes): (usize, &[u8; PAGE]),
        (key, page): (&'a FileKey, u64),
        following: u32,
    ) {
        let hash = hash_page(self.seed, bytes);
        if work.new.iter().any(|new| new.hash == hash) {
            self.write_new(work);
        }
        let mut candidates = 0;
        match self.find_equal(hash, bytes, &mut candidates) {
            Ok(Some(store)) => {
                if self.room(work.vm) <= work.new.len() as u64 {
                    // What waits comes first, and may leave no room.
                    self.write_new(work);
                }
                if self.admits(work.vm, store) {
                    let published = self.note_published(work.vm, (key, page), hash, store);
                    self.consume_sightings(&[published]);
                    work.answers[index] = Some(store);
                }
            }
            Ok(None) if self.room(work.vm) <= work.new.len() as u64 => self.limit(work.vm, 1),
            // Too many of the same hash is what somebody makes on purpose.
            Ok(None) if candidates >= MAX_CANDIDATES => {}
            Ok(None) => self.take_new(work, index, (key, page, hash), following),
            Err(error) => log::error!("cannot read the page store: {error}"),
        }
    }

    /// A page of the store with the same bytes. `others` counts those that have their hash alone.
    fn find_equal(
        &self,
        hash: u64,
        bytes: &[u8; PAGE],
        others: &mut usize,
    ) -> io::Result<Option<StorePage>> {
        let mut stored = [0; PAGE];
        for store in self.index.candidates(hash) {
            self.file.read(store, &mut stored)?;
            if stored == *bytes {
                return Ok(Some(store));
            }
            *others += 1;
        }
        Ok(None)
    }

    /// Takes a place for content that the store does not have, if somebody else has it, too.
    fn take_new<'a>(
        &mut self,
        work: &mut Publication<'a>,
        index: usize,
        (key, page, hash): (&'a FileKey, u64, u64),
        following: u32,
    ) {
        let vm = work.vm;
        let file = self.files.intern(key);
        match self.sightings.find(hash) {
            Some(other) if other != (Reporter { vm, file, page }) => {}
            // The other reporter has gone in the meantime, or there never was one.
            Some(_) => return,
            None => {
                self.sight_page(vm, key, page, hash);
                return;
            }
        }
        let waiting = work.new.len() as u64;
        let may_publish = |vm: &Vm| vm.published + waiting < vm.limits.store_pages;
        if self.index.len() as u64 + waiting >= self.limits.store_pages
            || !self.vms.get(&vm).is_some_and(may_publish)
        {
            self.store_full += 1;
            self.limit(vm, 1);
            return;
        }
        let Some(store) = self.index.take(&mut self.files, file, page, work.dense) else {
            self.store_full += 1;
            return;
        };
        if let Err(error) = self.make_room(store, following, &mut work.clean) {
            log::debug!("cannot make room in the page store: {error}");
            self.store_full += 1;
            self.index.give(&mut self.files, store..store + 1);
            return;
        }
        if !work.is_continued_by(index, store) {
            self.write_new(work);
            (work.first, work.store) = (index, store);
        }
        work.new.push(NewPage {
            file: key,
            page,
            hash,
        });
    }

    /// Has a page be written into memory that nobody has mapped before it was a page, unless somebody
    /// hurries to: `docs/threat-model.md` says what that means.
    fn make_room(
        &self,
        store: StorePage,
        following: u32,
        clean: &mut Range<StorePage>,
    ) -> io::Result<()> {
        if !clean.contains(&store) {
            // At once for the whole run: for each page it would cost a third of the write.
            let run = self.index.unused(store, following).max(1);
            let end = store.saturating_add(run);
            // What lies behind the file's end nobody can have mapped.
            let inside = end.min(self.file.end()).saturating_sub(store);
            if inside > 0 {
                self.file.punch(store, inside)?;
            }
            *clean = store..end;
        }
        Ok(())
    }

    /// Writes what is new, and enters what could be written.
    fn write_new(&mut self, work: &mut Publication) {
        let (vm, first, store) = (work.vm, work.first, work.store);
        let new = std::mem::take(&mut work.new);
        if new.is_empty() {
            return;
        }
        let bytes = &work.bytes[first * PAGE..(first + new.len()) * PAGE];
        let written = match self.file.write(store, bytes) {
            Ok(()) => new.len(),
            Err((written, error)) => {
                log::debug!("cannot write to the page store: {error}");
                written as usize
            }
        };
        let mut published = Vec::with_capacity(written);
        for (i, new) in new[..written].iter().enumerate() {
            let store = store + i as u32;
            self.index.insert(store, new.hash, vm);
            self.vms.entry(vm).or_default().published += 1;
            published.push(self.note_published(vm, (new.file, new.page), new.hash, store));
            work.answers[first + i] = Some(store);
        }
        self.consume_sightings(&published);
        self.store_full += (new.len() - written) as u64;
        let rest = store + written as u32..store + new.len() as u32;
        self.index.give(&mut self.files, rest);
    }

    /// A VM has published a page that is in the store now. What comes back is for
    /// [`Self::consume_sightings`].
    fn note_published(
        &mut self,
        vm: u32,
        (key, page): (&FileKey, u64),
        hash: u64,
        store: StorePage,
    ) -> (Reporter, u64) {
        let file = self.files.intern(key);
        self.index.name(&mut self.files, file, page, store);
        self.grant(vm, store);
        (Reporter { vm, file, page }, hash)
    }

    /// These have published what is in the store now: whoever else has seen it shall report it again.
    /// What was seen side by side is forgotten at once.
    fn consume_sightings(&mut self, published: &[(Reporter, u64)]) {
        let mut seen: Option<(Reporter, u64)> = None;
        for &(by, hash) in published {
            let found = self.sightings.find(hash);
            let found = match (&mut seen, found) {
                (Some((first, end)), Some(next))
                    if next
                        == (Reporter {
                            page: *end,
                            ..*first
                        }) =>
                {
                    *end = end.saturating_add(1);
                    found
                }
                _ => {
                    self.forget_seen(seen.take());
                    // Of another hash the sighting may have been the same: it keeps a part of each.
                    let found = self.sightings.find(hash);
                    seen = found.map(|it| (it, it.page.saturating_add(1)));
                    found
                }
            };
            if let Some(first) = found.filter(|first| *first != by) {
                let key = self.files.get(first.file).key;
                self.reports.push((first.vm, key, first.page));
            }
        }
        self.forget_seen(seen);
    }

    fn forget_seen(&mut self, seen: Option<(Reporter, u64)>) {
        if let Some((Reporter { vm, file, page }, end)) = seen {
            self.sightings
                .remove_range(&mut self.files, vm, file, page, end);
        }
    }
}
