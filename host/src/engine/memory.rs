// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Lock order: the store's lock (see [`super::sharing`]) before [`Memory`]'s. `Memory` is
//! held for one window of at most 64 pages at a time, never across a request to the store
//! or to the VMM, so that a vCPU that faults and a VMM thread that changes its memory wait
//! microseconds.
//!
//! Guest memory of one process: regions, and what lies over them. Overlays are made in
//! [`super::window`] and become ordinary memory again in [`super::restore`].

#![expect(
    unsafe_code,
    reason = "gives guest memory ranges to the operations of `mapped`"
)]

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Range;

use pagefusion_abi::wire::reason;
use roaring::RoaringBitmap;
use rustix::io::Errno;

use super::attributes::{AttributeMap, Unsuitable, examine};
use super::changes::Changes;
use super::errors::HostErrors;
use super::files::Files;
use super::guest_memory::Kept;
use super::huge_pages::HugePages;
use super::mapped;
use super::mappings::MappingBudget;
use super::overcommit::Overcommit;
use super::overlays::{Overlay, Overlays};
use super::pagemap::Pagemap;
use super::regions::{Piece, Region, Regions};
use super::store_view::StoreView;
use super::uffd::{self, Uffd};
use super::unsplit::{Unsplit, splits_by_rest};
use super::window::Equal;
use super::written::Written;
use crate::protocol::{FileKey, FileSpan, Holding, StoreSpan};
use crate::store::PAGE;

/// Most pages that are write-protected at once: bounds how long a write can wait.
pub const WINDOW_PAGES: usize = 64;

/// A refusal, one of [`reason`].
pub type Refusal = u8;

/// What a region turned out to be.
#[derive(Clone, Debug)]
pub(super) enum Suitability {
    /// Registered for write protection.
    Ready(AttributeMap),
    Refused(Unsuitable),
}

/// Guest memory and everything that lies over it.
#[derive(Debug)]
pub struct Memory {
    pub(super) uffd: Uffd,
    pub(super) regions: Regions,
    /// Regions that are kept mapped.
    pub(super) kept: Vec<Kept>,
    pub(super) suitability: HashMap<u64, Suitability>,
    /// Guest memory that is none of the regions, and why.
    left_out: BTreeMap<u64, (Region, Unsuitable)>,
    pub(super) overlays: Overlays,
    /// Pages of overlays that the guest had written when all were looked at last.
    pub(super) broken: u64,
    pub(super) written: Written,
    pub(super) changes: Changes,
    pub(super) files: Files,
    pub(super) store: Option<StoreView>,
    pub(super) budget: MappingBudget,
    pub(super) pagemap: Pagemap,
    pub(super) huge_pages: HugePages,
    /// Where the batch at hand has split all huge pages.
    pub(super) split: Range<usize>,
    /// Huge pages that overlays hide a part of, which are to be split.
    pub(super) unsplit: Unsplit,
    /// Whether that can wait until the overlays are there.
    pub(super) splits_by_rest: bool,
    paused: bool,
    /// Undos under way; while there are any, what they reach is registered for missing pages.
    pub(super) undoing: u32,
    /// What is, or was while there are some.
    pub(super) undone: Vec<Range<usize>>,
    disabled: Option<String>,
    overcommit: Overcommit,
    pub(super) errors: HostErrors,
    /// Whether this kernel may lift the protection of a page of zeros by itself.
    pub(super) zeros_lose_protection: bool,
    pub(super) buffer: Vec<u8>,
    /// What one window is about; kept for the next one.
    pub(super) equal: Vec<Equal>,
}

impl Memory {
    /// Guest memory of this process; regions are added as the VMM makes them known, by
    /// [`Memory::set_guest_memory`].
    pub fn new(uffd: Uffd) -> io::Result<Self> {
        let uname = rustix::system::uname();
        let release = uname.release().to_string_lossy();
        Ok(Self {
            uffd,
            regions: Regions::default(),
            kept: Vec::new(),
            suitability: HashMap::new(),
            left_out: BTreeMap::new(),
            overlays: Overlays::default(),
            broken: 0,
            written: Written::default(),
            changes: Changes::default(),
            files: Files::default(),
            store: None,
            budget: MappingBudget::new()?,
            pagemap: Pagemap::open()?,
            huge_pages: HugePages::default(),
            split: 0..0,
            unsplit: Unsplit::default(),
            splits_by_rest: splits_by_rest(&release),
            paused: false,
            undoing: 0,
            undone: Vec::new(),
            disabled: None,
            overcommit: Overcommit::now(),
            errors: HostErrors::default(),
            zeros_lose_protection: uffd::zeros_lose_protection(&release),
            buffer: vec![0; WINDOW_PAGES * PAGE],
            equal: Vec::with_capacity(WINDOW_PAGES),
        })
    }

    /// Has it believe that it runs on a kernel which lifts the protection of zeros, for tests.
    #[doc(hidden)]
    pub fn distrust_zeros(&mut self) {
        self.zeros_lose_protection = true;
    }

    /// Whether these are the pages that are mapped.
    pub(super) fn has_store(&self, store: &StoreView) -> bool {
        let same = |own: &StoreView| own.identity() == store.identity();
        self.store.as_ref().is_some_and(same)
    }

    /// Sets the store whose pages are mapped. A different one than before ends every overlay.
    pub fn set_store(&mut self, store: StoreView) -> io::Result<()> {
        if self.has_store(&store) {
            return Ok(());
        }
        self.restore_all()?;
        self.overlays.clear_dropped();
        self.store = Some(store);
        Ok(())
    }

    /// Adds or replaces the region `key`. [`Memory::set_guest_memory`] is the safe way.
    ///
    /// # Safety
    ///
    /// From now on, until the region is removed ([`Memory::remove_region`], [`Memory::set_regions`]
    /// without it, or [`Memory::unmapped`] once it is unmapped) or this is dropped,
    ///
    /// * `region` must be memory of this process that is a guest's: all of it mapped, on whole
    ///   pages, and not seen through Rust references other than to atomics;
    /// * who unmaps, moves or replaces any of it must say so first, as [`Memory::before_unmap`]
    ///   and [`Memory::before_move`] describe.
    ///
    /// The second holds longer for pages that the guest has written to while they were shared:
    /// until [`Memory::unmapped`] is told that they have gone, or this is dropped.
    pub unsafe fn insert_region(&mut self, key: u64, region: Region) -> io::Result<()> {
        if self.regions.get(key) == Some(region) {
            return Ok(());
        }
        self.remove_region(key)?;
        self.regions.insert(key, region);
        Ok(())
    }

    /// Notes that `region`, the one of this `key`, is not to be shared whatever it looks like.
    pub fn leave_out(&mut self, key: u64, region: Region, why: Unsuitable) -> io::Result<()> {
        self.remove_region(key)?;
        self.left_out.insert(key, (region, why));
        Ok(())
    }

    /// Makes these all of guest memory, each with its first frame as its key; whether there is
    /// one that was not known.
    ///
    /// # Safety
    ///
    /// As for [`Memory::insert_region`], for each of them.
    pub unsafe fn set_regions(&mut self, regions: &[Region]) -> io::Result<bool> {
        let gone = |(key, _): &(u64, Region)| regions.iter().all(|it| it.gfn != *key);
        let gone: Vec<_> = self.regions.with_keys().filter(gone).collect();
        for (key, _) in gone {
            self.remove_region(key)?;
        }
        let mut new = false;
        for region in regions {
            new |= self.regions.get(region.gfn) != Some(*region);
            // SAFETY: by contract.
            unsafe { self.insert_region(region.gfn, *region) }?;
        }
        Ok(new)
    }

    /// Removes the region `key`; its overlays become ordinary memory first.
    pub fn remove_region(&mut self, key: u64) -> io::Result<()> {
        self.left_out.remove(&key);
        let Some(region) = self.regions.get(key) else {
            return Ok(());
        };
        self.restore(&region.addresses())?;
        self.forget_spared_at(&region.addresses());
        if let Some(Suitability::Ready(_)) = self.suitability.remove(&key) {
            // It may come back.
            self.changes.lose();
            // The VMM may have unmapped it already; then there is nothing to undo.
            let _ = self.uffd.unregister(&region.addresses());
        }
        self.regions.remove(key);
        // Another region may have the same memory.
        for range in self.ready_ranges() {
            let both =
                range.start.max(region.addresses().start)..range.end.min(region.addresses().end);
            // Not if it is unmapped already; then nothing can be shared there.
            if !both.is_empty() {
                let _ = self.register_as_before(&both);
            }
        }
        Ok(())
    }

    /// Guest memory, bytes.
    pub fn bytes(&self) -> u64 {
        self.regions.bytes()
    }

    /// Cuts guest frames into pieces of this process.
    pub fn pieces(&self, gfn: u64, pages: u64) -> impl Iterator<Item = Piece> + '_ {
        self.regions.pieces(gfn, pages)
    }

    /// Whether, and why, all of this VM's memory is left alone.
    pub fn disabled(&self) -> Option<String> {
        let strict = || self.overcommit.complaint();
        self.disabled.clone().or_else(strict).or_else(|| {
            let refused = |s: &Suitability| match s {
                Suitability::Refused(why) => Some(why.to_string()),
                Suitability::Ready(_) => None,
            };
            let all = !self.suitability.is_empty()
                && self.suitability.values().all(|s| refused(s).is_some());
            all.then(|| self.suitability.values().find_map(refused))
                .flatten()
        })
    }

    /// Why guest frames are left alone while others may be shared, as far as they were looked at.
    pub(super) fn unsuitable(&self, gfn: u64, pages: u64) -> Option<Unsuitable> {
        let refused = |piece: Piece| match self.suitability.get(&self.regions.find(piece.hva)?.0)? {
            Suitability::Refused(why) => Some(*why),
            Suitability::Ready(_) => None,
        };
        let end = gfn.saturating_add(pages);
        let reached = |(region, _): &&(Region, Unsuitable)| {
            region.gfn < end && gfn < region.gfn.saturating_add(region.pages)
        };
        let left_out = || self.left_out.values().find(reached).map(|(_, why)| *why);
        self.pieces(gfn, pages).find_map(refused).or_else(left_out)
    }

    /// Ends sharing for good, for a reason the operator can read.
    pub fn disable(&mut self, why: &str) -> io::Result<()> {
        self.disabled = Some(why.to_owned());
        self.restore_all()
    }

    /// Whether the operator has paused sharing.
    pub fn paused(&self) -> bool {
        self.paused
    }

    /// Allows or forbids new overlays.
    pub fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// The overlays.
    pub fn overlays(&self) -> &Overlays {
        &self.overlays
    }

    /// Guest memory that has overlays, or had some that were written, as addresses; regions that
    /// continue each other in this process are one range, as they are one mapping.
    pub fn overlaid_ranges(&self) -> Vec<Range<usize>> {
        let regions = self.regions.iter().map(Region::addresses);
        let mut sorted: Vec<_> = regions.filter(|r| self.is_cut(r)).collect();
        sorted.sort_by_key(|range| range.start);
        let mut ranges: Vec<Range<usize>> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match ranges.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => ranges.push(range),
            }
        }
        ranges
    }

    /// Numbers a file. The number is its own as long as an overlay has it, or something that waits in a
    /// huge page; otherwise until it is forgotten with others that nothing uses.
    pub fn file_number(&mut self, key: FileKey) -> Option<u32> {
        self.files.number(key)
    }

    /// The file with this number.
    pub fn file_key(&self, number: u32) -> FileKey {
        self.files.key(number)
    }

    /// Forgets the files that nothing has the number of, neither here nor `at_hand`: the store must be
    /// locked, so that nobody else has any at hand.
    pub(super) fn forget_files(&mut self, at_hand: impl Iterator<Item = u32>) {
        let mut used: RoaringBitmap = at_hand.collect();
        used.extend(self.overlays.iter().map(|(_, overlay)| overlay.file));
        used.extend(self.huge_pages.files());
        self.files.keep(&used);
    }

    /// Has it number fewer files, for tests.
    #[doc(hidden)]
    pub fn limit_files(&mut self, most: u32) {
        self.files.limit(most);
    }

    /// The mapping budget.
    pub fn budget(&self) -> &MappingBudget {
        &self.budget
    }

    /// What of `granted` and of earlier overlays is not needed any more.
    pub fn take_unneeded(&mut self, granted: &RoaringBitmap) -> Vec<StoreSpan> {
        self.overlays.take_unneeded(granted)
    }

    /// All overlays as a new daemon wants them told.
    pub fn holdings(&self) -> Vec<Holding> {
        let holding = |(_, o): (usize, Overlay)| Holding {
            span: FileSpan {
                file: self.files.key(o.file),
                page: o.page,
                pages: o.pages,
            },
            store: o.store,
        };
        self.overlays.iter().map(holding).collect()
    }

    /// Checks a region once and prepares it; its key.
    pub(super) fn prepare(&mut self, address: usize) -> Result<u64, Refusal> {
        let region = self.regions.find(address).ok_or(reason::OUTSIDE_MEMORY)?;
        let (key, region) = region;
        if self.overcommit.is_strict() {
            return Err(reason::UNSUITABLE_MEMORY);
        }
        let range = region.addresses();
        if self.changes.touch(&range) {
            self.changes.lose();
            return Err(reason::UNSUITABLE_MEMORY);
        }
        match self.suitability.get(&key) {
            Some(Suitability::Ready(_)) => return Ok(key),
            Some(Suitability::Refused(_)) => return Err(reason::UNSUITABLE_MEMORY),
            None => {}
        }
        let is_ours = |at: usize| self.overlays.contains(at) || self.written.contains(at);
        let examined = examine(&range, is_ours)
            .map_err(|e| self.errors.refuse("looking at guest memory", &e))?;
        let prepared = examined.and_then(|attributes| match self.uffd.register(&range) {
            Ok(()) => Ok(Ok(attributes)),
            Err(Errno::BUSY) => Err(Unsuitable::Userfaultfd),
            Err(e) => Ok(Err(self
                .errors
                .refuse("registering guest memory", &e.into()))),
        });
        match prepared {
            Ok(attributes) => {
                self.suitability
                    .insert(key, Suitability::Ready(attributes?));
                Ok(key)
            }
            Err(why) => {
                log::warn!("guest memory at gfn {:#x} is left alone: {why}", region.gfn);
                self.suitability.insert(key, Suitability::Refused(why));
                Err(reason::UNSUITABLE_MEMORY)
            }
        }
    }

    /// Lets a thread go on that waits at `address`. No window is open while the lock is held,
    /// so nothing is protected for a reason, and a page that is not there was never touched.
    pub fn release_waiter(&self, address: usize) {
        let start = address & !(PAGE - 1);
        let page = start..start + PAGE;
        let _ = self.uffd.unprotect(&page);
        if self.regions.find(start).is_some() && !self.overlays.contains(start) {
            let _ = self.uffd.zero(&page);
        }
        let _ = self.uffd.wake(&page);
    }

    /// While an undo is under way, a page that was never there is filled only by whoever serves
    /// events, who needs our lock: before we look at guest memory, such pages get the zeros that
    /// they would show.
    pub(super) fn fill_missing(&self, range: &Range<usize>) {
        if self.undoing > 0 {
            // One of an overlay is the store's, whether it is there or not.
            let missing = |page: &usize| !self.overlays.contains(*page);
            for page in range.clone().step_by(PAGE).filter(missing) {
                // One that is there already stays as it is.
                let _ = self.uffd.zero(&(page..page + PAGE));
            }
        }
    }

    /// Copies guest memory out, for hashing and publishing.
    pub fn copy_out(&self, address: usize, into: &mut [u8]) -> Result<(), Refusal> {
        let inside = |(_, r): (u64, Region)| address + into.len() <= r.addresses().end;
        if !self.regions.find(address).is_some_and(inside) {
            return Err(reason::OUTSIDE_MEMORY);
        }
        self.fill_missing(&(address..address + into.len()));
        // SAFETY: part of a region, which stays mapped while this lock is held.
        unsafe { mapped::copy_out(address, into) };
        Ok(())
    }

    /// Whether sharing is neither paused nor at an end.
    pub(super) fn allowed(&self) -> Result<(), Refusal> {
        if self.paused || self.disabled.is_some() {
            return Err(reason::PAUSED);
        }
        Ok(())
    }

    /// Checks that guest memory at `address` may be shared at all.
    pub fn check(&mut self, address: usize) -> Result<(), Refusal> {
        self.allowed()?;
        self.prepare(address).map(drop)
    }

    /// Pages on overlays, without those that the guest had written when [`super::tidy()`] looked last:
    /// what a guest is told. Only [`super::audit()`] knows how many have been written since.
    pub fn pages_shared(&self) -> u64 {
        self.overlays.pages().saturating_sub(self.broken)
    }

    /// Gives back what comparing with the store has cost: for when nothing is compared for a
    /// while.
    pub fn look_away(&mut self) {
        if let Some(store) = &mut self.store {
            store.look_away();
        }
    }
}
