// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Lock order: the store's lock (see [`super::sharing`]) before [`Memory`]'s. `Memory` is
//! held for one window of at most 64 pages at a time, never across a request to the store
//! or to the VMM, so that a vCPU that faults and a VMM thread that changes its memory wait
//! microseconds.
//!
//! Guest memory of one process: regions, what lies over them, and how they become ordinary
//! again. Overlays are made in [`super::window`].

#![expect(
    unsafe_code,
    reason = "gives guest memory ranges to the operations of `mapped`"
)]

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use pagefusion_abi::wire::reason;
use roaring::RoaringBitmap;
use rustix::io::Errno;

use super::attributes::{AttributeMap, Attributes, Unsuitable, examine};
use super::changes::Changes;
use super::files::Files;
use super::huge_pages::HugePages;
use super::mapped;
use super::mappings::MappingBudget;
use super::overcommit::Overcommit;
use super::overlays::{Overlay, Overlays};
use super::pagemap::Pagemap;
use super::regions::{Piece, Region, Regions};
use super::store_view::StoreView;
use super::uffd::Uffd;
use super::window::{Equal, lift, ones};
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
    pub(super) suitability: HashMap<u64, Suitability>,
    pub(super) overlays: Overlays,
    pub(super) written: Written,
    pub(super) changes: Changes,
    pub(super) files: Files,
    pub(super) store: Option<StoreView>,
    pub(super) budget: MappingBudget,
    pub(super) pagemap: Pagemap,
    pub(super) huge_pages: HugePages,
    /// Where the batch at hand has split all huge pages.
    pub(super) split: Range<usize>,
    paused: bool,
    /// Undos under way; while there are any, regions are registered for missing pages.
    undoing: u32,
    disabled: Option<String>,
    overcommit: Overcommit,
    buffer: Vec<u8>,
    /// What one window is about; kept for the next one.
    pub(super) equal: Vec<Equal>,
}

impl Memory {
    /// Guest memory of this process; regions are added as the VMM makes them known.
    pub fn new(uffd: Uffd) -> io::Result<Self> {
        Ok(Self {
            uffd,
            regions: Regions::default(),
            suitability: HashMap::new(),
            overlays: Overlays::default(),
            written: Written::default(),
            changes: Changes::default(),
            files: Files::default(),
            store: None,
            budget: MappingBudget::new()?,
            pagemap: Pagemap::open()?,
            huge_pages: HugePages::default(),
            split: 0..0,
            paused: false,
            undoing: 0,
            disabled: None,
            overcommit: Overcommit::now(),
            buffer: vec![0; WINDOW_PAGES * PAGE],
            equal: Vec::with_capacity(WINDOW_PAGES),
        })
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

    /// Adds or replaces the region `key`.
    pub fn insert_region(&mut self, key: u64, region: Region) -> io::Result<()> {
        if self.regions.get(key) == Some(region) {
            return Ok(());
        }
        self.remove_region(key)?;
        self.regions.insert(key, region);
        Ok(())
    }

    /// Makes these all of guest memory, each with its first frame as its key; whether there is
    /// one that was not known.
    pub fn set_regions(&mut self, regions: &[Region]) -> io::Result<bool> {
        let gone = |(key, _): &(u64, Region)| regions.iter().all(|it| it.gfn != *key);
        let gone: Vec<_> = self.regions.with_keys().filter(gone).collect();
        for (key, _) in gone {
            self.remove_region(key)?;
        }
        let mut new = false;
        for region in regions {
            new |= self.regions.get(region.gfn) != Some(*region);
            self.insert_region(region.gfn, *region)?;
        }
        Ok(new)
    }

    /// Removes the region `key`; its overlays become ordinary memory first.
    pub fn remove_region(&mut self, key: u64) -> io::Result<()> {
        let Some(region) = self.regions.get(key) else {
            return Ok(());
        };
        self.restore(&region.addresses())?;
        self.forget_spared_at(&region.addresses());
        if let Some(Suitability::Ready(_)) = self.suitability.remove(&key) {
            // The VMM may have unmapped it already; then there is nothing to undo.
            let _ = self.uffd.unregister(&region.addresses());
        }
        self.regions.remove(key);
        // Another region may have the same memory.
        for range in self.ready_ranges() {
            let both =
                range.start.max(region.addresses().start)..range.end.min(region.addresses().end);
            // Not if it is unmapped already; then nothing can be shared there.
            if !both.is_empty() && self.uffd.register(&both).is_ok() && self.undoing > 0 {
                let _ = self.uffd.register_missing(&both);
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
            return Err(reason::UNSUITABLE_MEMORY);
        }
        match self.suitability.get(&key) {
            Some(Suitability::Ready(_)) => return Ok(key),
            Some(Suitability::Refused(_)) => return Err(reason::UNSUITABLE_MEMORY),
            None => {}
        }
        let is_ours = |at: usize| self.overlays.contains(at) || self.written.contains(at);
        let examined =
            examine(&range, is_ours).map_err(|e| host_error("looking at guest memory", &e))?;
        let prepared = examined.and_then(|attributes| match self.uffd.register(&range) {
            Ok(()) => Ok(Ok(attributes)),
            Err(Errno::BUSY) => Err(Unsuitable::Userfaultfd),
            Err(e) => Ok(Err(host_error("registering guest memory", &e.into()))),
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

    /// The VMM discards `range` next, which cannot fail but for locked memory, unless that is discarded
    /// as well: what lies there is nobody's any more, no device's either, and all of it becomes
    /// ordinary memory.
    pub fn before_discard(&mut self, range: &Range<usize>, locked_too: bool) -> io::Result<()> {
        let overlays = self.overlays.in_range(range);
        let mut parts: Vec<_> = overlays
            .map(|(at, overlay)| (at..at + overlay.pages as usize * PAGE, None))
            .collect();
        let written = self.written.in_range(range);
        parts.extend(
            written
                .into_iter()
                .map(|(part, before)| (part, Some(before))),
        );
        for (part, before) in parts {
            let mut start = part.start;
            while start < part.end {
                let known = self.known_at(start);
                let before = before.map(|attributes| (attributes, part.end));
                let Some((attributes, end)) = known.or(before) else {
                    return Err(stray_overlay());
                };
                let piece = start..end.min(part.end);
                start = piece.end;
                // What may be shared is not locked.
                if known.is_none() && !locked_too && mapped::is_locked(&piece) {
                    continue;
                }
                // SAFETY: guest memory that the VMM gives up.
                unsafe { mapped::map_empty(&piece, &attributes) }?;
                self.overlays.remove(&piece);
                self.written.remove(&piece);
                if known.is_some() {
                    self.uffd.register(&piece)?;
                    if self.undoing > 0 {
                        self.uffd.register_missing(&piece)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// What memory at `address` is made of, and up to where, if it may be shared.
    fn known_at(&self, address: usize) -> Option<(Attributes, usize)> {
        // Two regions may have the same memory: KVM's slots of video memory do.
        self.regions.all_at(address).find_map(|key| {
            let Some(Suitability::Ready(known)) = self.suitability.get(&key) else {
                return None;
            };
            known
                .at(address)
                .map(|(attributes, end)| (*attributes, end))
        })
    }

    /// Turns the overlays in `range` back into ordinary memory with the same content. What the
    /// guest has written stays where it is, in a mapping of the store's file: a device may be
    /// writing to it, by its physical address.
    pub fn restore(&mut self, range: &Range<usize>) -> io::Result<()> {
        if !self.overlays.intersects(range) {
            return Ok(());
        }
        self.begin_undo()?;
        let result = loop {
            match self.restore_some(range) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        self.end_undo();
        result
    }

    /// Prepares for [`Memory::restore_some`]; [`Memory::end_undo`] must follow.
    ///
    /// Mappings become one again only if their registration is the same when their first page
    /// is filled, so all of guest memory is registered for missing pages while an undo is
    /// under way. Whoever serves events fills what a guest touches first meanwhile.
    pub fn begin_undo(&mut self) -> io::Result<()> {
        if self.undoing == 0 {
            for range in self.ready_ranges() {
                if let Err(e) = self.uffd.register_missing(&range) {
                    // Whoever touches a missing page would take a detour for ever.
                    self.register_again();
                    return Err(e.into());
                }
            }
        }
        self.undoing += 1;
        Ok(())
    }

    /// Ends what [`Memory::begin_undo`] began.
    pub fn end_undo(&mut self) {
        self.undoing -= 1;
        if self.undoing == 0 {
            self.register_again();
        }
    }

    fn register_again(&self) {
        for range in self.ready_ranges() {
            // To register for less changes nothing: the kernel passes over what has all that is
            // asked for. No window is open, so nothing is protected meanwhile, and whoever
            // waits is woken.
            let _ = self.uffd.unregister(&range);
            if let Err(e) = self.uffd.register(&range) {
                log::error!("cannot register guest memory again: {e}");
            }
        }
    }

    fn ready_ranges(&self) -> Vec<Range<usize>> {
        let ready = self
            .suitability
            .iter()
            .filter(|(_, s)| matches!(s, Suitability::Ready(_)));
        ready
            .filter_map(|(key, _)| self.regions.get(*key))
            .map(|r| r.addresses())
            .collect()
    }

    /// Turns at most [`WINDOW_PAGES`] pages in `range` back into ordinary memory, from the
    /// lowest address on; whether there was something to do. Only while an undo is under way.
    /// Pages that the guest has written are overlays no more, and stay where they are.
    pub fn restore_some(&mut self, range: &Range<usize>) -> io::Result<bool> {
        let Some((address, overlay)) = self.overlays.in_range(range).next() else {
            return Ok(false);
        };
        let Some((attributes, end)) = self.known_at(address) else {
            return Err(stray_overlay());
        };
        let pages = (overlay.pages as usize).min(WINDOW_PAGES);
        let part = address..end.min(address + pages * PAGE);
        // An overlay made after the undo began is registered for less.
        self.uffd.register_missing(&part)?;
        let result = self.restore_part(&part, &attributes);
        // After an error.
        for (at, overlay) in self.overlays.in_range(&part) {
            let left = at..at + overlay.pages as usize * PAGE;
            lift(&self.uffd, &left);
            let _ = self.uffd.wake(&left);
        }
        result.map(|()| true)
    }

    /// A window of an undo. After an error the caller lifts the protection of what is left.
    fn restore_part(&mut self, part: &Range<usize>, attributes: &Attributes) -> io::Result<()> {
        let pages = part.len() / PAGE;
        let before = self.pagemap.intact_now(part.start, pages)?;
        // From here on no page is written that lies on the store still, by no device either: who
        // wants to write to it by its physical address must first have a copy of it made.
        self.uffd.protect(part)?;
        let intact = before & !self.pagemap.present_own_now(part.start, pages)?;
        let range = |(first, count): (usize, usize)| {
            part.start + first * PAGE..part.start + (first + count) * PAGE
        };
        for run in ones(!intact & mapped::mask(pages), pages).map(range) {
            self.written.insert(&run, *attributes);
            self.overlays.remove(&run);
            lift(&self.uffd, &run);
            let _ = self.uffd.wake(&run);
        }
        for run in ones(intact, pages).map(range) {
            // SAFETY: an overlay of ours, registered by our caller, as long as the buffer at most.
            unsafe { mapped::map_back(&self.uffd, &run, attributes, &mut self.buffer) }?;
            self.overlays.remove(&run);
        }
        Ok(())
    }

    fn restore_all(&mut self) -> io::Result<()> {
        self.restore(&(0..usize::MAX))?;
        self.unregister_all();
        Ok(())
    }

    /// Without overlays and while paused, guest memory is as the VMM made it.
    pub fn unregister_all(&mut self) {
        if !self.overlays.is_empty() || self.undoing > 0 {
            return;
        }
        for range in self.ready_ranges() {
            let _ = self.uffd.unregister(&range);
        }
        self.suitability
            .retain(|_, s| matches!(s, Suitability::Refused(_)));
        self.look_away();
    }

    /// Gives back what comparing with the store has cost: for when nothing is compared for a
    /// while.
    pub fn look_away(&mut self) {
        if let Some(store) = &mut self.store {
            store.look_away();
        }
    }
}

fn stray_overlay() -> io::Error {
    io::Error::other("an overlay outside of guest memory")
}

pub(super) fn host_error(what: &str, error: &io::Error) -> Refusal {
    static TIMES: AtomicU64 = AtomicU64::new(0);
    let times = TIMES.fetch_add(1, Ordering::Relaxed) + 1;
    // Guests decide how often they come here.
    if times.is_power_of_two() {
        log::warn!("{what}: {error} ({times} such errors so far)");
    }
    reason::HOST_ERROR
}
