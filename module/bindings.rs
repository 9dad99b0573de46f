// SPDX-License-Identifier: GPL-2.0

//! Raw functions of `helpers.c` and `look.c`, and of the kernel where its own bindings lack them.
//! Only the files that wrap them safely use these.

use crate::sight::Sight;
use kernel::bindings::{
    address_space, folio, inode, loff_t, mm_struct, notifier_block, rw_semaphore, task_struct,
    vma_iterator,
};
use kernel::ffi::{c_char, c_int, c_uint, c_ulong};

/// The reason of a reboot notification, a macro; `helpers.h` checks it.
pub(crate) const SYS_RESTART: c_ulong = 1;

#[allow(improper_ctypes)]
extern "C" {
    pub(crate) fn register_reboot_notifier(notifier: *mut notifier_block) -> c_int;
    pub(crate) fn unregister_reboot_notifier(notifier: *mut notifier_block) -> c_int;
    pub(crate) fn pagefusion_freezing(task: *mut task_struct) -> bool;
    pub(crate) fn pagefusion_try_to_freeze();
    pub(crate) fn pagefusion_kick();
    pub(crate) fn pagefusion_wait(milliseconds: c_uint);
    pub(crate) fn pagefusion_wait_unfrozen(milliseconds: c_uint);
    pub(crate) fn pagefusion_cond_resched();
    pub(crate) fn pagefusion_local_bh_disable();
    pub(crate) fn pagefusion_local_bh_enable();
    pub(crate) fn pagefusion_vma_iter_init(
        iterator: *mut vma_iterator,
        mm: *mut mm_struct,
        address: c_ulong,
    );
    pub(crate) fn pagefusion_rwsem_is_contended(semaphore: *mut rw_semaphore) -> bool;
    pub(crate) fn pagefusion_task_lock(task: *mut task_struct);
    pub(crate) fn pagefusion_task_unlock(task: *mut task_struct);
    pub(crate) fn pagefusion_next_thread(task: *mut task_struct) -> *mut task_struct;
    pub(crate) fn pagefusion_mapping_can_writeback(mapping: *mut address_space) -> bool;
    pub(crate) fn shmem_mapping(mapping: *mut address_space) -> bool;
    pub(crate) fn pagefusion_shmem_seals(inode: *mut inode) -> c_uint;
    pub(crate) fn pagefusion_inode_is_new(inode: *mut inode) -> bool;
    pub(crate) fn pagefusion_i_size_read(inode: *const inode) -> loff_t;
    pub(crate) fn pagefusion_folio_nr_pages(folio: *const folio) -> c_ulong;
    pub(crate) fn pagefusion_folio_pfn(folio: *mut folio) -> c_ulong;
    pub(crate) fn pagefusion_pfn_folio(pfn: c_ulong) -> *mut folio;
    pub(crate) fn pagefusion_folio_mapped(folio: *const folio) -> bool;
    pub(crate) fn pagefusion_lru_refs_mask() -> c_ulong;
    pub(crate) fn pagefusion_folio_maybe_dma_pinned(folio: *mut folio) -> bool;
    pub(crate) fn pagefusion_folio_contain_hwpoisoned_page(folio: *mut folio) -> bool;
    pub(crate) fn pagefusion_folio_get(folio: *mut folio);
    pub(crate) fn pagefusion_folio_put(folio: *mut folio);
    pub(crate) fn pagefusion_tracepoint_synchronize();
    pub(crate) fn pagefusion_kernel_release() -> *const c_char;
    pub(crate) fn pagefusion_kernel_version() -> *const c_char;
    pub(crate) fn pagefusion_look(
        mapping: *mut address_space,
        next: *mut c_ulong,
        last: c_ulong,
        sights: *mut Sight,
        most: c_uint,
    ) -> c_uint;
}
