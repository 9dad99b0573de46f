// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros of the kernel that Rust cannot call, one to one, and the event
 * the worker sleeps on, whose waiting is a macro. No logic lives here.
 */

#include <linux/atomic.h>
#include <linux/backing-dev.h>
#include <linux/bottom_half.h>
#include <linux/freezer.h>
#include <linux/io.h>
#include <linux/jiffies.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/rwsem.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/shmem_fs.h>
#include <linux/tracepoint.h>
#include <linux/utsname.h>
#include <linux/wait.h>

#include "helpers.h"

static DECLARE_WAIT_QUEUE_HEAD(pagefusion_queue);
static atomic_t pagefusion_kicked = ATOMIC_INIT(0);

void pagefusion_kick(void)
{
	atomic_set(&pagefusion_kicked, 1);
	wake_up_interruptible(&pagefusion_queue);
}

void pagefusion_wait(unsigned int milliseconds)
{
	wait_event_freezable_timeout(pagefusion_queue,
				     atomic_xchg(&pagefusion_kicked, 0) ||
				     kthread_should_stop(),
				     msecs_to_jiffies(milliseconds));
}

void pagefusion_wait_unfrozen(unsigned int milliseconds)
{
	wait_event_interruptible_timeout(pagefusion_queue,
					 atomic_xchg(&pagefusion_kicked, 0) ||
					 kthread_should_stop() || freezing(current),
					 msecs_to_jiffies(milliseconds));
}

void pagefusion_try_to_freeze(void)
{
	try_to_freeze();
}

bool pagefusion_freezing(struct task_struct *task)
{
	return freezing(task);
}

void pagefusion_cond_resched(void)
{
	cond_resched();
}

void pagefusion_local_bh_disable(void)
{
	local_bh_disable();
}

void pagefusion_local_bh_enable(void)
{
	local_bh_enable();
}

void pagefusion_vma_iter_init(struct vma_iterator *iterator, struct mm_struct *mm,
			      unsigned long address)
{
	vma_iter_init(iterator, mm, address);
}

/* The superblock flags that superblock.rs and file.rs name. */
static_assert(SB_DYING == 1UL << 24);
static_assert(SB_BORN == 1UL << 29);
static_assert(SB_ACTIVE == 1UL << 30);
static_assert(SB_NOUSER == 1UL << 31);
static_assert(SB_UNFROZEN == 0);

bool pagefusion_rwsem_is_contended(struct rw_semaphore *semaphore)
{
	return rwsem_is_contended(semaphore);
}

void pagefusion_task_lock(struct task_struct *task)
{
	task_lock(task);
}

void pagefusion_task_unlock(struct task_struct *task)
{
	task_unlock(task);
}

struct task_struct *pagefusion_next_thread(struct task_struct *task)
{
	return __next_thread(task);
}

bool pagefusion_mapping_can_writeback(struct address_space *mapping)
{
	return mapping_can_writeback(mapping);
}

unsigned int pagefusion_shmem_seals(struct inode *inode)
{
	return READ_ONCE(SHMEM_I(inode)->seals);
}

bool pagefusion_inode_is_new(struct inode *inode)
{
	return inode_state_read_once(inode) & I_NEW;
}

loff_t pagefusion_i_size_read(const struct inode *inode)
{
	return i_size_read(inode);
}

unsigned long pagefusion_folio_nr_pages(const struct folio *folio)
{
	return folio_nr_pages(folio);
}

unsigned long pagefusion_folio_pfn(struct folio *folio)
{
	return folio_pfn(folio);
}

struct folio *pagefusion_pfn_folio(unsigned long pfn)
{
	return pfn_folio(pfn);
}

bool pagefusion_folio_mapped(const struct folio *folio)
{
	return folio_mapped(folio);
}

/* Which flags count accesses; none without the multi-generational LRU. */
unsigned long pagefusion_lru_refs_mask(void)
{
#ifdef CONFIG_LRU_GEN
	return LRU_REFS_MASK;
#else
	return 0;
#endif
}

bool pagefusion_folio_maybe_dma_pinned(struct folio *folio)
{
	return folio_maybe_dma_pinned(folio);
}

bool pagefusion_folio_contain_hwpoisoned_page(struct folio *folio)
{
	return folio_contain_hwpoisoned_page(folio);
}

void pagefusion_folio_get(struct folio *folio)
{
	folio_get(folio);
}

void pagefusion_folio_put(struct folio *folio)
{
	folio_put(folio);
}

void pagefusion_tracepoint_synchronize(void)
{
	tracepoint_synchronize_unregister();
}

const char *pagefusion_kernel_release(void)
{
	return init_utsname()->release;
}

const char *pagefusion_kernel_version(void)
{
	return init_utsname()->version;
}

void pagefusion_mb(void)
{
	mb();
}

void pagefusion_rmb(void)
{
	rmb();
}

void pagefusion_wmb(void)
{
	wmb();
}
