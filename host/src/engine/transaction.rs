// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What becomes of one batch of runs: the store is asked, what it has is overlaid, what it has not
//! is hashed, and published once a second reporter has come.

use std::collections::BTreeMap;

use pagefusion_abi::wire::{Outcome, reason};
use roaring::RoaringBitmap;

use super::huge_pages::{HUGE_PAGE, Waiting};
use super::memory::{Refusal, WINDOW_PAGES};
use super::overlays::Overlay;
use super::regions::Piece;
use super::sharing::{Connected, ReportedRun, Sharing};
use super::window::Wanted;
use crate::protocol::{
    FileKey, FileSpan, MAX_PUBLISH_PAGES, Segment, Sighting, StorePage, Verdict,
};
use crate::store::batches::{Pages, batches_of};
use crate::store::{PAGE, StoreError, hash_page, whole_pages};

/// Most hashes in one request: what fits a message with room to spare.
const MAX_SIGHTINGS: u64 = 4096;
/// Pages that are copied out to be hashed under one lock: what the nearest cache holds, and much less
/// than a window takes.
const HASHED_AT_ONCE: usize = 4;

/// A piece of a run that is contiguous in file, store candidates and this process.
#[derive(Clone, Copy, Debug)]
struct Part {
    run: usize,
    file: FileKey,
    number: u32,
    page: u64,
    hva: usize,
    pages: usize,
}

impl Part {
    fn slice(self, from: usize, pages: usize) -> Self {
        Self {
            page: self.page + from as u64,
            hva: self.hva + from * PAGE,
            pages,
            ..self
        }
    }

    fn span(&self) -> FileSpan {
        FileSpan {
            file: self.file,
            page: self.page,
            pages: self.pages as u32,
        }
    }

    fn end(&self) -> usize {
        self.hva + self.pages * PAGE
    }

    /// Whether `next` continues this in file, guest and run.
    fn is_followed_by(&self, next: &Self) -> bool {
        self.run == next.run && self.end() == next.hva && self.page + self.pages as u64 == next.page
    }
}

/// Pages of one run, counted while it is resolved.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    pages: u32,
    shared: u32,
    remembered: u32,
    reason: Refusal,
}

impl Pages for Part {
    fn pages(&self) -> u64 {
        self.pages as u64
    }

    fn split_off(&mut self, at: u32) -> Self {
        let rest = self.slice(at as usize, self.pages - at as usize);
        self.pages = at as usize;
        rest
    }
}

impl Segment {
    fn skip(self, pages: u32) -> Self {
        Self {
            pages: self.pages - pages,
            store: self.store.map(|at| at + pages),
        }
    }
}

/// One batch of runs on its way through the store.
pub(super) struct Transaction<'a> {
    sharing: &'a Sharing,
    pinned: &'a dyn Fn() -> bool,
    counts: Vec<Count>,
    parts: Vec<Part>,
    granted: RoaringBitmap,
    /// For pages on their way to the store.
    bytes: Vec<u8>,
}

impl<'a> Transaction<'a> {
    /// The store must be locked until it has run: it has numbers of files at hand.
    pub(super) fn new(
        sharing: &'a Sharing,
        runs: &[ReportedRun],
        pinned: &'a dyn Fn() -> bool,
    ) -> Self {
        let mut this = Self {
            sharing,
            pinned,
            counts: vec![Count::default(); runs.len()],
            parts: Vec::with_capacity(runs.len()),
            granted: RoaringBitmap::new(),
            bytes: Vec::new(),
        };
        let mut memory = sharing.memory();
        let mut pieces: Vec<Piece> = Vec::new();
        // Runs of one file come one after the other.
        let mut known: Option<(FileKey, Option<u32>)> = None;
        let mut may_forget = true;
        for (index, run) in runs.iter().enumerate() {
            this.counts[index].pages = run.pages;
            pieces.clear();
            pieces.extend(memory.pieces(run.gfn, u64::from(run.pages)));
            if pieces.iter().map(|p| p.pages).sum::<usize>() < run.pages as usize {
                this.counts[index].reason = reason::OUTSIDE_MEMORY;
            }
            let number = match known {
                Some((file, number)) if file == run.file => number,
                _ => memory.file_number(run.file).or_else(|| {
                    // To look at all overlays takes long: once is enough.
                    if !std::mem::take(&mut may_forget) {
                        return None;
                    }
                    memory.forget_files(this.parts.iter().map(|part| part.number));
                    memory.file_number(run.file)
                }),
            };
            known = Some((run.file, number));
            for piece in &pieces {
                match (number, memory.check(piece.hva)) {
                    (Some(number), Ok(())) => this.parts.push(Part {
                        run: index,
                        file: run.file,
                        number,
                        page: run.page + piece.offset,
                        hva: piece.hva,
                        pages: piece.pages,
                    }),
                    (None, _) => this.counts[index].reason = reason::TOO_MANY_FILES,
                    (_, Err(why)) => this.counts[index].reason = why,
                }
            }
        }
        drop(memory);
        this
    }

    fn refuse(&mut self, run: usize, why: Refusal) {
        self.counts[run].reason = why;
    }

    pub(super) fn refuse_all(&mut self, why: Refusal) {
        for count in &mut self.counts {
            if count.shared + count.remembered < count.pages && count.reason == reason::NONE {
                count.reason = why;
            }
        }
    }

    pub(super) fn run(&mut self, store: &mut Connected) -> Result<(), StoreError> {
        let parts = std::mem::take(&mut self.parts);
        let spans: Vec<FileSpan> = parts.iter().map(Part::span).collect();
        let mut segments = Vec::new();
        if !spans.is_empty() {
            store.pages.lookup(&spans, &mut segments)?;
        }
        let unknown = self.overlay_found(&parts, &segments)?;
        let mut wanted = Vec::new();
        for batch in batches_of(unknown, MAX_SIGHTINGS) {
            wanted.extend(self.sight(store, &batch)?);
        }
        let wanted = join(self.spare_unpublished(wanted));
        for batch in batches_of(wanted, MAX_PUBLISH_PAGES as u64) {
            self.publish(store, &batch)?;
        }
        let granted = std::mem::take(&mut self.granted);
        self.sharing.give_back(store, &granted)
    }

    /// Overlays what the lookup found; returns what it did not find, or what differed.
    fn overlay_found(
        &mut self,
        parts: &[Part],
        segments: &[Segment],
    ) -> Result<Vec<Part>, StoreError> {
        let mut unknown = Vec::new();
        let mut found = Vec::new();
        let mut segments = segments.iter().copied();
        // A segment may reach over the end of a span into the next.
        let mut rest: Option<Segment> = None;
        for part in parts {
            let mut from = 0;
            while from < part.pages {
                let segment = rest
                    .take()
                    .or_else(|| segments.find(|s| s.pages > 0))
                    .ok_or_else(|| StoreError::Refused("segments end before the spans".into()))?;
                let pages = (segment.pages as usize).min(part.pages - from);
                let here = part.slice(from, pages);
                match segment.store {
                    Some(store) => found.push((here, store)),
                    None => unknown.push(here),
                }
                from += pages;
                rest = Some(segment.skip(pages as u32)).filter(|s| s.pages > 0);
            }
        }
        unknown.extend(self.overlay_unless_spared(found));
        unknown.sort_unstable_by_key(|part| (part.run, part.page));
        Ok(unknown)
    }

    /// As [`Self::overlay`], but for what is spared.
    fn overlay_unless_spared(&mut self, found: Vec<(Part, StorePage)>) -> Vec<Part> {
        for (part, store) in &found {
            self.granted.insert_range(*store..store + part.pages as u32);
        }
        let found = self.spare(found);
        self.overlay(&found)
    }

    /// Takes out what is not worth publishing either, as it would be spared.
    fn spare_unpublished(&mut self, wanted: Vec<Part>) -> Vec<Part> {
        let wanted = wanted.into_iter().map(|part| (part, 0)).collect();
        let rest = self.spare(wanted).into_iter();
        let mut rest: Vec<Part> = rest.map(|(part, _)| part).collect();
        rest.sort_unstable_by_key(|part| (part.run, part.page));
        rest
    }

    /// Takes out what lies in huge pages that are not to be split. It counts as remembered: as
    /// soon as it can be shared, the guest is asked for it.
    fn spare(&mut self, found: Vec<(Part, StorePage)>) -> Vec<(Part, StorePage)> {
        if !self.sharing.memory().spares_huge_pages() {
            return found;
        }
        let mut by_huge_page = BTreeMap::<usize, Vec<(Part, StorePage)>>::new();
        for (part, store) in found {
            let mut from = 0;
            while from < part.pages {
                let huge = (part.hva + from * PAGE) / HUGE_PAGE;
                let room = ((huge + 1) * HUGE_PAGE - part.hva) / PAGE - from;
                let piece = part.slice(from, room.min(part.pages - from));
                let pieces = by_huge_page.entry(huge).or_default();
                pieces.push((piece, store + from as u32));
                from += piece.pages;
            }
        }
        let mut rest = Vec::new();
        for (huge, pieces) in by_huge_page {
            let waiting = |(it, _): &(Part, _)| Waiting::at(it.hva, it.pages, it.number, it.page);
            let waiting: Vec<Waiting> = pieces.iter().map(waiting).collect();
            if self.sharing.memory().spares(huge, &waiting) {
                for (piece, _) in pieces {
                    self.counts[piece.run].remembered += piece.pages as u32;
                }
            } else {
                rest.extend(pieces);
            }
        }
        rest
    }

    /// Overlays parts with the store pages from each one's position on, window by window, by
    /// address: neighbours in guest memory share a window. Returns the sub-parts whose bytes
    /// differ.
    fn overlay(&mut self, found: &[(Part, StorePage)]) -> Vec<Part> {
        let mut windows: Vec<Part> = Vec::with_capacity(found.len());
        let mut wanted: Vec<Wanted> = Vec::with_capacity(found.len());
        for (part, store) in by_address(found) {
            self.granted.insert_range(store..store + part.pages as u32);
            for from in (0..part.pages).step_by(WINDOW_PAGES) {
                let window = part.slice(from, WINDOW_PAGES.min(part.pages - from));
                windows.push(window);
                wanted.push(Wanted {
                    address: window.hva,
                    overlay: Overlay {
                        pages: window.pages as u32,
                        store: store + from as u32,
                        file: window.number,
                        page: window.page,
                    },
                });
            }
        }
        let mut answers = Vec::with_capacity(wanted.len());
        while let Some(rest) = wanted.get(answers.len()..).filter(|it| !it.is_empty()) {
            self.sharing
                .memory()
                .overlay(rest, self.pinned, &mut answers);
        }
        let mut different = Vec::new();
        for (window, answer) in windows.iter().zip(answers) {
            match answer {
                Ok(shared) => {
                    self.counts[window.run].shared += shared.count_ones();
                    if shared.count_ones() as usize != window.pages {
                        different.extend(
                            (0..window.pages)
                                .filter(|i| shared >> i & 1 == 0)
                                .map(|i| window.slice(i, 1)),
                        );
                    }
                }
                Err(why) => self.refuse(window.run, why),
            }
        }
        different.sort_unstable_by_key(|part| (part.run, part.page));
        join(different)
    }

    /// Tells the store what was seen; overlays what it found by content, returns what it
    /// wants published.
    fn sight(&mut self, store: &mut Connected, parts: &[Part]) -> Result<Vec<Part>, StoreError> {
        let mut sightings = Vec::with_capacity(parts.len());
        let mut asked = Vec::with_capacity(parts.len());
        let mut copy = [0; HASHED_AT_ONCE * PAGE];
        for part in parts {
            let mut hashes = Vec::with_capacity(part.pages);
            while hashes.len() < part.pages {
                let address = part.hva + hashes.len() * PAGE;
                let pages = HASHED_AT_ONCE.min(part.pages - hashes.len());
                // A copy: the guest may write meanwhile, and a hash of what changes under it
                // would be one of nothing.
                let copy = &mut copy[..pages * PAGE];
                if let Err(why) = self.sharing.memory().copy_out(address, copy) {
                    self.refuse(part.run, why);
                    break;
                }
                hashes.extend(whole_pages(copy).map(|page| hash_page(store.seed, page)));
            }
            if !hashes.is_empty() {
                asked.push(part.slice(0, hashes.len()));
                sightings.push(Sighting {
                    file: part.file,
                    page: part.page,
                    hashes,
                });
            }
        }
        if sightings.is_empty() {
            return Ok(Vec::new());
        }
        let mut verdicts = Vec::new();
        store.pages.sight(sightings, &mut verdicts)?;
        if verdicts.len() != asked.iter().map(|p| p.pages).sum::<usize>() {
            return Err(StoreError::Refused(
                "as many verdicts as pages were expected".into(),
            ));
        }
        let mut wanted = Vec::new();
        let mut by_content: Vec<(Part, StorePage)> = Vec::new();
        let mut verdicts = verdicts.into_iter();
        for part in asked {
            for (i, verdict) in (0..part.pages).zip(&mut verdicts) {
                let here = part.slice(i, 1);
                match verdict {
                    Verdict::Found(at) => append(&mut by_content, here, at),
                    Verdict::Remembered => self.counts[part.run].remembered += 1,
                    // Joined at once: a part for each page would take ten times its hash.
                    Verdict::Publish => push_joined(&mut wanted, here),
                }
            }
        }
        for different in self.overlay_unless_spared(by_content) {
            self.refuse(different.run, reason::DIFFERENT);
        }
        Ok(wanted)
    }

    /// Sends pages to the store and overlays them with what became of them there.
    fn publish(&mut self, store: &mut Connected, parts: &[Part]) -> Result<(), StoreError> {
        let mut bytes = std::mem::take(&mut self.bytes);
        let most = parts.iter().map(|it| it.pages).sum::<usize>() * PAGE;
        bytes.resize(bytes.len().max(most), 0);
        let mut length = 0;
        let mut sent = Vec::with_capacity(parts.len());
        for part in parts {
            let end = length + part.pages * PAGE;
            match self
                .sharing
                .memory()
                .copy_out(part.hva, &mut bytes[length..end])
            {
                Ok(()) => {
                    length = end;
                    sent.push(*part);
                }
                Err(why) => self.refuse(part.run, why),
            }
        }
        if sent.is_empty() {
            return Ok(());
        }
        let spans: Vec<FileSpan> = sent.iter().map(Part::span).collect();
        let mut positions = Vec::new();
        store
            .pages
            .publish(&spans, &bytes[..length], &mut positions)?;
        self.bytes = bytes;
        if positions.len() * PAGE != length {
            return Err(StoreError::Refused(
                "as many positions as pages were expected".into(),
            ));
        }
        let mut published: Vec<(Part, StorePage)> = Vec::new();
        let mut positions = positions.into_iter();
        for part in sent {
            for (i, position) in (0..part.pages).zip(&mut positions) {
                match position {
                    Some(at) => append(&mut published, part.slice(i, 1), at),
                    None => self.refuse(part.run, reason::STORE_FULL),
                }
            }
        }
        for different in self.overlay(&published) {
            self.refuse(different.run, reason::DIFFERENT);
        }
        Ok(())
    }

    pub(super) fn outcomes(self) -> Vec<Outcome> {
        let outcome = |c: Count| {
            let rest = c.pages.saturating_sub(c.shared + c.remembered);
            let why = if c.reason == reason::NONE {
                reason::DIFFERENT
            } else {
                c.reason
            };
            Outcome {
                reason: if rest == 0 { reason::NONE } else { why },
                shared: u16::try_from(c.shared).unwrap_or(u16::MAX),
                remembered: u16::try_from(c.remembered).unwrap_or(u16::MAX),
            }
        };
        self.counts.into_iter().map(outcome).collect()
    }
}

/// Adds a part, joined with the last one where it continues that and its store pages.
fn append(found: &mut Vec<(Part, StorePage)>, part: Part, at: StorePage) {
    match found.last_mut() {
        Some((last, store)) if last.is_followed_by(&part) && *store + last.pages as u32 == at => {
            last.pages += part.pages;
        }
        _ => found.push((part, at)),
    }
}

/// What was found, in the order of guest memory.
fn by_address(found: &[(Part, StorePage)]) -> Vec<(Part, StorePage)> {
    let mut sorted = found.to_vec();
    sorted.sort_by_key(|(part, _)| part.hva);
    sorted
}

/// Joins parts of one run that follow each other.
fn join(parts: Vec<Part>) -> Vec<Part> {
    let mut joined: Vec<Part> = Vec::with_capacity(parts.len());
    for part in parts {
        push_joined(&mut joined, part);
    }
    joined
}

/// Adds a part, joined with the last one where it continues that.
fn push_joined(parts: &mut Vec<Part>, part: Part) {
    match parts.last_mut() {
        Some(last) if last.is_followed_by(&part) => last.pages += part.pages,
        _ => parts.push(part),
    }
}
