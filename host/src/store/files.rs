// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Files the store knows something about, and short numbers for them.

use super::references::References;
use crate::protocol::{FileKey, StorePage};
use hashbrown::{DefaultHashBuilder, HashMap};
use std::collections::BTreeMap;
use std::hash::BuildHasher;

/// Short number of a file.
pub(super) type FileId = u32;

/// Most contents that one page of a file is looked up by, besides that in its own place.
const MAX_CONTENTS: usize = 8;

/// A file. Most are known only for pages that one VM has, so what the others need is apart.
#[derive(Debug)]
pub(super) struct FileRecord {
    pub(super) key: FileKey,
    stored: Option<Box<Stored>>,
    /// Leaves of sightings that name this file.
    sighted: u32,
    /// Whether this is a file at all, and no place for one.
    in_use: bool,
}

/// What of a file is in the store.
#[derive(Debug, Default)]
struct Stored {
    /// First store page of each chunk that has one, by number of the chunk.
    chunks: BTreeMap<u64, StorePage>,
    /// Where else in the store the content of a page was seen, latest last.
    aliases: HashMap<u64, Vec<StorePage>>,
}

/// All files. One is forgotten when nothing refers to it.
#[derive(Debug, Default)]
pub(super) struct Files {
    by_key: References,
    records: Vec<FileRecord>,
    free: Vec<FileId>,
    hasher: DefaultHashBuilder,
}

impl Files {
    pub(super) fn find(&self, key: &FileKey) -> Option<FileId> {
        let is_it = |id: FileId| self.records[id as usize].key == *key;
        self.by_key.find(self.hasher.hash_one(key), is_it)
    }

    /// Finds or makes a file. Unless something refers to it afterwards, it must be
    /// [pruned](Self::prune).
    pub(super) fn intern(&mut self, key: &FileKey) -> FileId {
        if let Some(id) = self.find(key) {
            return id;
        }
        let record = FileRecord {
            key: *key,
            stored: None,
            sighted: 0,
            in_use: true,
        };
        let id = match self.free.pop() {
            Some(id) => {
                self.records[id as usize] = record;
                id
            }
            None => {
                if self.records.len() == self.records.capacity() {
                    // Not twice as much: half of it would be there for nothing.
                    self.records.reserve_exact((self.records.len() / 8).max(8));
                }
                self.records.push(record);
                (self.records.len() - 1) as FileId
            }
        };
        let Self {
            by_key,
            records,
            hasher,
            ..
        } = self;
        by_key.insert(hasher.hash_one(key), id, |id| {
            hasher.hash_one(records[id as usize].key)
        });
        id
    }

    pub(super) fn get(&self, id: FileId) -> &FileRecord {
        let record = &self.records[id as usize];
        assert!(record.in_use, "a file is kept while something refers to it");
        record
    }

    pub(super) fn get_mut(&mut self, id: FileId) -> &mut FileRecord {
        let record = &mut self.records[id as usize];
        assert!(record.in_use, "a file is kept while something refers to it");
        record
    }

    /// Forgets the file if nothing refers to it.
    pub(super) fn prune(&mut self, id: FileId) {
        let record = self.get_mut(id);
        let is_unused = |stored: &Stored| stored.chunks.is_empty() && stored.aliases.is_empty();
        if record.stored.as_deref().is_some_and(is_unused) {
            record.stored = None;
        }
        if record.sighted == 0 && record.stored.is_none() {
            record.in_use = false;
            let hash = self.hasher.hash_one(self.records[id as usize].key);
            self.by_key.remove(hash, id);
            self.free.push(id);
        }
    }

    pub(super) fn hold_sighting(&mut self, id: FileId) {
        self.get_mut(id).sighted += 1;
    }

    pub(super) fn drop_sighting(&mut self, id: FileId) {
        self.release_sighting(id);
        self.prune(id);
    }

    /// As [`Self::drop_sighting`], and leaves pruning to the caller.
    pub(super) fn release_sighting(&mut self, id: FileId) {
        self.get_mut(id).sighted -= 1;
    }

    pub(super) fn len(&self) -> usize {
        self.records.len() - self.free.len()
    }

    /// Estimate of the memory taken, bytes.
    pub(super) fn bytes(&self) -> usize {
        let stored = self.records.iter().filter_map(|it| it.stored.as_deref());
        let stored: usize = stored
            .map(|it| size_of::<Stored>() + it.chunks.len() * 32 + it.aliases.capacity() * 64)
            .sum();
        self.records.capacity() * size_of::<FileRecord>()
            + self.free.capacity() * size_of::<FileId>()
            + self.by_key.bytes()
            + stored
    }
}

impl FileRecord {
    /// First store page of a chunk, if it has one.
    pub(super) fn chunk(&self, number: u64) -> Option<StorePage> {
        self.stored.as_ref()?.chunks.get(&number).copied()
    }

    pub(super) fn set_chunk(&mut self, number: u64, base: StorePage) {
        self.stored
            .get_or_insert_default()
            .chunks
            .insert(number, base);
    }

    pub(super) fn remove_chunk(&mut self, number: u64) {
        if let Some(stored) = &mut self.stored {
            stored.chunks.remove(&number);
        }
    }

    pub(super) fn aliases(&self, page: u64) -> &[StorePage] {
        let aliases = self.stored.as_ref().and_then(|it| it.aliases.get(&page));
        aliases.map_or(&[], Vec::as_slice)
    }

    /// Whether any page has an alias; saves looking for them one by one.
    pub(super) fn has_aliases(&self) -> bool {
        self.stored
            .as_ref()
            .is_some_and(|it| !it.aliases.is_empty())
    }

    /// Notes `store` as a content of `page`. Returns what had to be dropped for it, and
    /// whether it is new.
    pub(super) fn add_alias(&mut self, page: u64, store: StorePage) -> (bool, Option<StorePage>) {
        let stored = self.stored.get_or_insert_default();
        let aliases = stored
            .aliases
            .entry(page)
            .or_insert_with(|| Vec::with_capacity(1));
        if let Some(at) = aliases.iter().position(|&other| other == store) {
            aliases[at..].rotate_left(1);
            return (false, None);
        }
        let dropped = (aliases.len() == MAX_CONTENTS).then(|| aliases.remove(0));
        aliases.push(store);
        (true, dropped)
    }

    pub(super) fn remove_alias(&mut self, page: u64, store: StorePage) {
        let Some(stored) = &mut self.stored else {
            return;
        };
        if let Some(aliases) = stored.aliases.get_mut(&page) {
            aliases.retain(|&other| other != store);
            if aliases.is_empty() {
                stored.aliases.remove(&page);
            }
        }
    }
}
