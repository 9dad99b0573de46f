// SPDX-License-Identifier: GPL-2.0

//! All inodes of a file system that have something in the page cache, mapped or not.
//!
//! Locks: `s_inode_list_lock`, then `i_lock` of one inode, while the next one is looked for. The
//! list is not long locked: see [`MOST_PASSED`].

use crate::bindings as helpers;
use crate::file::CachedFile;
use crate::superblock::HeldSuper;
use core::ptr::{addr_of, addr_of_mut, NonNull};
use kernel::bindings;
use kernel::container_of;

/// Inodes passed by under one hold of the list's lock.
const MOST_PASSED: usize = 256;

/// Goes through the inodes, newest first. One of them is held at a time, which keeps the place.
pub(crate) struct Inodes<'a> {
    superblock: HeldSuper<'a>,
    current: Option<CachedFile<'a>>,
}

impl<'a> Inodes<'a> {
    pub(crate) const fn new(superblock: HeldSuper<'a>) -> Self {
        Self {
            superblock,
            current: None,
        }
    }

    /// The next inode with pages, or nothing in its place after many without any, so that the
    /// caller can breathe. `None` at the end.
    pub(crate) fn next(&mut self) -> Option<Option<&CachedFile<'a>>> {
        let next = self.step();
        // The one before is let go only now, as it was the place in the list.
        self.current = next;
        let current = self.current.as_ref()?;
        Some(current.has_pages().then_some(current))
    }

    /// The next inode with pages, or after many without any that can be held.
    fn step(&self) -> Option<CachedFile<'a>> {
        let sb = self.superblock.as_ptr();
        // SAFETY: The superblock is held, so it and its list are valid.
        let (lock, head) = unsafe {
            (
                addr_of_mut!((*sb).s_inode_list_lock),
                addr_of!((*sb).s_inodes),
            )
        };
        // SAFETY: The lock is initialised as long as the superblock is valid.
        unsafe { bindings::spin_lock(lock) };
        let mut link = match &self.current {
            // SAFETY: An inode with a reference stays in the list.
            Some(file) => unsafe { addr_of!((*file.as_ptr()).i_sb_list) },
            None => head,
        };
        let mut found = None;
        for passed in 0.. {
            // SAFETY: The list is locked, and `link` is its head or in it.
            link = unsafe { (*link).next };
            if core::ptr::eq(link, head) {
                break;
            }
            // SAFETY: All but the head are in inodes, which are not freed while they are in the
            // list.
            let inode = unsafe { container_of!(link, bindings::inode, i_sb_list) };
            let inode = inode.cast_mut();
            // SAFETY: As above. The counter changes at any time and is read once; an inode that is
            // complete stays so.
            let (pages, is_new) = unsafe {
                (
                    addr_of!((*inode).i_data.nrpages).read_volatile(),
                    helpers::pagefusion_inode_is_new(inode),
                )
            };
            if is_new || pages == 0 && passed < MOST_PASSED {
                continue;
            }
            // SAFETY: As above. It fails for one that is being freed.
            let inode = unsafe { bindings::igrab(inode) };
            if let Some(inode) = NonNull::new(inode) {
                // SAFETY: The reference was just taken; the inode is in this superblock's list.
                found = Some(unsafe { CachedFile::from_raw(inode, self.superblock.clone()) });
                break;
            }
        }
        // SAFETY: Locked above.
        unsafe { bindings::spin_unlock(lock) };
        found
    }
}
