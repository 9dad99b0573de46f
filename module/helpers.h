/* SPDX-License-Identifier: GPL-2.0 */
#ifndef PAGEFUSION_HELPERS_H
#define PAGEFUSION_HELPERS_H

#include <linux/fs.h>
#include <linux/mm_types.h>

void pagefusion_kick(void);
void pagefusion_wait(unsigned int milliseconds);
void pagefusion_cond_resched(void);
void pagefusion_preempt_disable(void);
void pagefusion_preempt_enable(void);
void pagefusion_vma_iter_init(struct vma_iterator *iterator, struct mm_struct *mm,
			      unsigned long address);
loff_t pagefusion_i_size_read(const struct inode *inode);
unsigned long pagefusion_folio_nr_pages(const struct folio *folio);
unsigned long pagefusion_folio_pfn(struct folio *folio);
struct folio *pagefusion_pfn_folio(unsigned long pfn);
bool pagefusion_folio_maybe_dma_pinned(struct folio *folio);
bool pagefusion_folio_contain_hwpoisoned_page(struct folio *folio);
void pagefusion_folio_get(struct folio *folio);
void pagefusion_folio_put(struct folio *folio);
const char *pagefusion_kernel_release(void);
const char *pagefusion_kernel_version(void);

#endif
