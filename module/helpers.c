// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros of the kernel that Rust cannot call, one to one, and the event
 * the worker sleeps on, whose waiting is a macro. No logic lives here.
 */

#include <linux/atomic.h>
#include <linux/freezer.h>
#include <linux/io.h>
#include <linux/jiffies.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/preempt.h>
#include <linux/sched.h>
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

void pagefusion_cond_resched(void)
{
	cond_resched();
}

void pagefusion_preempt_disable(void)
{
	preempt_disable();
}

void pagefusion_preempt_enable(void)
{
	preempt_enable();
}

void pagefusion_vma_iter_init(struct vma_iterator *iterator, struct mm_struct *mm,
			      unsigned long address)
{
	vma_iter_init(iterator, mm, address);
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

const char *pagefusion_kernel_release(void)
{
	return init_utsname()->release;
}

const char *pagefusion_kernel_version(void)
{
	return init_utsname()->version;
}
