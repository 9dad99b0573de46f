/* SPDX-License-Identifier: GPL-2.0 */
#ifndef PAGEFUSION_LOOK_H
#define PAGEFUSION_LOOK_H

#include <linux/bits.h>
#include <linux/fs.h>
#include <linux/types.h>

/* Pages that were contiguous in a page cache and in memory. */
struct pagefusion_sight {
	u64 pfn;
	/* From the lowest bit on: first page, number of pages; the highest: see below. */
	u64 extent;
};

#define PAGEFUSION_SIGHT_PAGES_SHIFT 32
/* They were dirty or under writeback. */
#define PAGEFUSION_SIGHT_UNSETTLED BIT_ULL(63)

unsigned int pagefusion_look(struct address_space *mapping, unsigned long *next,
			     unsigned long last, struct pagefusion_sight *sights,
			     unsigned int most);

#endif
