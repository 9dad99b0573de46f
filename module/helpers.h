/* SPDX-License-Identifier: GPL-2.0 */
#ifndef PAGEFUSION_HELPERS_H
#define PAGEFUSION_HELPERS_H

#include <linux/fs.h>
#include <linux/mm_types.h>
#include <linux/reboot.h>

/* As bindings.rs has it. */
static_assert(SYS_RESTART == 1);

void pagefusion_kick(void);
void pagefusion_wait(unsigned int milliseconds);
void pagefusion_wait_unfrozen(unsigned int milliseconds);
bool pagefusion_freezing(struct task_struct *task);
void pagefusion_try_to_freeze(void);
void pagefusion_cond_resched(void);
void pagefusion_local_bh_disable(void);
void pagefusion_local_bh_enable(void);
void pagefusion_vma_iter_init(struct vma_iterator *iterator, struct mm_struct *mm,
			      unsigned long address);
bool pagefusion_rwsem_is_contended(struct rw_semaphore *semaphore);
void pagefusion_task_lock(struct task_struct *task);
void pagefusion_task_unlock(struct task_struct *task);
struct task_struct *pagefusion_next_thread(struct task_struct *task);
bool pagefusion_mapping_can_writeback(struct address_space *mapping);
unsigned int pagefusion_shmem_seals(struct inode *inode);
bool pagefusion_inode_is_new(struct inode *inode);
loff_t pagefusion_i_size_read(const struct inode *inode);
unsigned long pagefusion_folio_nr_pages(const struct folio *folio);
unsigned long pagefusion_folio_pfn(struct folio *folio);
struct folio *pagefusion_pfn_folio(unsigned long pfn);
bool pagefusion_folio_mapped(const struct folio *folio);
unsigned long pagefusion_lru_refs_mask(void);
bool pagefusion_folio_maybe_dma_pinned(struct folio *folio);
bool pagefusion_folio_contain_hwpoisoned_page(struct folio *folio);
void pagefusion_folio_get(struct folio *folio);
void pagefusion_folio_put(struct folio *folio);
void pagefusion_tracepoint_synchronize(void);
const char *pagefusion_kernel_release(void);
const char *pagefusion_kernel_version(void);
void pagefusion_mb(void);
void pagefusion_rmb(void);
void pagefusion_wmb(void);

#endif
