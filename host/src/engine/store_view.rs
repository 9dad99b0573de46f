// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The store as a process sees it: a read-only descriptor, mapped once to be compared with, and
//! piece by piece over guest memory.

#![expect(unsafe_code, reason = "fixed mappings over guest memory")]

use std::ffi::c_void;
use std::io;
use std::os::fd::OwnedFd;
use std::ptr;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::protocol::StorePage;
use crate::store::PAGE;

/// The mapping to compare with grows in such steps; they cost addresses and no memory.
const STEP: usize = 1 << 30;
/// Looks at pages far from each other until the mapping is made anew: each may have cost a page
/// of page tables.
const MOST_LEAPS: usize = 1 << 14;
/// What one page of page tables maps.
const TABLE_PAGES: StorePage = 512;

/// A read-only descriptor of the store.
#[derive(Debug)]
pub struct StoreView {
    fd: OwnedFd,
    identity: (u64, u64),
    /// Size when last asked, bytes. Stores do not shrink.
    size: usize,
    looking: Option<Looking>,
}

/// The store from its beginning on, mapped for reading.
///
/// As a rule a process looks at a page once, but a fault maps the pages around it as well, and
/// costs less than reading each into a buffer.
#[derive(Debug)]
struct Looking {
    base: usize,
    bytes: usize,
    leaps: usize,
    last: StorePage,
}

impl StoreView {
    /// Takes the read-only descriptor of a store.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&fd)?;
        Ok(Self {
            fd,
            identity: (stat.st_dev, stat.st_ino),
            size: stat.st_size as usize,
            looking: None,
        })
    }

    /// Device and inode of the store.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Makes `pages` store pages from `store` on readable at [`Self::address_of`], until
    /// [`Self::look_away`]. Behind the end of the file is an error, where a look would be the
    /// end of the process.
    pub(super) fn look_at(&mut self, store: StorePage, pages: usize) -> io::Result<()> {
        let end = (store as usize + pages) * PAGE;
        if end > self.size {
            self.size = rustix::fs::fstat(&self.fd)?.st_size as usize;
            if end > self.size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        if self.looking.as_ref().is_none_or(|it| end > it.bytes) {
            self.looking = None;
            self.looking = Some(Looking::new(&self.fd, end.next_multiple_of(STEP))?);
        }
        if let Some(looking) = &mut self.looking {
            let table = store / TABLE_PAGES;
            looking.leaps += usize::from(table != looking.last);
            looking.last = table;
        }
        Ok(())
    }

    /// Where the store page is that was [looked at](Self::look_at).
    pub(super) fn address_of(&self, store: StorePage) -> Option<usize> {
        let looking = self.looking.as_ref()?;
        Some(looking.base + store as usize * PAGE)
    }

    /// Whether looking has cost so much memory that it is time for [`Self::look_away`].
    pub(super) fn has_looked_enough(&self) -> bool {
        self.looking
            .as_ref()
            .is_some_and(|it| it.leaps >= MOST_LEAPS)
    }

    /// Gives back what looking has cost.
    pub(super) fn look_away(&mut self) {
        self.looking = None;
    }

    /// Maps `pages` store pages from `store` on over `address`, private and writable.
    ///
    /// # Safety
    ///
    /// The range must be guest memory whose content is, and until this returns stays, that of
    /// the store pages; no Rust reference may point into it.
    pub(super) unsafe fn map_over(
        &self,
        address: usize,
        store: StorePage,
        pages: usize,
    ) -> io::Result<()> {
        // SAFETY: the caller gives this range away; its content is the same afterwards.
        unsafe {
            mmap(
                address as *mut c_void,
                pages * PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                &self.fd,
                u64::from(store) * PAGE as u64,
            )
        }?;
        Ok(())
    }
}

impl Looking {
    fn new(fd: &OwnedFd, bytes: usize) -> io::Result<Self> {
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address the kernel chooses touches no other memory.
        let base = unsafe { mmap(ptr::null_mut(), bytes, ProtFlags::READ, flags, fd, 0) }?;
        let looking = Self {
            base: base as usize,
            bytes,
            leaps: 0,
            last: StorePage::MAX,
        };
        for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
            // SAFETY: the mapping made just now; neither advice changes content.
            unsafe { madvise(base, bytes, advice) }?;
        }
        Ok(looking)
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; addresses in it are not kept beyond a window,
        // and windows hold the view.
        let _ = unsafe { munmap(self.base as *mut c_void, self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreFile;
    use std::os::fd::AsFd;

    /// The store relies on it: [`StoreFile`] writes there without making a hole first.
    #[test]
    fn nobody_gets_memory_behind_the_end_of_a_store() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("group.pages");
        let file = StoreFile::create(&path).unwrap();
        let writer = std::fs::File::options().write(true).open(&path).unwrap();
        writer.set_len(4 * PAGE as u64).unwrap();
        let view = Looking::new(&file.read_only().unwrap(), 8 * PAGE).unwrap();
        let populate = |page: usize| {
            let at = (view.base + page * PAGE) as *mut c_void;
            // SAFETY: of the mapping made above; the kernel alone touches it.
            unsafe { madvise(at, PAGE, Advice::LinuxPopulateRead) }
        };
        populate(3).unwrap();
        populate(4).unwrap_err();
        assert_eq!(file.allocated_bytes().unwrap(), PAGE as u64);
        // Nor does who has it for reading move the end.
        let reader = file.read_only().unwrap();
        rustix::fs::ftruncate(reader.as_fd(), 8 * PAGE as u64).unwrap_err();
    }
}
