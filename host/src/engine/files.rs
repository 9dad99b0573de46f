// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The files a process has met, numbered.

use std::collections::HashMap;

use roaring::RoaringBitmap;

use crate::protocol::FileKey;

/// Numbers files, so that an overlay need not carry its file's identity.
#[derive(Debug)]
pub(super) struct Files {
    numbers: HashMap<FileKey, u32>,
    /// By number.
    keys: Vec<FileKey>,
    /// Numbers of files that were forgotten.
    free: Vec<u32>,
    most: u32,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            numbers: HashMap::new(),
            keys: Vec::new(),
            free: Vec::new(),
            most: Self::MOST,
        }
    }
}

impl Files {
    /// Most files that have numbers at a time; a guest that renames its files without end is cut off
    /// once so many are in use.
    const MOST: u32 = 1 << 18;

    /// The file's number; `None` when there are more files than numbers, and
    /// [`forgetting`](Self::keep) may help.
    pub(super) fn number(&mut self, key: FileKey) -> Option<u32> {
        if let Some(number) = self.numbers.get(&key) {
            return Some(*number);
        }
        let number = match self.free.pop() {
            Some(number) => {
                self.keys[number as usize] = key;
                number
            }
            None => {
                let next = u32::try_from(self.keys.len()).ok();
                let number = next.filter(|it| *it < self.most)?;
                self.keys.push(key);
                number
            }
        };
        self.numbers.insert(key, number);
        Some(number)
    }

    /// The file's number if it was met before.
    pub(super) fn known(&self, key: &FileKey) -> Option<u32> {
        self.numbers.get(key).copied()
    }

    /// The file with this number.
    pub(super) fn key(&self, number: u32) -> FileKey {
        self.keys[number as usize]
    }

    /// Forgets all files but those whose numbers are `used`. Other numbers become those of other files.
    pub(super) fn keep(&mut self, used: &RoaringBitmap) {
        self.numbers.retain(|_, number| used.contains(*number));
        let all = 0..u32::try_from(self.keys.len()).unwrap_or(u32::MAX);
        self.free = all.filter(|number| !used.contains(*number)).collect();
    }

    /// Has it number fewer files, for tests.
    pub(super) fn limit(&mut self, most: u32) {
        self.most = most;
    }
}
