// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Files the store knows something about, and short numbers for them.

use crate::protocol::{FileKey, StorePage};
use hashbrown::HashMap;
use std::collections::BTreeMap;

/// Short number of a file.
pub(super) type FileId = u32;

/// Most contents that one page of a file is looked up by, besides that in its own place.
const MAX_CONTENTS: usize = 8;

#[derive(Debug)]
pub(super) struct FileRecord {
    pub(super) key: FileKey,
    /// First store page of each chunk that has one, by number of the chunk.
    pub(super) chunks: BTreeMap<u64, StorePage>,
    /// Where else in the store the content of a page was seen, latest last.
    aliases: HashMap<u64, Vec<StorePage>>,
    /// Leaves of sightings that name this file.
    sighted: u32,
}

/// All files. One is forgotten when nothing refers to it.
#[derive(Debug, Default)]
pub(super) struct Files {
    by_key: HashMap<FileKey, FileId>,
    records: Vec<Option<FileRecord>>,
    free: Vec<FileId>,
}

impl Files {
    pub(super) fn find(&self, key: &FileKey) -> Option<FileId> {
        self.by_key.get(key).copied()
    }

    /// Finds or makes a file. Unless something refers to it afterwards, it must be
    /// [pruned](Self::prune).
    pub(super) fn intern(&mut self, key: &FileKey) -> FileId {
        if let Some(id) = self.find(key) {
            return id;
        }
        let record = FileRecord {
            key: *key,
            chunks: BTreeMap::new(),
            aliases: HashMap::new(),
            sighted: 0,
        };
        let id = match self.free.pop() {
            Some(id) => {
                self.records[id as usize] = Some(record);
                id
            }
            None => {
                self.records.push(Some(record));
                (self.records.len() - 1) as FileId
            }
        };
        self.by_key.insert(*key, id);
        id
    }

    pub(super) fn get(&self, id: FileId) -> &FileRecord {
        self.records[id as usize]
            .as_ref()
            .expect("a file is kept while something refers to it")
    }

    pub(super) fn get_mut(&mut self, id: FileId) -> &mut FileRecord {
        self.records[id as usize]
            .as_mut()
            .expect("a file is kept while something refers to it")
    }

    /// Forgets the file if nothing refers to it.
    pub(super) fn prune(&mut self, id: FileId) {
        let record = self.get(id);
        if record.sighted == 0 && record.chunks.is_empty() && record.aliases.is_empty() {
            let key = record.key;
            self.by_key.remove(&key);
            self.records[id as usize] = None;
            self.free.push(id);
        }
    }

    pub(super) fn hold_sighting(&mut self, id: FileId) {
        self.get_mut(id).sighted += 1;
    }

    pub(super) fn drop_sighting(&mut self, id: FileId) {
        self.get_mut(id).sighted -= 1;
        self.prune(id);
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Estimate of the memory taken, bytes.
    pub(super) fn bytes(&self) -> usize {
        let aliases: usize = self
            .records
            .iter()
            .flatten()
            .map(|record| record.aliases.capacity() * 64)
            .sum();
        self.records.capacity() * size_of::<Option<FileRecord>>()
            + self.by_key.allocation_size()
            + aliases
    }
}

impl FileRecord {
    pub(super) fn aliases(&self, page: u64) -> &[StorePage] {
        self.aliases.get(&page).map_or(&[], Vec::as_slice)
    }

    /// Whether any page has an alias; saves looking for them one by one.
    pub(super) fn has_aliases(&self) -> bool {
        !self.aliases.is_empty()
    }

    /// Notes `store` as a content of `page`. Returns what had to be dropped for it, and
    /// whether it is new.
    pub(super) fn add_alias(&mut self, page: u64, store: StorePage) -> (bool, Option<StorePage>) {
        let aliases = self
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
        if let Some(aliases) = self.aliases.get_mut(&page) {
            aliases.retain(|&other| other != store);
            if aliases.is_empty() {
                self.aliases.remove(&page);
            }
        }
    }
}
