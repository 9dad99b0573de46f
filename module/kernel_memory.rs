// SPDX-License-Identifier: GPL-2.0

//! The kernel's own read-only memory: where it is, and what it is to the host.

use crate::bindings as helpers;
use crate::page_cache::Place;
use crate::ranges::Range;
use crate::wire::{file_kind, FileIdentity};
use kernel::bindings;
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

/// Most resources looked at; there are dozens.
const MOST_RESOURCES: usize = 4096;

/// Text and read-only data of the running kernel, as far as they can be found.
pub(crate) fn parts() -> [Option<Part>; 2] {
    [
        part(c"Kernel code", file_kind::KERNEL_TEXT),
        part(c"Kernel rodata", file_kind::KERNEL_RODATA),
    ]
}

fn part(name: &CStr, kind: u32) -> Option<Part> {
    let (start, end) = find(name)?;
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

/// First byte of a child of a range of RAM, and the byte after its last.
fn find(name: &CStr) -> Option<(u64, u64)> {
    // SAFETY: The root always exists. Entries for the kernel and for the memory it was loaded
    // into are made at boot and never freed; this runs while a device is probed, which memory
    // hot-plug, the only other thing to change entries of RAM, does not overlap in practice.
    let mut outer = unsafe { (&raw const bindings::iomem_resource.child).read() };
    for _ in 0..MOST_RESOURCES {
        if outer.is_null() {
            break;
        }
        // SAFETY: As above.
        let (mut inner, next) = unsafe { ((*outer).child, (*outer).sibling) };
        for _ in 0..MOST_RESOURCES {
            if inner.is_null() {
                break;
            }
            // SAFETY: As above; names are strings.
            let (label, start, end) = unsafe { ((*inner).name, (*inner).start, (*inner).end) };
            if !label.is_null() {
                // SAFETY: As above.
                let label = unsafe { CStr::from_char_ptr(label) };
                if label.to_bytes() == name.to_bytes() {
                    return Some((start, end + 1));
                }
            }
            // SAFETY: As above.
            inner = unsafe { (*inner).sibling };
        }
        outer = next;
    }
    None
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
