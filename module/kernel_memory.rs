// SPDX-License-Identifier: GPL-2.0

//! The kernel's own read-only memory: where it is, and what it is to the host.

use crate::bindings as helpers;
use crate::iomem;
use crate::page_cache::Place;
use crate::ranges::Range;
use crate::wire::{file_kind, FileIdentity};
use core::ptr::addr_of_mut;
use kernel::alloc::KVVec;
use kernel::bindings;
use kernel::error::from_err_ptr;
use kernel::prelude::*;

/// Frames that hold a part of the kernel that is never freed and hardly ever written.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    /// Finds it among the files; no inode has this address.
    pub(crate) key: usize,
    /// The kernel, as a hash of what it says it is.
    pub(crate) identity: FileIdentity,
    /// Pages from 0 on, and the first frame.
    pub(crate) place: Place,
}

/// Most of the list of resources that is read; with dozens of them it has a few thousand bytes.
const MOST_TEXT: usize = 1 << 16;

/// Text and read-only data of the running kernel, as far as they can be found.
pub(crate) fn parts() -> Result<[Option<Part>; 2]> {
    let text = read_iomem()?;
    Ok([
        part(&text, "Kernel code", file_kind::KERNEL_TEXT),
        part(&text, "Kernel rodata", file_kind::KERNEL_RODATA),
    ])
}

fn part(text: &[u8], name: &str, kind: u32) -> Option<Part> {
    let (start, end) = iomem::find(text, name.as_bytes())?;
    let page = kernel::page::PAGE_SIZE as u64;
    // Only whole pages: what shares the first or last one may be something else.
    let (first, last) = (start.div_ceil(page), end / page);
    let range = Range {
        start: 0,
        end: last.checked_sub(first)?,
    };
    let identity = FileIdentity {
        fs_uuid: kernel_hash(),
        size: end - start,
        kind,
        ..Default::default()
    };
    (!range.is_empty()).then_some(Part {
        key: kind as usize,
        identity,
        place: Place {
            range,
            frame: first,
        },
    })
}

/// A `/proc` of our own, wherever others have mounted theirs.
///
/// # Invariants
///
/// The mount is valid and ours.
struct Proc(*mut bindings::vfsmount);

impl Proc {
    fn mount() -> Result<Self> {
        // SAFETY: The name is a string. The kind is built in, so nothing needs to hold it.
        let kind = unsafe { bindings::get_fs_type(c"proc".as_char_ptr()) };
        if kind.is_null() {
            return Err(ENODEV);
        }
        // SAFETY: The kind was found above.
        let mount = from_err_ptr(unsafe { bindings::kern_mount(kind) })?;
        // INVARIANT: The mount was just made.
        Ok(Self(mount))
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // SAFETY: By the invariants; no file of it is open any more.
        unsafe { bindings::kern_unmount(self.0) };
    }
}

/// The names of ranges of memory. The tree behind them changes under a lock that modules cannot
/// take, and functions that take it give no names: but reading this file does both.
fn read_iomem() -> Result<KVVec<u8>> {
    let mut text = KVVec::from_elem(0, MOST_TEXT, GFP_KERNEL)?;
    let proc = Proc::mount()?;
    // SAFETY: The mount is valid, and so is its root.
    let root = unsafe {
        bindings::path {
            mnt: proc.0,
            dentry: (*proc.0).mnt_root,
        }
    };
    // SAFETY: `root` is valid, the name is a string, and we may sleep.
    let file = unsafe { bindings::file_open_root(&root, c"iomem".as_char_ptr(), 0, 0) };
    let file = from_err_ptr(file)?;
    let (mut length, mut position) = (0, 0);
    let result = loop {
        let rest = text.get_mut(length..).unwrap_or_default();
        if rest.is_empty() {
            break Ok(());
        }
        let (start, size) = (rest.as_mut_ptr().cast(), rest.len());
        // SAFETY: The file is open for reading, and the buffer is as long as we say.
        let read = unsafe { bindings::kernel_read(file, start, size, addr_of_mut!(position)) };
        match usize::try_from(read) {
            Ok(0) => break Ok(()),
            Ok(read) => length += read,
            Err(_) => break Err(EIO),
        }
    };
    // SAFETY: The file was opened above; we run where the last reference may be put at once.
    unsafe { bindings::__fput_sync(file) };
    text.truncate(length);
    result.map(|()| text)
}

/// Tells kernels apart: by release, and by version, which says when it was built.
fn kernel_hash() -> [u8; 16] {
    // SAFETY: Both are strings that always exist and never change.
    let (release, version) = unsafe {
        (
            CStr::from_char_ptr(helpers::pagefusion_kernel_release()),
            CStr::from_char_ptr(helpers::pagefusion_kernel_version()),
        )
    };
    let mut hash = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128;
    for byte in [release, version].iter().flat_map(|text| text.to_bytes()) {
        hash = (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    }
    hash.to_le_bytes()
}
