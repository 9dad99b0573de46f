// SPDX-License-Identifier: GPL-2.0

//! What differs between kernels and machines.

use kernel::bindings;
use kernel::prelude::*;

/// What a probe is told about the entry of the table of devices that matched.
#[cfg(not(before_7_3))]
pub(crate) type IdInfo<'a, T> = Option<&'a T>;
#[cfg(before_7_3)]
pub(crate) type IdInfo<'a, T> = &'a T;

/// Declares a table of devices.
macro_rules! pci_device_table {
    ($table:ident, $info:ty, $devices:tt $(,)?) => {
        #[cfg(not(before_7_3))]
        kernel::pci_device_table!($table, $info, $devices);
        #[cfg(before_7_3)]
        kernel::pci_device_table!($table, MODULE_TABLE, $info, $devices);
    };
}
pub(crate) use pci_device_table;

/// The barriers between this CPU and whoever else works on the same memory, also when this kernel
/// knows one CPU only.
#[cfg(not(before_7_3))]
mod barriers {
    use kernel::sync::barrier::{self, Full, Read, Write};

    pub(crate) fn mb() {
        barrier::mb(Full);
    }

    pub(crate) fn rmb() {
        barrier::mb(Read);
    }

    pub(crate) fn wmb() {
        barrier::mb(Write);
    }
}
#[cfg(before_7_3)]
mod barriers {
    // Of `helpers.c`.
    extern "C" {
        fn pagefusion_mb();
        fn pagefusion_rmb();
        fn pagefusion_wmb();
    }

    pub(crate) fn mb() {
        // SAFETY: Always callable.
        unsafe { pagefusion_mb() }
    }

    pub(crate) fn rmb() {
        // SAFETY: Always callable.
        unsafe { pagefusion_rmb() }
    }

    pub(crate) fn wmb() {
        // SAFETY: Always callable.
        unsafe { pagefusion_wmb() }
    }
}
pub(crate) use barriers::{mb, rmb, wmb};

/// The value of a parameter of the module, to which older kernels give a reference.
#[cfg(not(before_7_3))]
pub(crate) const fn parameter<T>(value: T) -> T {
    value
}
#[cfg(before_7_3)]
pub(crate) const fn parameter<T: Copy>(value: &T) -> T {
    *value
}

/// The number of an inode, which older kernels have as an `unsigned long`.
///
/// # Safety
///
/// `inode` must be valid.
#[cfg(not(before_7_3))]
pub(crate) unsafe fn inode_number(inode: *const bindings::inode) -> u64 {
    // SAFETY: By this function's requirements.
    unsafe { (*inode).i_ino }
}
#[cfg(before_7_3)]
pub(crate) unsafe fn inode_number(inode: *const bindings::inode) -> u64 {
    // SAFETY: By this function's requirements.
    unsafe { (*inode).i_ino as u64 }
}

/// `EOPNOTSUPP`, which has no name of its own in older kernels.
pub(crate) fn not_supported() -> Error {
    Error::from_errno(-(bindings::EOPNOTSUPP as c_int))
}

/// What an interrupt handler returns that has done its work.
#[cfg(not(before_7_3))]
pub(crate) const IRQ_HANDLED: bindings::irqreturn_t = bindings::irqreturn::IRQ_HANDLED;
#[cfg(before_7_3)]
pub(crate) const IRQ_HANDLED: bindings::irqreturn_t = bindings::irqreturn_IRQ_HANDLED;

/// What shows an attribute of a kobject.
pub(crate) type Show = unsafe extern "C" fn(
    *mut bindings::kobject,
    *mut bindings::kobj_attribute,
    *mut c_char,
) -> isize;
/// What stores it.
pub(crate) type Store = unsafe extern "C" fn(
    *mut bindings::kobject,
    *mut bindings::kobj_attribute,
    *const c_char,
    usize,
) -> isize;

/// An attribute of a kobject.
pub(crate) const fn kobj_attribute(
    name: &'static CStr,
    mode: bindings::umode_t,
    show: Show,
    store: Option<Store>,
) -> bindings::kobj_attribute {
    // Kernels with lockdep have more in it, of which zero means that there is nothing.
    // SAFETY: Integers and pointers, all of which may be zero.
    let mut attr: bindings::attribute = unsafe { core::mem::zeroed() };
    attr.name = name.to_bytes_with_nul().as_ptr().cast();
    attr.mode = mode;
    #[cfg(not(before_7_3))]
    return bindings::kobj_attribute {
        attr,
        __bindgen_anon_1: bindings::kobj_attribute__bindgen_ty_1 { show: Some(show) },
        __bindgen_anon_2: bindings::kobj_attribute__bindgen_ty_2 { store },
    };
    #[cfg(before_7_3)]
    return bindings::kobj_attribute {
        attr,
        show: Some(show),
        store,
    };
}

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
