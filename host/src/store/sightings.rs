// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages that one reporter has and nobody else: a hash each, and who it was.
//!
//! A page is one word, its place in the file beside its hash, in a leaf of at most 64 of them
//! that belongs to one file of one VM. From VM and file it is found by [`Places`], from the
//! hash by a table of 32-bit references. What a page takes hardly depends on whether its
//! neighbours were reported as well; `tests/index_memory.rs` measures it.
//!
//! No two entries have the same hash: a second reporter publishes instead.

use super::files::{FileId, Files};
use super::places::{Leaves, Owner, Part, Places};
use super::references::References;
use hashbrown::{DefaultHashBuilder, HashMap};
use std::hash::BuildHasher;

/// Pages of one leaf.
const LEAF: usize = 64;
/// Most leaves: a reference is leaf and slot in 32 bits.
const MAX_LEAVES: usize = 1 << 26;
/// Bits of a word that hold the hash; the others say where in the window the page is.
///
/// Of a thousand million pages two that differ are taken for equal once in a thousand times.
/// The second one is then published, which is what becomes of equal ones as well.
const HASH_BITS: u32 = 48;
/// Pages that one leaf can tell apart: 256 MiB of a file.
const WINDOW: u64 = 1 << (64 - HASH_BITS);

/// Who has a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reporter {
    pub(super) vm: u32,
    pub(super) file: FileId,
    pub(super) page: u64,
}

/// A page in a leaf.
#[derive(Clone, Copy, Debug)]
struct Word(u64);

impl Word {
    fn new(page: u64, hash: u64) -> Self {
        Self((page % WINDOW) << HASH_BITS | short(hash))
    }

    /// Its page, counted from the window's first.
    fn offset(self) -> u64 {
        self.0 >> HASH_BITS
    }

    fn hash(self) -> u64 {
        self.0 & ((1 << HASH_BITS) - 1)
    }
}

/// What is kept of a hash.
fn short(hash: u64) -> u64 {
    hash >> (64 - HASH_BITS)
}

/// In no order; a word stays in its slot until it, or the last one, is removed.
#[derive(Debug, Default)]
struct Leaf {
    vm: u32,
    file: FileId,
    /// Which window of the file.
    window: u64,
    words: Box<[Word]>,
}

impl Leaf {
    fn page(&self, word: Word) -> u64 {
        self.window * WINDOW + word.offset()
    }

    fn push(&mut self, word: Word) {
        let mut words = std::mem::take(&mut self.words).into_vec();
        // Exactly: most files have only few pages here.
        words.reserve_exact(1);
        words.push(word);
        self.words = words.into_boxed_slice();
    }
}

impl Leaves for Vec<Leaf> {
    fn owner(&self, leaf: u32) -> Owner {
        let leaf = &self[leaf as usize];
        (leaf.vm, leaf.file)
    }

    fn first(&self, leaf: u32) -> u64 {
        self[leaf as usize].window * WINDOW
    }
}

#[derive(Debug, Default)]
struct Counts {
    pages: usize,
    files: usize,
    leaves: usize,
}

/// Sightings of a trust group.
#[derive(Debug, Default)]
pub(super) struct Sightings {
    leaves: Vec<Leaf>,
    free: Vec<u32>,
    places: Places,
    by_hash: References,
    by_vm: HashMap<u32, Counts>,
    hasher: DefaultHashBuilder,
    pages: usize,
}

impl Sightings {
    /// Who has a page with this hash.
    pub(super) fn find(&self, hash: u64) -> Option<Reporter> {
        let spread = self.hasher.hash_one(short(hash));
        let is_it = |at| word(&self.leaves, at).1.hash() == short(hash);
        let (leaf, word) = word(&self.leaves, self.by_hash.find(spread, is_it)?);
        Some(Reporter {
            vm: leaf.vm,
            file: leaf.file,
            page: leaf.page(word),
        })
    }

    /// Notes a page whose hash nobody has. What was noted for the same place is replaced.
    /// Returns whether there was room; if not, the caller may have to prune the file.
    pub(super) fn insert(&mut self, files: &mut Files, reporter: Reporter, hash: u64) -> bool {
        debug_assert!(self.find(hash).is_none(), "a second reporter publishes");
        // Held, so that replacing its only page does not forget the file.
        files.hold_sighting(reporter.file);
        self.remove(files, reporter);
        let inserted = self.insert_new(files, reporter, hash);
        files.release_sighting(reporter.file);
        inserted
    }

    fn insert_new(&mut self, files: &mut Files, reporter: Reporter, hash: u64) -> bool {
        let Reporter { vm, file, page } = reporter;
        let Some(index) = self.leaf_with_room(files, (vm, file), page) else {
            return false;
        };
        let slot = self.leaves[index as usize].words.len();
        self.leaves[index as usize].push(Word::new(page, hash));
        self.add_reference(index, slot);
        self.by_vm.entry(vm).or_default().pages += 1;
        self.pages += 1;
        true
    }

    /// The leaf for a page that is not there.
    fn leaf_with_room(&mut self, files: &mut Files, owner: Owner, page: u64) -> Option<u32> {
        let window_start = page / WINDOW * WINDOW;
        let parts = self.places.parts(&self.leaves, owner);
        let Some(part) = parts.range(window_start..=page).next_back() else {
            return self.new_leaf(files, owner, window_start);
        };
        let leaf = &self.leaves[part.leaf as usize];
        if leaf.words.len() < LEAF {
            return Some(part.leaf);
        }
        let offset = page % WINDOW;
        if leaf.words.iter().all(|word| word.offset() < offset) {
            // As files are read: what is full stays full.
            return self.new_leaf(files, owner, page);
        }
        let mut offsets: Vec<_> = leaf.words.iter().map(|word| word.offset()).collect();
        offsets.sort_unstable();
        let middle = offsets[LEAF / 2];
        let upper = self.new_leaf(files, owner, window_start + middle)?;
        self.move_words(part.leaf, upper, middle);
        Some(if offset < middle { part.leaf } else { upper })
    }

    fn new_leaf(&mut self, files: &mut Files, owner: Owner, first: u64) -> Option<u32> {
        let (vm, file) = owner;
        if self.free.is_empty() && self.leaves.len() == MAX_LEAVES {
            return None;
        }
        if self.places.parts(&self.leaves, owner).is_empty() {
            self.by_vm.entry(vm).or_default().files += 1;
        }
        let new = Leaf {
            vm,
            file,
            window: first / WINDOW,
            words: Box::default(),
        };
        let leaf = match self.free.pop() {
            Some(leaf) => {
                self.leaves[leaf as usize] = new;
                leaf
            }
            None => {
                if self.leaves.len() == self.leaves.capacity() {
                    // Not twice as much: half of it would be there for nothing.
                    self.leaves.reserve_exact((self.leaves.len() / 8).max(8));
                }
                self.leaves.push(new);
                (self.leaves.len() - 1) as u32
            }
        };
        self.by_vm.entry(vm).or_default().leaves += 1;
        files.hold_sighting(file);
        self.places
            .insert(&self.leaves, owner, Part { first, leaf });
        Some(leaf)
    }

    /// Moves the pages from `first`, counted from the window's first, on.
    fn move_words(&mut self, from: u32, to: u32, first: u64) {
        for index in [from, to] {
            for slot in 0..self.leaves[index as usize].words.len() {
                self.drop_reference(index, slot);
            }
        }
        let words = std::mem::take(&mut self.leaves[from as usize].words);
        let (go, stay): (Vec<_>, Vec<_>) = words.iter().partition(|word| word.offset() >= first);
        for (index, words) in [(from, stay), (to, go)] {
            self.leaves[index as usize].words = words.into_boxed_slice();
            for slot in 0..self.leaves[index as usize].words.len() {
                self.add_reference(index, slot);
            }
        }
    }

    fn add_reference(&mut self, index: u32, slot: usize) {
        let Self {
            leaves,
            by_hash,
            hasher,
            ..
        } = self;
        let spread = |at| hasher.hash_one(word(leaves, at).1.hash());
        let reference = reference(index, slot);
        by_hash.insert(spread(reference), reference, spread);
    }

    fn drop_reference(&mut self, index: u32, slot: usize) {
        let reference = reference(index, slot);
        let spread = self.hasher.hash_one(word(&self.leaves, reference).1.hash());
        self.by_hash.remove(spread, reference);
    }

    /// Forgets one page.
    pub(super) fn remove(&mut self, files: &mut Files, reporter: Reporter) {
        let Reporter { vm, file, page } = reporter;
        self.remove_range(files, vm, file, page, page.saturating_add(1));
    }

    /// Forgets pages `start .. end` of a file in one VM.
    pub(super) fn remove_range(
        &mut self,
        files: &mut Files,
        vm: u32,
        file: FileId,
        start: u64,
        end: u64,
    ) {
        if start >= end {
            return;
        }
        let owner = (vm, file);
        let parts = self.places.parts(&self.leaves, owner);
        // The last leaf that begins before may reach into it.
        let last_before = parts.range(..=start).next_back();
        let from = last_before.map_or(start, |part| part.first);
        let touched: Vec<_> = parts.range(from..end).collect();
        for &part in &touched {
            self.clear(files, part, |page| (start..end).contains(&page));
        }
        // Whatever lay between the first and the last is gone.
        let parts = self.places.parts(&self.leaves, owner);
        let last_before = parts.range(..from).next_back();
        let near = last_before.map_or(from, |part| part.first);
        let near: Vec<_> = parts.range(near..).take(4).collect();
        for two in near.windows(2).rev() {
            self.join(files, two[0], two[1]);
        }
    }

    /// Makes one leaf of two, side by side, that are nearly empty: pages that are left when
    /// their neighbours have been shared take no more than others.
    fn join(&mut self, files: &mut Files, one: Part, next: Part) {
        let (one, other) = (one.leaf, next.leaf);
        let (left, right) = (&self.leaves[one as usize], &self.leaves[other as usize]);
        let words = left.words.len() + right.words.len();
        if left.window != right.window || words > LEAF / 2 {
            return;
        }
        for slot in 0..right.words.len() {
            self.drop_reference(other, slot);
        }
        let moved = std::mem::take(&mut self.leaves[other as usize].words);
        let slots = self.leaves[one as usize].words.len()..words;
        let kept = std::mem::take(&mut self.leaves[one as usize].words);
        self.leaves[one as usize].words = kept.into_iter().chain(moved).collect();
        for slot in slots {
            self.add_reference(one, slot);
        }
        self.free_leaf(files, next);
    }

    fn free_leaf(&mut self, files: &mut Files, part: Part) {
        let owner = self.leaves.owner(part.leaf);
        self.places.remove(&self.leaves, owner, part);
        self.leaves[part.leaf as usize] = Leaf::default();
        self.free.push(part.leaf);
        let (vm, file) = owner;
        let counts = self.by_vm.entry(vm).or_default();
        counts.leaves -= 1;
        if self.places.parts(&self.leaves, owner).is_empty() {
            counts.files -= 1;
        }
        files.drop_sighting(file);
    }

    /// Forgets all of a VM.
    pub(super) fn remove_vm(&mut self, files: &mut Files, vm: u32) {
        if !self.by_vm.contains_key(&vm) {
            return;
        }
        let is_theirs = |leaf: &Leaf| leaf.vm == vm && !leaf.words.is_empty();
        let theirs = |leaves: &[Leaf], index: &u32| is_theirs(&leaves[*index as usize]);
        // File by file, while the leaves still say whose they are.
        let all = 0..self.leaves.len() as u32;
        for leaf in all.clone().filter(|leaf| theirs(&self.leaves, leaf)) {
            let owner = self.leaves.owner(leaf);
            self.places.remove_all(&self.leaves, owner);
        }
        for index in all {
            if !theirs(&self.leaves, &index) {
                continue;
            }
            for slot in 0..self.leaves[index as usize].words.len() {
                self.drop_reference(index, slot);
            }
            let leaf = std::mem::take(&mut self.leaves[index as usize]);
            self.free.push(index);
            self.pages -= leaf.words.len();
            files.drop_sighting(leaf.file);
        }
        self.by_vm.remove(&vm);
    }

    /// Number of pages noted.
    pub(super) fn len(&self) -> usize {
        self.pages
    }

    /// Number of pages noted for one VM.
    pub(super) fn pages_of(&self, vm: u32) -> usize {
        self.by_vm.get(&vm).map_or(0, |counts| counts.pages)
    }

    /// Number of files of which pages are noted for one VM.
    pub(super) fn files_of(&self, vm: u32) -> usize {
        self.by_vm.get(&vm).map_or(0, |counts| counts.files)
    }

    /// Number of leaves that these take: one for each file at least, and for each window.
    pub(super) fn leaves_of(&self, vm: u32) -> usize {
        self.by_vm.get(&vm).map_or(0, |counts| counts.leaves)
    }

    /// Estimate of the memory taken, bytes.
    pub(super) fn bytes(&self) -> usize {
        /// Of an allocation for itself.
        const ALLOCATED: usize = 16;
        self.leaves.capacity() * size_of::<Leaf>()
            + self.pages * size_of::<Word>()
            + (self.leaves.len() - self.free.len()) * ALLOCATED
            + self.free.capacity() * size_of::<u32>()
            + self.places.bytes()
            + self.by_hash.bytes()
    }

    fn clear(&mut self, files: &mut Files, part: Part, which: impl Fn(u64) -> bool) {
        let index = part.leaf;
        let leaf = &self.leaves[index as usize];
        let goes: Vec<bool> = leaf.words.iter().map(|it| which(leaf.page(*it))).collect();
        let removed = goes.iter().filter(|&&it| it).count();
        let left = goes.len() - removed;
        // The last ones take the slots of those that go, and no other moves.
        let holes = (0..left).filter(|&slot| goes[slot]);
        let last = (left..goes.len()).filter(|&slot| !goes[slot]);
        let moves: Vec<(usize, usize)> = last.zip(holes).collect();
        for (slot, goes) in goes.iter().enumerate() {
            if *goes || slot >= left {
                self.drop_reference(index, slot);
            }
        }
        let leaf = &mut self.leaves[index as usize];
        if removed > 0 {
            let mut words = std::mem::take(&mut leaf.words).into_vec();
            for &(from, to) in &moves {
                words[to] = words[from];
            }
            words.truncate(left);
            leaf.words = words.into_boxed_slice();
        }
        self.by_vm.entry(leaf.vm).or_default().pages -= removed;
        self.pages -= removed;
        for (_, to) in moves {
            self.add_reference(index, to);
        }
        if left == 0 {
            self.free_leaf(files, part);
        }
    }
}

fn reference(index: u32, slot: usize) -> u32 {
    index * LEAF as u32 + slot as u32
}

fn word(leaves: &[Leaf], reference: u32) -> (&Leaf, Word) {
    let leaf = &leaves[(reference / LEAF as u32) as usize];
    (leaf, leaf.words[(reference % LEAF as u32) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::FileKey;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Reporter, u64),
        Remove(u32, FileId, u64, u64),
        End(u32),
    }

    /// Pages that crowd into few leaves, on both sides of a window's border.
    fn page() -> impl Strategy<Value = u64> + Clone {
        prop_oneof![0..300_u64, WINDOW - 200..WINDOW + 200, Just(u64::MAX - 1)]
    }

    fn step() -> impl Strategy<Value = Step> {
        let place = (1..3_u32, 0..2 as FileId, page());
        let reporter = place
            .clone()
            .prop_map(|(vm, file, page)| Reporter { vm, file, page });
        let span = prop_oneof![1..8_u64, 1..400_u64, Just(u64::MAX)];
        prop_oneof![
            40 => (reporter, any::<u64>()).prop_map(|(reporter, hash)| Step::Insert(reporter, hash)),
            4 => (place, span)
                .prop_map(|((vm, file, page), pages)| Step::Remove(vm, file, page, page.saturating_add(pages))),
            1 => (1..3_u32).prop_map(Step::End),
        ]
    }

    /// The same, so simple that it is right by looking at it.
    type Model = std::collections::BTreeMap<(u32, FileId, u64), u64>;

    fn check(sightings: &Sightings, model: &Model) {
        assert_eq!(sightings.len(), model.len());
        for (&(vm, file, page), &hash) in model {
            assert_eq!(sightings.find(hash), Some(Reporter { vm, file, page }));
        }
        for vm in 1..3 {
            let pages = model.keys().filter(|(of, ..)| *of == vm);
            let files: std::collections::BTreeSet<_> =
                pages.clone().map(|(_, file, _)| file).collect();
            assert_eq!(sightings.pages_of(vm), pages.count());
            assert_eq!(sightings.files_of(vm), files.len());
        }
        let leaves = [1, 2].map(|vm| sightings.leaves_of(vm));
        let used = sightings.leaves.len() - sightings.free.len();
        assert_eq!(leaves.iter().sum::<usize>(), used);
    }

    fn files() -> Files {
        let mut files = Files::default();
        for inode in 0..2 {
            let id = files.intern(&FileKey {
                fs_uuid: [0; 16],
                inode,
                size: 0,
                mtime_ns: 0,
                generation: 0,
                kind: 0,
            });
            // Kept for the test, whatever is noted of it.
            files.hold_sighting(id);
        }
        files
    }

    proptest! {
        #[test]
        fn sightings_are_what_a_map_of_them_is(steps in prop::collection::vec(step(), 1..1500)) {
            let (mut sightings, mut files) = (Sightings::default(), files());
            let mut model = Model::new();
            for (count, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Insert(reporter, hash) => {
                        if sightings.find(hash).is_some() {
                            continue;
                        }
                        let place = (reporter.vm, reporter.file, reporter.page);
                        model.remove(&place);
                        prop_assert!(sightings.insert(&mut files, reporter, hash));
                        model.insert(place, hash);
                    }
                    Step::Remove(vm, file, start, end) => {
                        sightings.remove_range(&mut files, vm, file, start, end);
                        model.retain(|&(v, f, p), _| !(v == vm && f == file && (start..end).contains(&p)));
                    }
                    Step::End(vm) => {
                        sightings.remove_vm(&mut files, vm);
                        model.retain(|&(of, ..), _| of != vm);
                    }
                }
                if count % 100 == 0 {
                    check(&sightings, &model);
                }
            }
            check(&sightings, &model);
            (1..3).for_each(|vm| sightings.remove_vm(&mut files, vm));
            prop_assert_eq!((sightings.len(), sightings.free.len()), (0, sightings.leaves.len()));
            for owner in [(1, 0), (1, 1), (2, 0), (2, 1)] {
                prop_assert!(sightings.places.parts(&sightings.leaves, owner).is_empty());
            }
        }
    }

    #[test]
    fn what_is_left_of_a_file_keeps_no_leaf_of_its_own() {
        let (mut sightings, mut files) = (Sightings::default(), files());
        for page in 0..6400 {
            let reporter = Reporter {
                vm: 1,
                file: 0,
                page,
            };
            assert!(sightings.insert(&mut files, reporter, (page + 1) << 16));
        }
        let leaves = |it: &Sightings| it.places.parts(&it.leaves, (1, 0)).range(..).count();
        assert_eq!(leaves(&sightings), 100);
        for page in (0..6400).filter(|page| page % 64 != 5) {
            sightings.remove(
                &mut files,
                Reporter {
                    vm: 1,
                    file: 0,
                    page,
                },
            );
        }
        assert_eq!(sightings.len(), 100);
        assert!(leaves(&sightings) <= 6, "{}", leaves(&sightings));
    }

    /// Each page in a leaf of its own, as in a file that is nearly all holes. Were every leaf
    /// looked at for one that comes or goes, this would have no end.
    #[test]
    fn a_file_may_have_very_many_leaves() {
        const LEAVES: u64 = 100_000;
        let (mut sightings, mut files) = (Sightings::default(), files());
        let leaves = |it: &Sightings| it.leaves.len() - it.free.len();
        for (vm, file) in [(1, 0), (1, 1), (2, 0)] {
            // From the last one on: each comes before all others.
            for window in (0..LEAVES).rev() {
                let page = window * WINDOW + window % 7;
                let number = u64::from(vm) << 32 | u64::from(file) << 24 | window;
                let reporter = Reporter { vm, file, page };
                assert!(sightings.insert(&mut files, reporter, number << 16));
            }
        }
        assert_eq!(leaves(&sightings), 3 * LEAVES as usize);
        // A whole file, a part of one, and a VM.
        sightings.remove_range(&mut files, 1, 0, 0, u64::MAX);
        assert_eq!(sightings.files_of(1), 1);
        sightings.remove_range(&mut files, 2, 0, WINDOW + 7, (LEAVES - 2) * WINDOW);
        assert_eq!(sightings.pages_of(2), 4);
        sightings.remove_vm(&mut files, 1);
        assert_eq!((sightings.len(), leaves(&sightings)), (4, 4));
        for window in [0, 1, LEAVES - 2, LEAVES - 1] {
            let page = window * WINDOW + window % 7;
            let number = 2 << 32 | window;
            let reporter = Reporter {
                vm: 2,
                file: 0,
                page,
            };
            assert_eq!(sightings.find(number << 16), Some(reporter));
        }
    }
}
