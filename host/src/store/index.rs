// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is where in the store: by file and page, by content hash, by store page.
//!
//! The first content of a file page lies in a *chunk* of the file's own, a range of store pages
//! in the order of the file, so that a run of a file is a run in the store and neighbouring
//! overlays become one VMA. A chunk is only numbers until its pages are written. Any other
//! content of the page lies elsewhere and is found by an *alias*, and so is a page whose
//! content the store already had under another name.

use super::files::{FileId, Files};
use super::pages::{Page, Pages};
use super::space::Space;
use crate::protocol::{FileKey, StorePage};
use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use roaring::RoaringBitmap;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher;
use std::ops::Range;

/// Pages of a file that one chunk has room for: 2 MiB, so that what is published of a file here and
/// there leaves no large holes.
pub(super) const CHUNK: u64 = 512;
/// Most pages with the same hash. Without ill will there is one.
pub(super) const MAX_CANDIDATES: usize = 4;
/// Most names of one store page besides that of its own place.
const MAX_NAMES: usize = 64;
/// Most names of all pages: so many for each page, and so many more.
const NAMES_PER_PAGE: usize = 4;
const MORE_NAMES: usize = 1 << 16;
/// Below this many free page numbers new files get no chunks any more, only single pages.
const SCARCE: u64 = 1 << 30;

/// How much of a file is published at a time: so many pages, of so many from the first to the last.
///
/// With pages here and there a chunk would have holes, and what is written into those takes more
/// memory than it needs, on a tmpfs with large folios. Such pages lie where others end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dense {
    pub(super) pages: u32,
    pub(super) extent: u64,
}

impl Dense {
    /// Whether a file gets a chunk of so many pages for it: a quarter of what it reaches over is
    /// there, and that is 16 pages or an eighth of all.
    fn is_enough_for(self, chunk: u32) -> bool {
        u64::from(self.pages) * 4 >= self.extent && self.pages >= chunk.div_ceil(8).min(16)
    }
}

#[derive(Debug)]
struct Chunk {
    file: FileId,
    number: u64,
    pages: u32,
    /// Pages in this range that are in the index, whatever their names.
    used: u32,
}

/// The index of a store.
#[derive(Debug)]
pub(super) struct Index {
    pages: Pages,
    contents: HashTable<StorePage>,
    names: HashMap<StorePage, Vec<(FileId, u64)>>,
    /// How many there are.
    named: usize,
    chunks: BTreeMap<StorePage, Chunk>,
    space: Space,
    /// Pages that lie where their file has its place for them. Others may lie between those: a chunk
    /// that was found again after the index was lost may reach over what never was its.
    home: RoaringBitmap,
    /// Numbers taken, whose pages are not entered yet.
    taken: BTreeSet<StorePage>,
    hasher: DefaultHashBuilder,
}

impl Index {
    pub(super) fn new() -> Self {
        Self {
            pages: Pages::default(),
            contents: HashTable::new(),
            names: HashMap::new(),
            named: 0,
            chunks: BTreeMap::new(),
            space: Space::new(),
            home: RoaringBitmap::new(),
            taken: BTreeSet::new(),
            hasher: DefaultHashBuilder::default(),
        }
    }

    /// Numbers that nothing has.
    #[cfg(test)]
    pub(super) fn free_numbers(&self) -> u64 {
        self.space.free_pages()
    }

    pub(super) fn len(&self) -> usize {
        self.pages.len()
    }

    pub(super) fn page(&self, store: StorePage) -> Option<&Page> {
        self.pages.get(store)
    }

    pub(super) fn page_mut(&mut self, store: StorePage) -> Option<&mut Page> {
        self.pages.get_mut(store)
    }

    /// Calls `each` for every page of `pages` of a file, in order, with the content that
    /// most VMs use.
    pub(super) fn lookup(
        &self,
        files: &Files,
        file: FileId,
        pages: Range<u64>,
        mut each: impl FnMut(Option<StorePage>),
    ) {
        let record = files.get(file);
        let mut from = pages.start;
        while from < pages.end {
            let number = from / CHUNK;
            let until = (number + 1).saturating_mul(CHUNK).min(pages.end);
            let base = record.chunk(number);
            let room = base.map_or(0, |base| self.chunks.get(&base).map_or(0, |c| c.pages));
            for page in from..until {
                let offset = (page % CHUNK) as u32;
                let own = base
                    .filter(|_| offset < room)
                    .map(|base| base + offset)
                    .filter(|store| self.home.contains(*store));
                each(if record.has_aliases() {
                    self.most_used(own, record.aliases(page))
                } else {
                    own
                });
            }
            from = until;
        }
    }

    fn most_used(&self, own: Option<StorePage>, aliases: &[StorePage]) -> Option<StorePage> {
        let uses = |store: &StorePage| self.pages.get(*store).map_or(0, |page| page.references);
        // The last of equals wins: the latest alias.
        own.into_iter()
            .chain(aliases.iter().copied())
            .max_by_key(uses)
    }

    /// Pages with this content hash.
    pub(super) fn candidates(&self, hash: u64) -> impl Iterator<Item = StorePage> {
        let spread = self.hasher.hash_one(hash);
        let has_hash =
            move |store: &StorePage| self.pages.get(*store).is_some_and(|page| page.hash == hash);
        self.contents.iter_hash(spread).copied().filter(has_hash)
    }

    /// Takes a number for new content of a file page: its own place if that is free, and the file has
    /// places or is `dense` enough to get them now.
    /// Those that do not get a page by [`Self::insert`] must be [given back](Self::give).
    pub(super) fn take(
        &mut self,
        files: &mut Files,
        file: FileId,
        page: u64,
        dense: Dense,
    ) -> Option<StorePage> {
        let number = page / CHUNK;
        let record = files.get_mut(file);
        let base = record.chunk(number).or_else(|| {
            let pages = chunk_pages(record.key.size, page)?;
            if !dense.is_enough_for(pages) {
                return None;
            }
            if self.space.free_pages() < SCARCE {
                return None;
            }
            let base = self.space.take(pages)?;
            record.set_chunk(number, base);
            self.chunks.insert(
                base,
                Chunk {
                    file,
                    number,
                    pages,
                    used: 0,
                },
            );
            Some(base)
        });
        base.and_then(|base| self.in_chunk(base, page))
            .filter(|store| !self.pages.contains(*store) && !self.taken.contains(store))
            .or_else(|| self.space.take(1))
            .inspect(|store| {
                self.taken.insert(*store);
            })
    }

    /// How many pages from `store` on, of at most `most`, are not in the index.
    pub(super) fn unused(&self, store: StorePage, most: u32) -> u32 {
        let unused = |at: &StorePage| !self.pages.contains(*at);
        (store..store.saturating_add(most))
            .take_while(unused)
            .count() as u32
    }

    /// Gives numbers back that have no pages.
    pub(super) fn give(&mut self, files: &mut Files, stores: Range<StorePage>) {
        for store in stores {
            self.taken.remove(&store);
            self.free(files, store);
        }
    }

    fn free(&mut self, files: &mut Files, store: StorePage) {
        let Some((base, chunk)) = self.chunk_of(store) else {
            return self.space.give(store, 1);
        };
        let is_taken = self.taken.range(base..base + chunk.pages).next().is_some();
        if chunk.used == 0 && !is_taken {
            self.remove_chunk(files, base);
        }
    }

    /// Enters a page that has been written and that nobody is granted yet.
    pub(super) fn insert(&mut self, store: StorePage, hash: u64, publisher: u32) {
        self.taken.remove(&store);
        self.pages.insert(
            store,
            Page {
                hash,
                references: 0,
                publisher,
            },
        );
        if let Some(base) = self.chunk_of(store).map(|(base, _)| base) {
            self.chunks.get_mut(&base).expect("just found").used += 1;
        }
        // More of a kind, as in a file taken over, would only make all of them slow to find.
        if self.candidates(hash).count() >= MAX_CANDIDATES {
            return;
        }
        let Self {
            pages,
            contents,
            hasher,
            ..
        } = self;
        contents.insert_unique(hasher.hash_one(hash), store, |other| {
            hasher.hash_one(pages.get(*other).map_or(0, |page| page.hash))
        });
    }

    /// Enters a page of a file taken over from another daemon: its number is not free.
    pub(super) fn insert_foreign(&mut self, store: StorePage, hash: u64) {
        self.space.take_at(store, 1);
        self.insert(store, hash, 0);
    }

    /// Makes `store` found as `page` of `file`, if it is not by its place. With too many names
    /// it is only found by its content: files can be invented, and names stay as long as pages.
    pub(super) fn name(&mut self, files: &mut Files, file: FileId, page: u64, store: StorePage) {
        let record = files.get_mut(file);
        let base = record.chunk(page / CHUNK);
        if base.and_then(|base| self.in_chunk(base, page)) == Some(store) {
            self.home.insert(store);
            return;
        }
        let names = self.names.get(&store).map_or(&[][..], Vec::as_slice);
        let all = self.pages.len() * NAMES_PER_PAGE + MORE_NAMES;
        if (names.len() >= MAX_NAMES || self.named >= all) && !names.contains(&(file, page)) {
            return;
        }
        let (new, dropped) = record.add_alias(page, store);
        if new {
            let names = self.names.entry(store);
            let names = names.or_insert_with(|| Vec::with_capacity(1));
            names.push((file, page));
            self.named += 1;
        }
        if let Some(dropped) = dropped {
            self.forget_name(dropped, file, page);
        }
    }

    /// Gives `file` the chunk in which `store` is the place of `page`, if nothing is in its
    /// way. So a layout is found again after the index was lost.
    pub(super) fn restore_chunk(
        &mut self,
        files: &mut Files,
        file: FileId,
        page: u64,
        store: StorePage,
    ) {
        let number = page / CHUNK;
        let record = files.get_mut(file);
        let Some(pages) = chunk_pages(record.key.size, page) else {
            return;
        };
        let Some(base) = store.checked_sub((page % CHUNK) as u32) else {
            return;
        };
        let Some(end) = base.checked_add(pages) else {
            return;
        };
        let before = self.chunks.range(..end).next_back();
        let overlaps = before.is_some_and(|(&at, chunk)| at + chunk.pages > base);
        if record.chunk(number).is_some() || overlaps {
            return;
        }
        let used = (base..end)
            .filter(|store| self.pages.contains(*store))
            .count() as u32;
        self.space.take_at(base, pages);
        record.set_chunk(number, base);
        self.chunks.insert(
            base,
            Chunk {
                file,
                number,
                pages,
                used,
            },
        );
    }

    /// Forgets a page and frees its number.
    pub(super) fn remove(&mut self, files: &mut Files, store: StorePage) -> Option<Page> {
        let page = *self.pages.get(store)?;
        let spread = self.hasher.hash_one(page.hash);
        if let Ok(entry) = self.contents.find_entry(spread, |&other| other == store) {
            entry.remove();
        }
        self.pages.remove(store);
        self.home.remove(store);
        let names = self.names.remove(&store).unwrap_or_default();
        self.named -= names.len();
        for (file, page) in names {
            files.get_mut(file).remove_alias(page, store);
            files.prune(file);
        }
        if let Some(base) = self.chunk_of(store).map(|(base, _)| base) {
            self.chunks.get_mut(&base).expect("just found").used -= 1;
        }
        self.free(files, store);
        Some(page)
    }

    /// Pages by the file in whose chunk they lie, or that they were first found under.
    pub(super) fn pages_by_file(&self, files: &Files) -> BTreeMap<FileKey, u64> {
        let mut pages = BTreeMap::new();
        let mut add = |file, count| *pages.entry(files.get(file).key).or_default() += count;
        for chunk in self.chunks.values() {
            add(chunk.file, u64::from(chunk.used));
        }
        for (&store, names) in &self.names {
            if let (None, Some(&(file, _))) = (self.chunk_of(store), names.first()) {
                add(file, 1);
            }
        }
        pages
    }

    /// Estimate of the memory taken, bytes.
    pub(super) fn bytes(&self) -> usize {
        // Not from capacities, which shrink with what is removed and the memory does not.
        self.pages.bytes()
            + self.contents.allocation_size()
            + self.names.allocation_size()
            + self.names.len() * 16
            + self.chunks.len() * size_of::<(StorePage, Chunk)>()
            + self.home.serialized_size()
    }

    fn in_chunk(&self, base: StorePage, page: u64) -> Option<StorePage> {
        let offset = (page % CHUNK) as u32;
        (offset < self.chunks.get(&base)?.pages).then_some(base + offset)
    }

    fn chunk_of(&self, store: StorePage) -> Option<(StorePage, &Chunk)> {
        let (&base, chunk) = self.chunks.range(..=store).next_back()?;
        (store - base < chunk.pages).then_some((base, chunk))
    }

    fn remove_chunk(&mut self, files: &mut Files, base: StorePage) {
        let Some(chunk) = self.chunks.remove(&base) else {
            return;
        };
        self.space.give(base, chunk.pages);
        files.get_mut(chunk.file).remove_chunk(chunk.number);
        files.prune(chunk.file);
    }

    fn forget_name(&mut self, store: StorePage, file: FileId, page: u64) {
        if let Some(names) = self.names.get_mut(&store) {
            let before = names.len();
            names.retain(|&name| name != (file, page));
            self.named -= before - names.len();
            if names.is_empty() {
                self.names.remove(&store);
            }
        }
    }
}

/// Length of the chunk that `page` of a file of `size` bytes belongs to; `None` for a page
/// behind the end that the file claims to have.
fn chunk_pages(size: u64, page: u64) -> Option<u32> {
    let pages = size.div_ceil(super::PAGE as u64);
    (page < pages).then(|| (pages - page / CHUNK * CHUNK).min(CHUNK) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(files: &mut Files, inode: u64) -> FileId {
        files.intern(&FileKey {
            fs_uuid: [0; 16],
            inode,
            size: 0,
            mtime_ns: 0,
            generation: 0,
            kind: 1,
        })
    }

    #[test]
    fn what_lies_between_pages_of_a_file_is_not_taken_for_its() {
        let (mut files, mut index) = (Files::default(), Index::new());
        let file = files.intern(&FileKey {
            fs_uuid: [0; 16],
            inode: 1,
            size: 100 * super::super::PAGE as u64,
            mtime_ns: 0,
            generation: 0,
            kind: 1,
        });
        for store in 5..8 {
            index.insert_foreign(store, store.into());
        }
        for (page, store) in [(0, 5), (2, 7)] {
            index.restore_chunk(&mut files, file, page, store);
            index.name(&mut files, file, page, store);
        }
        let mut found = Vec::new();
        index.lookup(&files, file, 0..4, |store| found.push(store));
        assert_eq!(found, [Some(5), None, Some(7), None]);
    }

    #[test]
    fn a_file_gets_places_for_what_is_no_page_here_and_there() {
        let enough = |pages, extent, chunk| Dense { pages, extent }.is_enough_for(chunk);
        assert!(enough(1, 1, 8) && !enough(1, 1, 9));
        assert!(enough(16, 16, 512) && enough(16, 64, 512));
        assert!(!enough(15, 15, 512) && !enough(64, 300, 512));
    }

    #[test]
    fn invented_names_are_limited_and_there_is_room_again_when_pages_go() {
        const PAGES: u32 = 1200;
        let (mut index, mut files) = (Index::new(), Files::default());
        (0..PAGES).for_each(|store| index.insert_foreign(store, u64::from(store)));
        for inode in 0..MAX_NAMES as u64 {
            let file = file(&mut files, inode);
            for store in 0..PAGES {
                index.name(&mut files, file, u64::from(store), store);
            }
            files.prune(file);
        }
        let most = PAGES as usize * NAMES_PER_PAGE + MORE_NAMES;
        assert_eq!(index.named, most);
        let count = |index: &Index| index.names.values().map(Vec::len).sum::<usize>();
        assert_eq!(count(&index), most);
        let found = |index: &Index, files: &Files, file, page| {
            let mut found = None;
            index.lookup(files, file, page..page + 1, |store| found = store);
            found
        };
        let last = file(&mut files, MAX_NAMES as u64 - 1);
        assert_eq!(found(&index, &files, last, 1199), None);
        for store in 0..PAGES / 2 {
            index.remove(&mut files, store);
        }
        assert_eq!(count(&index), index.named);
        index.name(&mut files, last, 1199, 1199);
        assert_eq!(found(&index, &files, last, 1199), Some(1199));
        // Another content of a page that has as many as it can takes the place of the oldest.
        for store in PAGES / 2..PAGES / 2 + 50 {
            index.name(&mut files, last, 7, store);
        }
        assert_eq!(count(&index), index.named);
        for store in PAGES / 2..PAGES {
            index.remove(&mut files, store);
        }
        assert_eq!((index.named, files.len()), (0, 0));
    }

    #[test]
    fn of_many_equal_pages_few_are_found_by_content_and_all_can_go() {
        let (mut index, mut files) = (Index::new(), Files::default());
        for store in 0..1000 {
            index.insert_foreign(store, 7);
        }
        assert_eq!((index.len(), index.contents.len()), (1000, MAX_CANDIDATES));
        for store in 0..1000 {
            assert_eq!(index.remove(&mut files, store).map(|it| it.hash), Some(7));
        }
        assert_eq!((index.len(), index.contents.len()), (0, 0));
    }
}
