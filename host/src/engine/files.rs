// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The files a process has met, numbered.

use std::collections::HashMap;

use crate::protocol::FileKey;

/// Numbers files, so that an overlay need not carry its file's identity.
#[derive(Debug, Default)]
pub(super) struct Files {
    numbers: HashMap<FileKey, u32>,
    keys: Vec<FileKey>,
}

impl Files {
    /// The file's number; `None` when there are more files than numbers.
    pub(super) fn number(&mut self, key: FileKey) -> Option<u32> {
        if let Some(number) = self.numbers.get(&key) {
            return Some(*number);
        }
        let number = u32::try_from(self.keys.len())
            .ok()
            .filter(|n| *n < Self::MOST)?;
        self.keys.push(key);
        self.numbers.insert(key, number);
        Some(number)
    }

    /// The file's number if it was met before.
    pub(super) fn known(&self, key: &FileKey) -> Option<u32> {
        self.numbers.get(key).copied()
    }

    /// Most files one guest may name; a guest that renames its files without end is cut off.
    pub(super) const MOST: u32 = 1 << 18;

    /// The file with this number.
    pub(super) fn key(&self, number: u32) -> FileKey {
        self.keys[number as usize]
    }
}
