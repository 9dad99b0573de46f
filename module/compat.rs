// SPDX-License-Identifier: GPL-2.0

//! What differs between kernels and machines.

use kernel::bindings;
use kernel::prelude::*;

/// Whether this guest's memory is hidden from its host.
pub(crate) fn is_confidential() -> bool {
    // SAFETY: Always callable.
    unsafe { bindings::cc_platform_has(bindings::cc_attr_CC_ATTR_GUEST_MEM_ENCRYPT) }
}

/// One more than the highest frame of this guest, in guest pages.
pub(crate) fn memory_pages() -> u64 {
    let mut end = 0_u64;
    // SAFETY: `note` takes a `*mut u64`, which outlives the walk.
    unsafe {
        bindings::walk_iomem_res_desc(
            bindings::IORES_DESC_NONE as usize,
            (bindings::IORESOURCE_SYSTEM_RAM | bindings::IORESOURCE_BUSY) as usize,
            0,
            u64::MAX,
            (&raw mut end).cast(),
            Some(note),
        )
    };
    end.div_ceil(kernel::page::PAGE_SIZE as u64)
}

/// # Safety
///
/// `end` must point to a `u64`, and `resource` be valid.
unsafe extern "C" fn note(resource: *mut bindings::resource, end: *mut c_void) -> c_int {
    // SAFETY: By this function's requirements.
    let (resource, end) = unsafe { (&*resource, &mut *end.cast::<u64>()) };
    *end = (*end).max(resource.end + 1);
    0
}
