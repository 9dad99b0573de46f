// SPDX-License-Identifier: GPL-2.0

//! All files that are or were mapped, and what was reported of each.

use crate::list::{List, NoMemory};
use crate::pages::Pages;
use crate::policy::Moment;
use crate::ranges::{Range, Ranges};

/// Life of a file id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileState {
    /// Free to be used.
    Free,
    /// A file has it; the host has not been told which.
    Unannounced,
    /// The host knows the file.
    Announced,
    /// Retracted; free when the host has acknowledged that.
    Retired,
}

/// One file that is or was mapped.
pub(crate) struct File {
    /// Address of the inode: finds the file, proves nothing.
    key: usize,
    /// Hash of its identity: tells a changed file or a reused address.
    stamp: u64,
    /// What was reported.
    pub(crate) pages: Pages,
    /// Which [`Tracker::covered`] says what was looked at in pass `seen`, if that is the last.
    covered: u32,
    /// Last pass that found it mapped.
    seen: u32,
    /// Refused pages, if there are any, are tried again in this pass.
    pub(crate) retry_at: u32,
    /// When it was found first.
    pub(crate) since: Moment,
    /// The list of excluded names that it was compared with.
    pub(crate) checked: u32,
    /// Whether it is on that list.
    pub(crate) excluded: bool,
    /// Whether there may be refused pages to be tried again.
    pub(crate) has_refused: bool,
    /// Doublings of the time between tries.
    pub(crate) backoff: u8,
    pub(crate) state: FileState,
}

impl File {
    /// Whether refused pages are to be tried again in this pass.
    pub(crate) const fn is_due(&self, pass: u32) -> bool {
        self.has_refused && pass.wrapping_sub(self.retry_at) as i32 >= 0
    }
}

const FREE: File = File {
    key: 0,
    stamp: 0,
    pages: Pages::new(),
    covered: NONE,
    seen: 0,
    retry_at: 0,
    since: Moment::BOOT,
    checked: 0,
    excluded: false,
    has_refused: false,
    backoff: 0,
    state: FileState::Free,
};

/// No file, in the hash index; nothing looked at, of a file.
const NONE: u32 = u32::MAX;

/// All files, by id; found by key.
pub(crate) struct Tracker {
    files: List<File>,
    free: List<u32>,
    index: List<u32>,
    /// What was looked at in pass `pass`, for each file that was.
    covered: List<Ranges>,
    pass: u32,
    live: usize,
    most: usize,
}

impl Tracker {
    /// A tracker for at most `most` files.
    pub(crate) const fn new(most: usize) -> Self {
        Self {
            files: List::new(),
            free: List::new(),
            index: List::new(),
            covered: List::new(),
            pass: 0,
            live: 0,
            most,
        }
    }

    /// The file with this id, if the id is in use.
    pub(crate) fn get_mut(&mut self, id: u32) -> Option<&mut File> {
        self.files
            .get_mut(id as usize)
            .filter(|file| file.state != FileState::Free)
    }

    /// Files that are tracked now.
    pub(crate) const fn files(&self) -> usize {
        self.live
    }

    /// One more than the largest id ever used.
    pub(crate) fn ids(&self) -> u32 {
        self.files.len() as u32
    }

    /// Pages that are tracked now.
    pub(crate) fn pages(&self) -> u64 {
        self.files.iter().map(|file| file.pages.pages()).sum()
    }

    /// Bytes that [`Tracker::shrink`] can free.
    pub(crate) fn page_bytes(&self) -> usize {
        self.files.iter().map(|file| file.pages.bytes()).sum()
    }

    /// Bytes of memory in use.
    pub(crate) fn bytes(&self) -> usize {
        let covered = self.covered.iter().map(Ranges::bytes);
        self.files.bytes()
            + self.free.bytes()
            + self.index.bytes()
            + self.covered.bytes()
            + covered.sum::<usize>()
            + self.page_bytes()
    }

    /// Finds a file.
    pub(crate) fn find(&self, key: usize) -> Option<u32> {
        if self.index.is_empty() {
            return None;
        }
        match self.index[self.slot(key)] {
            NONE => None,
            id => Some(id),
        }
    }

    /// Adds a file that [`Tracker::find`] does not find. `None` when there is no room.
    pub(crate) fn add(&mut self, key: usize, stamp: u64) -> Option<u32> {
        // At most three quarters full, so that probing ends.
        if (self.live + 1) * 4 > self.index.len() * 3 {
            self.rehash().ok()?;
        }
        let id = match self.free.pop() {
            Some(id) => id,
            None if self.files.len() < self.most => {
                // Room to free every id, so that freeing cannot fail.
                self.free.reserve(self.files.len() + 1).ok()?;
                self.files.push(FREE).ok()?;
                self.files.len() as u32 - 1
            }
            None => return None,
        };
        self.files[id as usize] = File {
            key,
            stamp,
            state: FileState::Unannounced,
            ..FREE
        };
        let slot = self.slot(key);
        self.index[slot] = id;
        self.live += 1;
        Some(id)
    }

    /// Whether the file is the one that was added with this stamp.
    pub(crate) fn is_current(&self, id: u32, stamp: u64) -> bool {
        self.files[id as usize].stamp == stamp
    }

    /// Starts or goes on with a file in a pass and returns the first part of `range` that has
    /// not been looked at in it.
    pub(crate) fn uncovered(&mut self, id: u32, pass: u32, range: Range) -> Range {
        if self.pass != pass {
            self.pass = pass;
            self.covered.clear();
        }
        let file = &mut self.files[id as usize];
        if file.seen != pass {
            file.seen = pass;
            file.covered = NONE;
        }
        let covered = self.covered.get(file.covered as usize);
        covered.map_or(range, |covered| covered.first_missing(range))
    }

    /// Notes that `range` has been looked at in this pass. Without memory it may be looked at
    /// twice.
    pub(crate) fn cover(&mut self, id: u32, range: Range) {
        let file = &mut self.files[id as usize];
        if file.covered == NONE {
            let slot = self.covered.len() as u32;
            if self.covered.push(Ranges::new()).is_err() {
                return;
            }
            file.covered = slot;
        }
        let _ = self.covered[file.covered as usize].insert(range);
    }

    /// Notes that a pass has found a file.
    pub(crate) fn touch(&mut self, id: u32, pass: u32) {
        let nothing = Range { start: 0, end: 0 };
        self.uncovered(id, pass, nothing);
    }

    /// Pages of a file that were reported, from `page` on, and not looked at in this pass.
    pub(crate) fn stray(&self, id: u32, pass: u32, page: u64) -> Option<Range> {
        let file = self.files.get(id as usize)?;
        let covered = self.covered.get(file.covered as usize);
        let covered = covered.filter(|_| file.seen == pass && self.pass == pass);
        file.pages
            .first_outside(page, covered.unwrap_or(&Ranges::new()))
    }

    /// A file that no pass from `pass` on has found, from id `from` on.
    pub(crate) fn next_missing(&self, from: u32, pass: u32) -> Option<u32> {
        (from..self.ids()).find(|&id| {
            let file = &self.files[id as usize];
            let live = matches!(file.state, FileState::Unannounced | FileState::Announced);
            live && (file.seen.wrapping_sub(pass) as i32) < 0
        })
    }

    /// Files that are excluded by name.
    pub(crate) fn excluded(&self) -> usize {
        let is_live = |file: &&File| matches!(file.state, FileState::Unannounced);
        self.files
            .iter()
            .filter(is_live)
            .filter(|file| file.excluded)
            .count()
    }

    /// A file that no pass has found for more than `passes`, from id `from` on.
    pub(crate) fn next_unseen(&self, from: u32, pass: u32, passes: u32) -> Option<u32> {
        (from..self.ids()).find(|&id| {
            let file = &self.files[id as usize];
            let live = matches!(file.state, FileState::Unannounced | FileState::Announced);
            live && pass.wrapping_sub(file.seen) > passes
        })
    }

    /// A file that the host knows, that pass `pass` has not found and whose name was not compared
    /// with list `version`, from id `from` on.
    pub(crate) fn next_unchecked(&self, from: u32, pass: u32, version: u32) -> Option<u32> {
        (from..self.ids()).find(|&id| {
            let file = &self.files[id as usize];
            file.state == FileState::Announced && file.seen != pass && file.checked != version
        })
    }

    /// Drops what only pass `pass`, which has ended, needed.
    pub(crate) fn end_of_pass(&mut self, pass: u32) {
        self.covered.clear();
        self.pass = 0;
        for file in self.files.iter_mut() {
            // What was refused again since has another time, and not all may have been looked at.
            if file.seen == pass && file.is_due(pass) {
                file.has_refused = file.pages.has_refused();
            }
            file.covered = NONE;
            file.pages.pack();
        }
    }

    /// Forgets a file. Its id stays taken until [`Tracker::release`].
    pub(crate) fn retire(&mut self, id: u32) {
        let Some(file) = self.files.get_mut(id as usize) else {
            return;
        };
        if matches!(file.state, FileState::Free | FileState::Retired) {
            return;
        }
        let key = file.key;
        file.pages.clear();
        file.state = FileState::Retired;
        self.live -= 1;
        self.unindex(key);
    }

    /// Frees the id of a retired file.
    pub(crate) fn release(&mut self, id: u32) {
        if let Some(file) = self.files.get_mut(id as usize) {
            if file.state == FileState::Retired {
                file.state = FileState::Free;
                // Room was reserved when the id was made.
                let _ = self.free.push(id);
            }
        }
    }

    /// Forgets all that was reported and keeps the files.
    pub(crate) fn forget_pages(&mut self) {
        for file in self.files.iter_mut() {
            file.pages.clear();
            file.has_refused = false;
            file.backoff = 0;
        }
    }

    /// Forgets what was reported of some files, until so many bytes are free, and returns how many
    /// are. The files stay.
    pub(crate) fn shrink(&mut self, bytes: usize) -> usize {
        let mut freed = 0;
        // The files that were added last are the least likely to stay.
        for file in self.files.iter_mut().rev() {
            if freed >= bytes {
                break;
            }
            let bytes = file.pages.bytes();
            // To forget what takes no memory of its own would only have it reported again.
            if bytes != 0 {
                freed += bytes;
                file.pages.clear();
            }
        }
        freed
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::new(self.most);
    }

    /// Where `key` is in the index, or where it would go.
    fn slot(&self, key: usize) -> usize {
        let mask = self.index.len() - 1;
        let mut slot = hash(key) & mask;
        loop {
            match self.index[slot] {
                NONE => return slot,
                id if self.files[id as usize].key == key => return slot,
                _ => slot = (slot + 1) & mask,
            }
        }
    }

    /// Removes `key` and closes the gap it leaves.
    fn unindex(&mut self, key: usize) {
        let mask = self.index.len() - 1;
        let mut hole = self.slot(key);
        let mut next = hole;
        loop {
            self.index[hole] = NONE;
            loop {
                next = (next + 1) & mask;
                let id = self.index[next];
                if id == NONE {
                    return;
                }
                let home = hash(self.files[id as usize].key) & mask;
                // It may move into the hole when its home is not between the two.
                if next.wrapping_sub(home) & mask >= next.wrapping_sub(hole) & mask {
                    self.index[hole] = id;
                    hole = next;
                    break;
                }
            }
        }
    }

    fn rehash(&mut self) -> Result<(), NoMemory> {
        self.index
            .fill(((self.live + 1) * 2).next_power_of_two().max(16), NONE)?;
        for id in 0..self.ids() {
            let file = &self.files[id as usize];
            if matches!(file.state, FileState::Unannounced | FileState::Announced) {
                let slot = self.slot(file.key);
                self.index[slot] = id;
            }
        }
        Ok(())
    }
}

/// Spreads addresses, whose low bits are all alike.
const fn hash(key: usize) -> usize {
    (key as u64 >> 3)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_right(32) as usize
}
