// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages become canonical ones.

use super::super::batches::{check_bytes, pages_of};
use super::super::index::MAX_CANDIDATES;
use super::super::sightings::Reporter;
use super::super::{PAGE, StoreError, hash_page, whole_pages};
use super::{Group, Vm, check_spans};
use crate::protocol::{FileKey, FileSpan, MAX_PUBLISH_PAGES, StorePage};
use std::io;
use std::ops::Range;

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
        let mut bytes = whole_pages(bytes);
        let mut clean = 0..0;
        for span in spans {
            let pages = span.page..span.page + u64::from(span.pages);
            for (page, bytes) in pages.clone().zip(&mut bytes) {
                let following = (pages.end - page) as u32;
                out.push(self.publish_page(vm, (&span.file, page), bytes, following, &mut clean));
            }
        }
        Ok(())
    }

    fn publish_page(
        &mut self,
        vm: u32,
        (key, page): (&FileKey, u64),
        bytes: &[u8; PAGE],
        following: u32,
        clean: &mut Range<StorePage>,
    ) -> Option<StorePage> {
        let hash = hash_page(self.seed, bytes);
        let file = self.files.intern(key);
        let reporter = Reporter { vm, file, page };
        let store = match self.find_equal(hash, bytes) {
            Ok(Some(store)) => Some(store).filter(|&store| self.admits(vm, store)),
            Ok(None) if self.room(vm) == 0 => {
                self.limit(vm, 1);
                None
            }
            Ok(None) => self.write_new(reporter, hash, bytes, following, clean),
            Err(error) => {
                log::error!("cannot read the page store: {error}");
                None
            }
        };
        if let Some(store) = store {
            self.index.name(&mut self.files, file, page, store);
            self.grant(vm, store);
            self.consume_sighting(reporter, hash);
        }
        // It may be forgotten already, with the last sighting in it.
        if let Some(file) = self.files.find(key) {
            self.files.prune(file);
        }
        store
    }

    /// A page of the store with the same bytes.
    fn find_equal(&self, hash: u64, bytes: &[u8; PAGE]) -> io::Result<Option<StorePage>> {
        let mut stored = [0; PAGE];
        for store in self.index.candidates(hash) {
            self.file.read(store, &mut stored)?;
            if stored == *bytes {
                return Ok(Some(store));
            }
        }
        Ok(None)
    }

    /// `following` pages of the publication, this one among them, may come to lie side by side;
    /// those in `clean` have been found or made holes.
    fn write_new(
        &mut self,
        by: Reporter,
        hash: u64,
        bytes: &[u8; PAGE],
        following: u32,
        clean: &mut Range<StorePage>,
    ) -> Option<StorePage> {
        match self.sightings.find(hash) {
            Some(other) if other != by => {}
            // The other reporter has gone in the meantime, or there never was one.
            Some(_) => return None,
            None => {
                let key = self.files.get(by.file).key;
                self.sight_page(by.vm, &key, by.page, hash);
                return None;
            }
        }
        if self.index.candidates(hash).count() >= MAX_CANDIDATES {
            return None;
        }
        let may_publish = |vm: &Vm| vm.published < vm.limits.store_pages;
        if self.index.len() as u64 >= self.limits.store_pages
            || !self.vms.get(&by.vm).is_some_and(may_publish)
        {
            self.store_full += 1;
            self.limit(by.vm, 1);
            return None;
        }
        let Some(store) = self.index.take(&mut self.files, by.file, by.page) else {
            self.store_full += 1;
            return None;
        };
        if let Err(error) = self.write_anew(store, bytes, following, clean) {
            log::debug!("cannot write to the page store: {error}");
            self.store_full += 1;
            self.index.give(&mut self.files, store);
            return None;
        }
        self.index.insert(store, hash, by.vm);
        self.vms.entry(by.vm).or_default().published += 1;
        Some(store)
    }

    /// Writes a page into memory that nobody has mapped before it was a page, unless somebody
    /// hurries to: `docs/threat-model.md` says what that means.
    fn write_anew(
        &self,
        store: StorePage,
        bytes: &[u8; PAGE],
        following: u32,
        clean: &mut Range<StorePage>,
    ) -> io::Result<()> {
        if !clean.contains(&store) {
            // At once for the whole run: for each page it would cost a third of the write.
            let run = self.index.unused(store, following).max(1);
            self.file.punch(store, run)?;
            *clean = store..store.saturating_add(run);
        }
        self.file.write(store, bytes)
    }

    /// The page is in the store now: whoever else has it shall report it again.
    pub(super) fn consume_sighting(&mut self, by: Reporter, hash: u64) {
        if let Some(first) = self.sightings.find(hash) {
            if first != by {
                self.reports
                    .push((first.vm, self.files.get(first.file).key, first.page));
            }
            self.sightings.remove(&mut self.files, first);
        }
    }
}
