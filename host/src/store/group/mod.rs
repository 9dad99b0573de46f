// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One trust group's store: pages, who is granted them, and who has seen what.

mod limits;
mod publish;
mod statistics;
mod strays;
#[cfg(test)]
mod tests;

pub use self::limits::{Limits, VmLimits};
pub use self::statistics::{GroupStatistics, VmStatistics};

use super::StoreError;
use super::adoption::Adoption;
use super::estimate::Estimate;
use super::file::StoreFile;
use super::files::Files;
use super::index::Index;
use super::sightings::{Reporter, Sightings};
use crate::protocol::{
    FileKey, FileSpan, Holding, Segment, Sighting, StorePage, StoreSpan, Verdict, spans,
};
use roaring::RoaringBitmap;
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How long a page may have one user before it is not worth keeping. A guest without interrupts looks
/// for what it is asked every five seconds, and those who are to share a page take turns: looked at
/// more often, it would be given up before the second has come, published again, and so for ever.
pub(in crate::store) const ALONE: Duration = Duration::from_secs(15);

/// Most pages in one request other than a publication.
pub const MAX_REQUEST_PAGES: u64 = 1 << 16;

#[derive(Debug, Default)]
struct Vm {
    granted: RoaringBitmap,
    published: u64,
    limited: u64,
    limits: VmLimits,
    /// Granted to nobody else whenever that was asked since then.
    alone: Option<(Instant, RoaringBitmap)>,
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
    /// Pages granted to two VMs or more.
    several: RoaringBitmap,
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
            several: RoaringBitmap::new(),
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

    /// Seed for [`crate::store::hash_page`].
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

    #[cfg(test)]
    pub(super) fn free_numbers(&self) -> u64 {
        self.index.free_numbers()
    }

    #[cfg(test)]
    pub(super) fn several(&self) -> &RoaringBitmap {
        &self.several
    }

    /// Only learns who has what, or shares. While learning nothing is granted or published
    /// that was not before.
    pub fn set_learning(&mut self, learning: bool) {
        if learning != self.estimate.is_some() {
            self.estimate = learning.then(Estimate::default);
        }
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

    /// Whether the VM lived under an earlier daemon and may map pages it has not announced.
    pub fn is_waiting_for(&self, vm: u32) -> bool {
        self.adoption
            .as_ref()
            .is_some_and(|adoption| adoption.is_waiting_for(vm))
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

    /// [`crate::protocol::EngineRequest::Release`]. What was not granted is passed over.
    pub fn release(&mut self, vm: u32, spans: &[StoreSpan]) -> Result<(), StoreError> {
        self.known(vm)?;
        let granted = &mut self.vms.entry(vm).or_default().granted;
        // To take a range out looks at all that is granted: so all ranges at once.
        let mut released = RoaringBitmap::new();
        for pages in joined(spans) {
            released.extend(granted.range(pages));
        }
        *granted -= &released;
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

    /// Pages that this VM has been granted for a quarter of a minute, and no other whenever this was
    /// called meanwhile; told as often at most. Pages whose second user has only gone for a moment, or
    /// is about to come, are not among them.
    pub fn take_alone(&mut self, vm: u32) -> Vec<StoreSpan> {
        self.take_alone_at(vm, Instant::now())
    }

    pub(super) fn take_alone_at(&mut self, vm: u32, now: Instant) -> Vec<StoreSpan> {
        if self.adoption.is_some() {
            return Vec::new();
        }
        let Some(it) = self.vms.get_mut(&vm) else {
            return Vec::new();
        };
        // As sets: a look at each page would hold up everybody for milliseconds.
        let alone = &it.granted - &self.several;
        let Some((since, before)) = &mut it.alone else {
            it.alone = Some((now, alone));
            return Vec::new();
        };
        *before &= &alone;
        if now.saturating_duration_since(*since) < ALONE {
            return Vec::new();
        }
        let lasting = std::mem::replace(before, alone);
        *since = now;
        spans(&lasting)
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
                    && self.sightings.leaves_of(vm) < self.limits.leaves_per_vm
                {
                    self.sightings.insert(&mut self.files, reporter, hash);
                }
                Verdict::Remembered
            }
        };
        self.files.prune(file);
        verdict
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

    /// Takes a reference from each page and gives back to the host what has none left.
    fn drop_references(&mut self, pages: &RoaringBitmap) {
        let (mut unused, mut single) = (Vec::new(), Vec::new());
        for store in pages {
            let Some(page) = self.index.page_mut(store) else {
                continue;
            };
            page.references -= 1;
            if page.references == 1 {
                single.push(store);
            }
            let kept = self
                .adoption
                .as_ref()
                .is_some_and(|adoption| adoption.keeps(store));
            if page.references == 0 && !kept {
                unused.push(store);
            }
        }
        self.several -= RoaringBitmap::from_iter(single);
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

/// The pages of `spans`, however these lie, in order and each once.
fn joined(spans: &[StoreSpan]) -> Vec<Range<StorePage>> {
    let pages = |span: &StoreSpan| span.page..span.page.saturating_add(span.pages);
    let mut ranges: Vec<_> = spans.iter().map(pages).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let joins = next.start <= last.end;
        if joins {
            last.end = last.end.max(next.end);
        }
        joins
    });
    ranges
}

/// Spans are (first page, pages).
pub(crate) fn check_spans(spans: impl Iterator<Item = (u64, u64)>) -> Result<(), StoreError> {
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
