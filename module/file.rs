// SPDX-License-Identifier: GPL-2.0

//! Files with pages in the page cache: a reference to one, whether its pages may be reported,
//! its identity and its name.

use crate::bindings as helpers;
use crate::compat;
use crate::superblock::HeldSuper;
use crate::wire::{file_kind, FileIdentity};
use core::ptr::{addr_of, NonNull};
use kernel::bindings;
use kernel::error::from_err_ptr;
use kernel::prelude::*;

const S_IFMT: u16 = 0o170_000;
const S_IFREG: u16 = 0o100_000;
const S_DAX: u32 = 1 << 13;
/// Memory that nobody but its owner may see, or that is not made of ordinary pages, behind inodes
/// that look regular.
const UNFIT_MAGICS: [u64; 3] = [
    0x5345_434d, /* secretmem */
    0x474d_454d, /* guest_memfd */
    0x9584_58f6, /* hugetlbfs */
];
/// `F_SEAL_WRITE` and `F_SEAL_FUTURE_WRITE`.
const SEALED: c_uint = 0x8 | 0x10;

/// The superblock is the kernel's own; `helpers.c` compares it.
const SB_NOUSER: usize = 1 << 31;

/// A reference to the inode that caches a file's pages. On stacked file systems that is the real
/// file's, so that all who see it through one of them share it.
///
/// # Invariants
///
/// `inode` is valid, and this owns one reference to it; it belongs to the superblock that is held.
pub(crate) struct CachedFile<'a> {
    inode: NonNull<bindings::inode>,
    /// Let go after the inode.
    _superblock: HeldSuper<'a>,
}

/// What must be known of a file before its pages are looked at.
pub(crate) struct Facts {
    /// What the host is told.
    pub(crate) identity: FileIdentity,
    /// Hash of the identity and the device: differs when the file does.
    pub(crate) stamp: u64,
    /// Pages up to the end of the file.
    pub(crate) pages: u64,
    /// Whether a dirty page is one that will be written back. Where nothing is ever written back,
    /// as on tmpfs, all that was written is dirty for ever.
    pub(crate) is_written_back: bool,
}

impl<'a> CachedFile<'a> {
    /// Takes a reference.
    ///
    /// # Safety
    ///
    /// `inode` must be valid and belong to `superblock`, and something must keep its count above
    /// zero during this call: an open file does.
    pub(crate) unsafe fn get(inode: NonNull<bindings::inode>, superblock: HeldSuper<'a>) -> Self {
        // SAFETY: By this function's requirements.
        unsafe { bindings::ihold(inode.as_ptr()) };
        // INVARIANT: The reference was just taken.
        Self {
            inode,
            _superblock: superblock,
        }
    }

    /// Takes over a reference.
    ///
    /// # Safety
    ///
    /// The caller must own a reference to `inode`, which must belong to `superblock`.
    pub(crate) const unsafe fn from_raw(
        inode: NonNull<bindings::inode>,
        superblock: HeldSuper<'a>,
    ) -> Self {
        // INVARIANT: By this function's requirements.
        Self {
            inode,
            _superblock: superblock,
        }
    }

    /// The inode, for as long as this exists.
    pub(crate) const fn as_ptr(&self) -> *mut bindings::inode {
        self.inode.as_ptr()
    }

    /// Whether anything of it is cached.
    pub(crate) fn has_pages(&self) -> bool {
        // SAFETY: Valid by the invariants; the counter changes at any time and is read once.
        unsafe { addr_of!((*self.mapping()).nrpages).read_volatile() != 0 }
    }

    /// The page cache.
    pub(crate) fn mapping(&self) -> *mut bindings::address_space {
        // SAFETY: Valid by the invariants; regular files never change their mapping.
        unsafe { (*self.as_ptr()).i_mapping }
    }

    /// Whether it is mapped anywhere, in whatever way.
    pub(crate) fn is_mapped(&self) -> bool {
        // SAFETY: Valid by the invariants; the root changes at any time and is read once.
        unsafe {
            let root = addr_of!((*self.mapping()).i_mmap.rb_root.rb_node);
            !root.read_volatile().is_null()
        }
    }

    /// Tells files apart. Proves nothing once the file is let go.
    pub(crate) fn key(&self) -> usize {
        self.as_ptr() as usize
    }

    /// Tells files apart, as [`hash_of`] does.
    pub(crate) fn hash(&self) -> u64 {
        // SAFETY: By the invariants.
        unsafe { hash_of(self.mapping()) }
    }

    /// Whether somebody may write to it now: has it open for that, or a mapping that may be written.
    /// Then a device may come to write to its pages as well, for a direct read into such a mapping.
    pub(crate) fn may_be_written(&self) -> bool {
        let (mapping, inode) = (self.mapping(), self.as_ptr());
        // SAFETY: Valid by the invariants; the counters change at any time and are read once.
        let (writers, writable) = unsafe {
            (
                addr_of!((*inode).i_writecount.counter).read_volatile(),
                addr_of!((*mapping).i_mmap_writable.counter).read_volatile(),
            )
        };
        writers > 0 || writable > 0
    }

    /// The file's facts, or `None` when its pages must not be reported.
    pub(crate) fn facts(&self) -> Option<Facts> {
        let (mapping, inode) = (self.mapping(), self.as_ptr());
        // SAFETY: Valid by the invariants; what changes at any time is read once.
        let (mode, flags, mapping_flags) = unsafe {
            (
                addr_of!((*inode).i_mode).read(),
                addr_of!((*inode).i_flags).read_volatile(),
                addr_of!((*mapping).flags).read_volatile(),
            )
        };
        let inaccessible = mapping_flags >> bindings::mapping_flags_AS_INACCESSIBLE & 1 != 0;
        if mode & S_IFMT != S_IFREG || flags & S_DAX != 0 || inaccessible || self.may_be_written() {
            return None;
        }
        if self.may_be_written_unnoticed() {
            return None;
        }
        // SAFETY: The superblock is held by the invariants.
        let (magic, device, mut fs_uuid) = unsafe {
            let sb = (*inode).i_sb;
            ((*sb).s_magic as u64, (*sb).s_dev, (*sb).s_uuid.b)
        };
        if UNFIT_MAGICS.contains(&magic) {
            return None;
        }
        if fs_uuid == [0; 16] {
            fs_uuid[..8].copy_from_slice(&magic.to_le_bytes());
            fs_uuid[8..12].copy_from_slice(&device.to_le_bytes());
        }
        // SAFETY: The inode is valid. Times may be torn by a concurrent change, which changes
        // the identity once more.
        let (seconds, nanoseconds, inode_number, generation, size) = unsafe {
            (
                addr_of!((*inode).i_mtime_sec).read_volatile(),
                addr_of!((*inode).i_mtime_nsec).read_volatile(),
                compat::inode_number(inode),
                (*inode).i_generation,
                helpers::pagefusion_i_size_read(inode),
            )
        };
        let size = u64::try_from(size).ok()?;
        // SAFETY: The mapping and its inode are valid.
        let is_written_back = unsafe { helpers::pagefusion_mapping_can_writeback(mapping) };
        let identity = FileIdentity {
            fs_uuid,
            inode: inode_number,
            size,
            mtime_ns: (seconds as u64)
                .wrapping_mul(1_000_000_000)
                .wrapping_add(u64::from(nanoseconds)),
            generation,
            kind: file_kind::REGULAR,
        };
        let pages = size.div_ceil(kernel::page::PAGE_SIZE as u64);
        Some(Facts {
            stamp: stamp(&identity, device),
            identity,
            pages,
            is_written_back,
        })
    }

    /// Whether it is memory with a file around it (a memfd, System V shared memory) that is not
    /// sealed: who writes to that never opened it for writing, so nobody counted them.
    fn may_be_written_unnoticed(&self) -> bool {
        let inode = self.as_ptr();
        // SAFETY: Valid by the invariants; the kernel's own mount of tmpfs is the only one of that
        // kind that users cannot reach. Seals are read once.
        unsafe {
            let is_internal = (*(*inode).i_sb).s_flags & SB_NOUSER != 0;
            is_internal
                && helpers::shmem_mapping(self.mapping())
                && helpers::pagefusion_shmem_seals(inode) & SEALED == 0
        }
    }

    /// The file's path in its file system, written into `buffer`; empty when it has none, or one
    /// that nobody knows: a file that was opened by its handle, and memory without a name, are
    /// the root of a tree of their own.
    pub(crate) fn name<'b>(&self, buffer: &'b mut [u8]) -> &'b [u8] {
        // SAFETY: The inode is valid by the invariants.
        let dentry = unsafe { bindings::d_find_any_alias(self.as_ptr()) };
        if dentry.is_null() {
            return &[];
        }
        // SAFETY: The dentry is valid until it is put, and the buffer is as long as we say.
        let path = unsafe {
            let (start, length) = (buffer.as_mut_ptr().cast(), buffer.len() as c_int);
            bindings::dentry_path_raw(dentry, start, length)
        };
        // SAFETY: `d_find_any_alias` gave us a reference; we may sleep.
        unsafe { bindings::dput(dentry) };
        let Ok(path) = from_err_ptr(path) else {
            return &[];
        };
        let start = (path as usize).wrapping_sub(buffer.as_ptr() as usize);
        let rest = buffer.get(start..).unwrap_or_default();
        let end = rest
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(rest.len());
        match &rest[..end] {
            b"/" => &[],
            path => path,
        }
    }
}

impl Drop for CachedFile<'_> {
    fn drop(&mut self) {
        // SAFETY: By the invariants we own a reference. We run in a kernel thread that may sleep;
        // the superblock is held until this returns, so it is neither shut down nor frozen.
        unsafe { bindings::iput(self.as_ptr()) };
    }
}

/// Tells files apart, and a file from one that had its memory before, as good as a hash can.
///
/// # Safety
///
/// `mapping` must be that of a file in use.
pub(crate) unsafe fn hash_of(mapping: *mut bindings::address_space) -> u64 {
    // SAFETY: By this function's requirements.
    let inode = unsafe { (*mapping).host };
    if inode.is_null() {
        return 0;
    }
    // SAFETY: The inode is valid while its mapping is.
    let (number, generation) = unsafe { (compat::inode_number(inode), (*inode).i_generation) };
    inode as u64 ^ number.rotate_left(20) ^ u64::from(generation).rotate_left(40)
}

fn stamp(identity: &FileIdentity, device: u32) -> u64 {
    let words = [
        u64::from(device) << 32 | u64::from(identity.generation),
        identity.inode,
        identity.size,
        identity.mtime_ns,
    ];
    words.iter().fold(0, |hash: u64, word| {
        (hash ^ word)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
    })
}
