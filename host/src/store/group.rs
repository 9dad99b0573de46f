// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One trust group's store: pages, who is granted them, and who has seen what.

use super::adoption::Adoption;
use super::batches::{check_bytes, pages_of};
use super::estimate::Estimate;
use super::file::StoreFile;
use super::files::Files;
use super::index::{Index, MAX_CANDIDATES};
use super::sightings::{Reporter, Sightings};
use super::{PAGE, StoreError, hash_page, whole_pages};
use crate::protocol::{
    FileKey, FileSpan, Holding, MAX_PUBLISH_PAGES, Segment, Sighting, StorePage, StoreSpan,
    Verdict, spans,
};
use roaring::RoaringBitmap;
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

/// Most pages in one request other than a publication.
pub const MAX_REQUEST_PAGES: u64 = 1 << 16;

/// Memory of a store beyond its pages that is let be: this many pages, and this part of them.
const STRAY_PAGES: u64 = 256;
const STRAY_PART: u64 = 64;
/// Most ranges cleared of strays before others get hold of the store.
const MAX_CLEARED: usize = 1024;

/// What a group may take of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Canonical pages of the whole group.
    pub store_pages: u64,
    /// Canonical pages granted, each VM's counted by itself.
    pub granted_pages: u64,
    /// Pages noted for one VM. Further ones are not noted, so they are shared only when
    /// somebody else notes them.
    pub sightings_per_vm: usize,
    /// Files of which pages are noted for one VM.
    pub files_per_vm: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            store_pages: u64::MAX,
            granted_pages: u64::MAX,
            // 16 GiB of page cache; takes about 64 MiB when it is full.
            sightings_per_vm: 1 << 22,
            files_per_vm: 1 << 18,
        }
    }
}

/// What one VM may take of its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmLimits {
    /// Canonical pages that it has published.
    pub store_pages: u64,
    /// Canonical pages granted to it.
    pub granted_pages: u64,
}

impl Default for VmLimits {
    fn default() -> Self {
        Self {
            store_pages: u64::MAX,
            granted_pages: u64::MAX,
        }
    }
}

/// Figures of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupStatistics {
    /// Canonical pages.
    pub store_pages: u64,
    /// Pages noted that only one reporter has.
    pub remembered: u64,
    /// Files that either belong to.
    pub files: u64,
    /// Memory of the index, bytes, estimated.
    pub index_bytes: u64,
    /// Pages that could not be written or were refused by a limit, ever.
    pub store_full: u64,
    /// Whether VMs of an earlier daemon are still to announce what they map.
    pub adopting: bool,
    /// While only learning: pages that would be shared, and canonical pages for that.
    pub would_share: Option<(u64, u64)>,
}

/// Figures of one VM in a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmStatistics {
    /// Canonical pages granted to it.
    pub granted: u64,
    /// Canonical pages it has published.
    pub published: u64,
    /// Pages noted for it.
    pub remembered: u64,
    /// Pages that a limit has kept from it, ever.
    pub limited: u64,
}

#[derive(Debug, Default)]
struct Vm {
    granted: RoaringBitmap,
    published: u64,
    limited: u64,
    limits: VmLimits,
    /// Granted to nobody else when that was last asked.
    alone: RoaringBitmap,
    /// While its engine announces what it maps: what was granted, or granted again, since it
    /// began to.
    renewed: Option<RoaringBitmap>,
}

/// The page store of one trust group.
#[derive(Debug)]
pub struct Group {
    file: StoreFile,
    seed: u64,
    limits: Limits,
    index: Index,
    files: Files,
    sightings: Sightings,
    vms: BTreeMap<u32, Vm>,
    adoption: Option<Adoption>,
    reports: Vec<(u32, FileKey, u64)>,
    store_full: u64,
    /// Sum over the VMs.
    granted: u64,
    /// Store page up to which strays are cleared.
    cleared: StorePage,
    /// While only learning.
    estimate: Option<Estimate>,
}

impl Group {
    /// A store in `file`. Pages that are in it already are adopted: those that none of the
    /// VMs `waiting` [announces](Self::announce) are given back to the host.
    pub fn new(file: StoreFile, limits: Limits, waiting: HashSet<u32>) -> io::Result<Self> {
        let mut seed = [0; 8];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
        let seed = u64::from_ne_bytes(seed);
        let mut index = Index::new();
        let vms = waiting.iter().map(|&vm| (vm, Vm::default())).collect();
        let adoption = Adoption::begin(&file, seed, waiting, |page, hash| {
            index.insert_foreign(page, hash);
        })?;
        let mut group = Self {
            file,
            seed,
            limits,
            index,
            files: Files::default(),
            sightings: Sightings::default(),
            vms,
            adoption: Some(adoption),
            reports: Vec::new(),
            store_full: 0,
            granted: 0,
            cleared: 0,
            estimate: None,
        };
        group.finish_adoption();
        Ok(group)
    }

    /// A store in anonymous memory.
    pub fn anonymous() -> io::Result<Self> {
        Self::new(StoreFile::anonymous()?, Limits::default(), HashSet::new())
    }

    /// Seed for [`hash_page`].
    pub fn hash_seed(&self) -> u64 {
        self.seed
    }

    /// A descriptor of the store that can only be read.
    pub fn read_only(&self) -> io::Result<OwnedFd> {
        self.file.read_only()
    }

    /// Memory that the canonical pages take, bytes, as the host's kernel counts it.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.file.allocated_bytes()
    }

    #[cfg(test)]
    pub(super) fn replace_file(&mut self, file: StoreFile) {
        self.file = file;
    }

    /// Changes what the group may take. What it has stays.
    pub fn set_limits(&mut self, store_pages: u64, granted_pages: u64) {
        self.limits.store_pages = store_pages;
        self.limits.granted_pages = granted_pages;
    }

    /// Only learns who has what, or shares. While learning nothing is granted or published
    /// that was not before.
    pub fn set_learning(&mut self, learning: bool) {
        if learning != self.estimate.is_some() {
            self.estimate = learning.then(Estimate::default);
        }
    }

    /// Changes what a VM may take. What it has stays.
    pub fn set_vm_limits(&mut self, vm: u32, limits: VmLimits) {
        self.vms.entry(vm).or_default().limits = limits;
    }

    /// A VM has joined.
    pub fn add_vm(&mut self, vm: u32) {
        self.vms.entry(vm).or_default();
    }

    /// A VM's process has ended: it maps nothing any more.
    pub fn end_vm(&mut self, vm: u32) {
        self.sightings.remove_vm(&mut self.files, vm);
        if let Some(estimate) = &mut self.estimate {
            estimate.remove_vm(vm);
        }
        self.reports.retain(|&(of, ..)| of != vm);
        if let Some(ended) = self.vms.remove(&vm) {
            self.granted -= ended.granted.len();
            self.drop_references(&ended.granted);
        }
        if let Some(adoption) = &mut self.adoption {
            adoption.settle(vm);
        }
        self.finish_adoption();
        self.clear_strays();
    }

    /// Gives back memory that belongs to no page: whoever maps the store and touches what lies
    /// between its pages makes the kernel take some, and no limit counts it. Returns whether
    /// there is more to do, which can wait.
    pub fn clear_strays(&mut self) -> bool {
        match self.try_clear_strays() {
            Ok(more) => more,
            Err(error) => {
                log::error!("cannot give memory between the pages back: {error}");
                false
            }
        }
    }

    fn try_clear_strays(&mut self) -> io::Result<bool> {
        // What was there when a file was taken over is in the index until that is over.
        let pages = self.index.len() as u64;
        let most = pages + pages / STRAY_PART + STRAY_PAGES;
        if self.adoption.is_some() || self.file.allocated_bytes()? / PAGE as u64 <= most {
            return Ok(false);
        }
        let mut used = RoaringBitmap::new();
        for vm in self.vms.values() {
            used |= &vm.granted;
        }
        // Every page is granted to somebody. Should one not be, nothing may go: it may be mapped.
        if used.len() != pages {
            return Err(io::Error::other(format!(
                "{pages} pages, of which {} are granted",
                used.len()
            )));
        }
        let end = self.file.pages()?;
        let mut from = std::mem::take(&mut self.cleared);
        used.remove_range(..from);
        used.remove_range(end..);
        let mut cleared = 0;
        for span in spans(&used) {
            if cleared == MAX_CLEARED {
                self.cleared = from;
                return Ok(true);
            }
            if from < span.page {
                self.file.punch(from, span.page - from)?;
                cleared += 1;
            }
            from = span.page + span.pages;
        }
        if from < end {
            self.file.punch(from, end - from)?;
        }
        Ok(false)
    }

    /// Whether the VM lived under an earlier daemon and may map pages it has not announced.
    pub fn is_waiting_for(&self, vm: u32) -> bool {
        self.adoption
            .as_ref()
            .is_some_and(|adoption| adoption.is_waiting_for(vm))
    }

    /// Whether no VM is left.
    pub fn is_empty(&self) -> bool {
        self.vms.is_empty()
    }

    /// [`crate::protocol::EngineRequest::Lookup`]
    pub fn lookup(
        &mut self,
        vm: u32,
        spans: &[FileSpan],
        out: &mut Vec<Segment>,
    ) -> Result<(), StoreError> {
        self.known(vm)?;
        check_spans(spans.iter().map(|it| (it.page, u64::from(it.pages))))?;
        let begin = out.len();
        for span in spans {
            let pages = span.page..span.page.saturating_add(u64::from(span.pages));
            match self.files.find(&span.file) {
                Some(file) => self.index.lookup(&self.files, file, pages, |store| {
                    append(out, begin, Segment { pages: 1, store });
                }),
                None => append(
                    out,
                    begin,
                    Segment {
                        pages: (pages.end - pages.start) as u32,
                        store: None,
                    },
                ),
            }
        }
        for Segment { pages, store } in out.split_off(begin) {
            let granted = store.map_or(0, |first| self.grant_range(vm, first, pages));
            let found = Segment {
                pages: granted,
                store,
            };
            append(out, begin, found);
            let rest = Segment {
                pages: pages - granted,
                store: None,
            };
            append(out, begin, rest);
        }
        Ok(())
    }

    /// [`crate::protocol::EngineRequest::Sight`]
    pub fn sight(
        &mut self,
        vm: u32,
        sightings: &[Sighting],
        out: &mut Vec<Verdict>,
    ) -> Result<(), StoreError> {
        self.known(vm)?;
        check_spans(sightings.iter().map(|it| (it.page, it.hashes.len() as u64)))?;
        for sighting in sightings {
            for (&hash, page) in sighting.hashes.iter().zip(sighting.page..) {
                out.push(self.sight_page(vm, &sighting.file, page, hash));
            }
        }
        Ok(())
    }

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

    /// [`crate::protocol::EngineRequest::Release`]. What was not granted is passed over.
    pub fn release(&mut self, vm: u32, spans: &[StoreSpan]) -> Result<(), StoreError> {
        self.known(vm)?;
        let granted = &mut self.vms.entry(vm).or_default().granted;
        let mut released = RoaringBitmap::new();
        for span in spans {
            let end = span.page.saturating_add(span.pages);
            let mut pages = granted.iter();
            pages.advance_to(span.page);
            released.extend(pages.take_while(|&page| page < end));
            granted.remove_range(span.page..end);
        }
        self.granted -= released.len();
        self.drop_references(&released);
        Ok(())
    }

    /// A VM's engine has connected again. What it was granted before and has not announced by
    /// the end of its announcement it does not map: the answer was lost.
    pub fn begin_announcement(&mut self, vm: u32) {
        if let Some(it) = self.vms.get_mut(&vm) {
            it.renewed = Some(RoaringBitmap::new());
        }
    }

    /// [`crate::protocol::EngineRequest::Announce`]. Only pages that are in the store can be
    /// announced; anything else is passed over.
    pub fn announce(
        &mut self,
        vm: u32,
        holdings: &[Holding],
        last: bool,
    ) -> Result<(), StoreError> {
        self.known(vm)?;
        // Under the daemon before it was granted what it maps, whatever the limits are now.
        let adopted = self.is_waiting_for(vm);
        // What is wrong in them is passed over below.
        let checked = check_spans(holdings.iter().map(|it| (0, u64::from(it.span.pages))));
        if let (Err(_), Some(it)) = (&checked, self.vms.get_mut(&vm)) {
            // Nobody knows what it maps.
            it.renewed = None;
        }
        checked?;
        for Holding { span, store } in holdings {
            let pages = span.page..span.page.saturating_add(u64::from(span.pages));
            let stores = *store..store.saturating_add(span.pages);
            if !stores.clone().any(|store| self.index.page(store).is_some()) {
                continue;
            }
            let file = self.files.intern(&span.file);
            for (page, store) in pages.zip(stores) {
                if self.index.page(store).is_some() && (adopted || self.admits(vm, store)) {
                    self.index.restore_chunk(&mut self.files, file, page, store);
                    self.index.name(&mut self.files, file, page, store);
                    self.grant(vm, store);
                }
            }
            self.files.prune(file);
        }
        if last {
            self.drop_unannounced(vm);
            if let Some(adoption) = &mut self.adoption {
                adoption.settle(vm);
            }
            self.finish_adoption();
        }
        Ok(())
    }

    /// [`crate::protocol::EngineRequest::Forget`]
    pub fn forget(&mut self, vm: u32, span: FileSpan) -> Result<(), StoreError> {
        self.known(vm)?;
        let end = match span.pages {
            0 => u64::MAX,
            pages => span.page.saturating_add(u64::from(pages)),
        };
        if let Some(estimate) = &mut self.estimate {
            estimate.forget(vm, &span.file, span.page, end);
        }
        if let Some(file) = self.files.find(&span.file) {
            self.sightings
                .remove_range(&mut self.files, vm, file, span.page, end);
        }
        Ok(())
    }

    /// Pages granted to this VM and to no other, now and when this was called before. Pages whose
    /// second user has only gone for a moment, or is about to come, are not among them.
    pub fn take_alone(&mut self, vm: u32) -> Vec<StoreSpan> {
        if self.adoption.is_some() {
            return Vec::new();
        }
        // Set by set: a look at each page would hold up everybody for milliseconds.
        let (mut alone, mut others) = (RoaringBitmap::new(), RoaringBitmap::new());
        for (number, it) in &self.vms {
            let set = if *number == vm {
                &mut alone
            } else {
                &mut others
            };
            *set |= &it.granted;
        }
        alone -= others;
        let Some(it) = self.vms.get_mut(&vm) else {
            return Vec::new();
        };
        let before = std::mem::replace(&mut it.alone, alone);
        spans(&(before & &it.alone))
    }

    /// File pages that have become worth sharing, and the VMs whose guests should report
    /// them again. Each is told once.
    pub fn take_reports(&mut self) -> BTreeMap<u32, Vec<FileSpan>> {
        let mut pages = std::mem::take(&mut self.reports);
        pages.sort_unstable();
        pages.dedup();
        let mut reports = BTreeMap::<u32, Vec<FileSpan>>::new();
        for (vm, file, page) in pages {
            let spans = reports.entry(vm).or_default();
            match spans.last_mut() {
                Some(last)
                    if last.file == file
                        && last.page + u64::from(last.pages) == page
                        && last.pages < u32::MAX =>
                {
                    last.pages += 1;
                }
                _ => spans.push(FileSpan {
                    file,
                    page,
                    pages: 1,
                }),
            }
        }
        reports
    }

    /// [`Self::take_reports`] for one VM; those for others stay.
    pub fn take_reports_of(&mut self, vm: u32) -> Vec<FileSpan> {
        let others = self
            .reports
            .iter()
            .copied()
            .filter(|&(of, ..)| of != vm)
            .collect();
        self.reports.retain(|&(of, ..)| of == vm);
        let spans = self.take_reports().remove(&vm).unwrap_or_default();
        self.reports = others;
        spans
    }

    /// Whether [`Self::take_reports`] has any.
    pub fn has_reports(&self) -> bool {
        !self.reports.is_empty()
    }

    /// Figures of the group.
    pub fn statistics(&self) -> GroupStatistics {
        let granted: u64 = self
            .vms
            .values()
            .map(|vm| vm.granted.serialized_size() as u64)
            .sum();
        let estimate = self.estimate.as_ref().map_or(0, Estimate::bytes);
        let index = self.index.bytes() + self.files.bytes() + self.sightings.bytes() + estimate;
        GroupStatistics {
            store_pages: self.index.len() as u64,
            remembered: self.sightings.len() as u64,
            files: self.files.len() as u64,
            index_bytes: index as u64 + granted,
            store_full: self.store_full,
            adopting: self.adoption.is_some(),
            would_share: self
                .estimate
                .as_ref()
                .map(|estimate| (estimate.shared(), estimate.contents())),
        }
    }

    /// Canonical pages by the file they belong to. Those of an earlier daemon that nobody has
    /// announced yet belong to none.
    pub fn pages_by_file(&self) -> BTreeMap<FileKey, u64> {
        self.index.pages_by_file(&self.files)
    }

    /// Figures of one VM.
    pub fn vm_statistics(&self, vm: u32) -> VmStatistics {
        self.vms
            .get(&vm)
            .map_or_else(VmStatistics::default, |it| VmStatistics {
                granted: it.granted.len(),
                published: it.published,
                remembered: self.sightings.pages_of(vm) as u64,
                limited: it.limited,
            })
    }

    fn known(&self, vm: u32) -> Result<(), StoreError> {
        if self.vms.contains_key(&vm) {
            Ok(())
        } else {
            Err(StoreError::Refused(format!(
                "VM {vm} does not belong to this trust group"
            )))
        }
    }

    fn sight_page(&mut self, vm: u32, key: &FileKey, page: u64, hash: u64) -> Verdict {
        let found = self.index.candidates(hash).next();
        if let Some(estimate) = &mut self.estimate {
            let granted = |vm: &Vm| found.is_some_and(|store| vm.granted.contains(store));
            if !self.vms.get(&vm).is_some_and(granted) {
                let limits = (self.limits.sightings_per_vm, self.limits.files_per_vm);
                estimate.note((vm, key, page), hash, limits);
                return Verdict::Remembered;
            }
        }
        if let Some(store) = found {
            if !self.admits(vm, store) {
                return Verdict::Remembered;
            }
            let file = self.files.intern(key);
            self.index.name(&mut self.files, file, page, store);
            self.files.prune(file);
            self.grant(vm, store);
            return Verdict::Found(store);
        }
        let file = self.files.intern(key);
        let reporter = Reporter { vm, file, page };
        let verdict = match self.sightings.find(hash) {
            Some(other) if other != reporter => Verdict::Publish,
            Some(_) => Verdict::Remembered,
            None => {
                if self.sightings.pages_of(vm) < self.limits.sightings_per_vm
                    && self.sightings.files_of(vm) < self.limits.files_per_vm
                {
                    self.sightings.insert(&mut self.files, reporter, hash);
                }
                Verdict::Remembered
            }
        };
        self.files.prune(file);
        verdict
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

    /// Writes a page into memory that nobody has mapped before it was a page.
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
    fn consume_sighting(&mut self, by: Reporter, hash: u64) {
        if let Some(first) = self.sightings.find(hash) {
            if first != by {
                self.reports
                    .push((first.vm, self.files.get(first.file).key, first.page));
            }
            self.sightings.remove(&mut self.files, first);
        }
    }

    fn drop_unannounced(&mut self, vm: u32) {
        let Some(it) = self.vms.get_mut(&vm) else {
            return;
        };
        let Some(renewed) = it.renewed.take() else {
            return;
        };
        let lost = &it.granted - renewed;
        it.granted -= &lost;
        self.granted -= lost.len();
        self.drop_references(&lost);
    }

    fn grant(&mut self, vm: u32, store: StorePage) {
        let Some(page) = self.index.page_mut(store) else {
            return;
        };
        let vm = self.vms.entry(vm).or_default();
        if let Some(renewed) = &mut vm.renewed {
            renewed.insert(store);
        }
        if vm.granted.insert(store) {
            page.references += 1;
            self.granted += 1;
        }
    }

    /// Grants as many pages from `first` on, all of them in the index, as the limits allow;
    /// how many.
    fn grant_range(&mut self, vm: u32, first: StorePage, pages: u32) -> u32 {
        let room = self.room(vm);
        let Vm {
            granted, renewed, ..
        } = self.vms.entry(vm).or_default();
        let mut new = RoaringBitmap::new();
        new.insert_range(first..first + pages);
        for page in granted.range(first..first + pages) {
            new.remove(page);
        }
        // The first new page that is one too many.
        let end = u32::try_from(room).ok().and_then(|room| new.select(room));
        let end = end.unwrap_or(first + pages);
        new.remove_range(end..);
        granted.insert_range(first..end);
        if let Some(renewed) = renewed {
            renewed.insert_range(first..end);
        }
        self.granted += new.len();
        for store in new {
            if let Some(page) = self.index.page_mut(store) {
                page.references += 1;
            }
        }
        let beyond = first + pages - end;
        self.limit(vm, beyond);
        end - first
    }

    /// How many pages more a VM may be granted.
    fn room(&self, vm: u32) -> u64 {
        if self.estimate.is_some() {
            return 0;
        }
        let of_vm = self.vms.get(&vm).map_or(0, |vm| {
            vm.limits.granted_pages.saturating_sub(vm.granted.len())
        });
        of_vm.min(self.limits.granted_pages.saturating_sub(self.granted))
    }

    /// Whether a VM may be granted a page, or is already; counts it if not.
    fn admits(&mut self, vm: u32, store: StorePage) -> bool {
        let granted = |vm: &Vm| vm.granted.contains(store);
        let admitted = self.room(vm) > 0 || self.vms.get(&vm).is_some_and(granted);
        self.limit(vm, u32::from(!admitted));
        admitted
    }

    /// Counts pages that a limit has kept from a VM.
    fn limit(&mut self, vm: u32, pages: u32) {
        if self.estimate.is_some() {
            return;
        }
        if let Some(vm) = self.vms.get_mut(&vm) {
            vm.limited += u64::from(pages);
        }
    }

    /// Takes a reference from each page and gives back to the host what has none left.
    fn drop_references(&mut self, pages: &RoaringBitmap) {
        let mut unused = Vec::new();
        for store in pages {
            let Some(page) = self.index.page_mut(store) else {
                continue;
            };
            page.references -= 1;
            let kept = self
                .adoption
                .as_ref()
                .is_some_and(|adoption| adoption.keeps(store));
            if page.references == 0 && !kept {
                unused.push(store);
            }
        }
        self.free(&unused);
    }

    fn finish_adoption(&mut self) {
        let Some(pages) = self.adoption.as_ref().and_then(Adoption::finished) else {
            return;
        };
        let unused: Vec<_> = pages
            .iter()
            .filter(|&store| {
                self.index
                    .page(store)
                    .is_some_and(|page| page.references == 0)
            })
            .collect();
        self.adoption = None;
        self.free(&unused);
    }

    /// Frees pages, in ascending order, that nobody maps.
    fn free(&mut self, pages: &[StorePage]) {
        let mut rest = pages;
        while let Some(&first) = rest.first() {
            let count = rest
                .iter()
                .zip(first..)
                .take_while(|(at, next)| *at == next)
                .count();
            // First the memory, then the numbers: they may be written again from here on.
            if let Err(error) = self.file.punch(first, count as u32) {
                log::error!("cannot give memory of the page store back: {error}");
            }
            for &store in &rest[..count] {
                let removed = self.index.remove(&mut self.files, store);
                let publisher = removed.and_then(|page| self.vms.get_mut(&page.publisher));
                if let Some(publisher) = publisher {
                    publisher.published = publisher.published.saturating_sub(1);
                }
            }
            rest = &rest[count..];
        }
    }
}

/// Adds `new` to the segments from `begin` on, to the last one if it continues that.
fn append(segments: &mut Vec<Segment>, begin: usize, new: Segment) {
    if new.pages == 0 {
        return;
    }
    if let Some(last) = segments[begin..].last_mut() {
        let continues = match (last.store, new.store) {
            (None, None) => true,
            (Some(first), Some(store)) => first.checked_add(last.pages) == Some(store),
            _ => false,
        };
        if continues {
            last.pages += new.pages;
            return;
        }
    }
    segments.push(new);
}

/// Spans are (first page, pages).
fn check_spans(spans: impl Iterator<Item = (u64, u64)>) -> Result<(), StoreError> {
    let mut all = 0;
    for (first, pages) in spans {
        if first.checked_add(pages).is_none() {
            return Err(StoreError::Refused(format!(
                "{pages} pages from page {first} on: no file is that long"
            )));
        }
        all += pages;
    }
    if all > MAX_REQUEST_PAGES {
        return Err(StoreError::Refused(format!(
            "{all} pages in one request; the most is {MAX_REQUEST_PAGES}"
        )));
    }
    Ok(())
}
