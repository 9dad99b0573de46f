// SPDX-License-Identifier: GPL-2.0

//! Mapped files: a reference to one, whether its pages may be reported, and its identity.

use crate::bindings as helpers;
use crate::wire::{file_kind, FileIdentity};
use core::ptr::{addr_of, NonNull};
use kernel::bindings;
use kernel::error::from_err_ptr;
use kernel::prelude::*;

const S_IFMT: u16 = 0o170_000;
const S_IFREG: u16 = 0o100_000;
const S_DAX: u32 = 1 << 13;
/// Memory that nobody but its owner may see, behind inodes that look regular.
const SECRET_MAGICS: [u64; 2] = [
    0x5345_434d, /* secretmem */
    0x474d_454d, /* guest_memfd */
];

/// A reference to an open file that is mapped somewhere.
///
/// # Invariants
///
/// The pointer is valid and owns one reference to the file, so `f_mapping` and its host inode
/// live as long as this.
pub(crate) struct MappedFile(NonNull<bindings::file>);

// SAFETY: The reference may be put by any thread that may sleep.
unsafe impl Send for MappedFile {}

/// What must be known of a file before its pages are looked at.
pub(crate) struct Facts {
    /// What the host is told.
    pub(crate) identity: FileIdentity,
    /// Hash of the identity and the device: differs when the file does.
    pub(crate) stamp: u64,
    /// Pages up to the end of the file.
    pub(crate) pages: u64,
}

impl MappedFile {
    /// Takes a reference.
    ///
    /// # Safety
    ///
    /// `file` must be valid, and something must keep its count above zero during this call: a
    /// VMA under the mmap lock does.
    pub(crate) unsafe fn get(file: NonNull<bindings::file>) -> Self {
        // SAFETY: By this function's requirements.
        unsafe { bindings::get_file(file.as_ptr()) };
        // INVARIANT: The reference was just taken.
        Self(file)
    }

    /// The page cache of the file. On stacked file systems that of the real file.
    pub(crate) fn mapping(&self) -> *mut bindings::address_space {
        // SAFETY: Valid by the invariants; `f_mapping` does not change while a file is open.
        unsafe { (*self.0.as_ptr()).f_mapping }
    }

    fn inode(&self) -> *mut bindings::inode {
        // SAFETY: A file's mapping and its host are valid while the file is.
        unsafe { (*self.mapping()).host }
    }

    /// Tells files apart by what caches their pages. Proves nothing once the file is let go.
    pub(crate) fn key(&self) -> usize {
        self.inode() as usize
    }

    /// The file's facts, or `None` when its pages must not be reported.
    pub(crate) fn facts(&self) -> Option<Facts> {
        let (mapping, inode) = (self.mapping(), self.inode());
        if inode.is_null() {
            return None;
        }
        // SAFETY: Valid while the file is; the counters change at any time and are read once.
        let (mode, flags, writers, writable, mapping_flags) = unsafe {
            (
                addr_of!((*inode).i_mode).read(),
                addr_of!((*inode).i_flags).read_volatile(),
                addr_of!((*inode).i_writecount.counter).read_volatile(),
                addr_of!((*mapping).i_mmap_writable.counter).read_volatile(),
                addr_of!((*mapping).flags).read_volatile(),
            )
        };
        let inaccessible = mapping_flags >> bindings::mapping_flags_AS_INACCESSIBLE & 1 != 0;
        if mode & S_IFMT != S_IFREG
            || flags & S_DAX != 0
            || writers > 0
            || writable > 0
            || inaccessible
        {
            return None;
        }
        // SAFETY: An inode in use has a superblock, which lives as long as it.
        let (magic, device, mut fs_uuid) = unsafe {
            let sb = (*inode).i_sb;
            ((*sb).s_magic as u64, (*sb).s_dev, (*sb).s_uuid.b)
        };
        if SECRET_MAGICS.contains(&magic) {
            return None;
        }
        if fs_uuid == [0; 16] {
            fs_uuid[..8].copy_from_slice(&magic.to_le_bytes());
            fs_uuid[8..12].copy_from_slice(&device.to_le_bytes());
        }
        #[allow(
            clippy::unnecessary_cast,
            reason = "inode numbers are `unsigned long` on older kernels"
        )]
        // SAFETY: The inode is valid. Times may be torn by a concurrent change, which changes
        // the identity once more.
        let (seconds, nanoseconds, inode_number, generation, size) = unsafe {
            (
                addr_of!((*inode).i_mtime_sec).read_volatile(),
                addr_of!((*inode).i_mtime_nsec).read_volatile(),
                (*inode).i_ino as u64,
                (*inode).i_generation,
                helpers::pagefusion_i_size_read(inode),
            )
        };
        let size = u64::try_from(size).ok()?;
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
        })
    }

    /// The file's path as its own mount sees it, written into `buffer`; empty when it has none.
    pub(crate) fn name<'a>(&self, buffer: &'a mut [u8]) -> &'a [u8] {
        // SAFETY: The file is valid and the buffer is as long as we say.
        let path = unsafe {
            bindings::file_path(
                self.0.as_ptr(),
                buffer.as_mut_ptr().cast(),
                buffer.len() as c_int,
            )
        };
        let Ok(path) = from_err_ptr(path) else {
            return &[];
        };
        let start = (path as usize).wrapping_sub(buffer.as_ptr() as usize);
        let rest = buffer.get(start..).unwrap_or_default();
        let end = rest
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(rest.len());
        &rest[..end]
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: By the invariants we own a reference. We run in a kernel thread without locks,
        // where the last one may be put at once, so that an unmount finds nothing delayed.
        unsafe { bindings::__fput_sync(self.0.as_ptr()) };
    }
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
