// SPDX-License-Identifier: GPL-2.0

//! Raw functions of `helpers.c`. Only the files that wrap them safely use these.

use kernel::bindings::{folio, inode, loff_t, mm_struct, vma_iterator};
use kernel::ffi::{c_char, c_uint, c_ulong};

#[allow(improper_ctypes)]
extern "C" {
    pub(crate) fn pagefusion_kick();
    pub(crate) fn pagefusion_wait(milliseconds: c_uint);
    pub(crate) fn pagefusion_cond_resched();
    pub(crate) fn pagefusion_preempt_disable();
    pub(crate) fn pagefusion_preempt_enable();
    pub(crate) fn pagefusion_vma_iter_init(
        iterator: *mut vma_iterator,
        mm: *mut mm_struct,
        address: c_ulong,
    );
    pub(crate) fn pagefusion_i_size_read(inode: *const inode) -> loff_t;
    pub(crate) fn pagefusion_folio_nr_pages(folio: *const folio) -> c_ulong;
    pub(crate) fn pagefusion_folio_pfn(folio: *mut folio) -> c_ulong;
    pub(crate) fn pagefusion_pfn_folio(pfn: c_ulong) -> *mut folio;
    pub(crate) fn pagefusion_folio_maybe_dma_pinned(folio: *mut folio) -> bool;
    pub(crate) fn pagefusion_folio_contain_hwpoisoned_page(folio: *mut folio) -> bool;
    pub(crate) fn pagefusion_folio_get(folio: *mut folio);
    pub(crate) fn pagefusion_folio_put(folio: *mut folio);
    pub(crate) fn pagefusion_kernel_release() -> *const c_char;
    pub(crate) fn pagefusion_kernel_version() -> *const c_char;
}
