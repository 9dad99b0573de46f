/* SPDX-License-Identifier: GPL-2.0 */
#ifndef PAGEFUSION_LOOK_H
#define PAGEFUSION_LOOK_H

#include <linux/fs.h>

/* Pages that were contiguous in a page cache and in memory. */
struct pagefusion_sight {
	unsigned long page;
	unsigned long pages;
	unsigned long pfn;
	/* Nonzero when they were dirty or under writeback. */
	unsigned long unsettled;
};

unsigned int pagefusion_look(struct address_space *mapping, unsigned long *next,
			     unsigned long last, struct pagefusion_sight *sights,
			     unsigned int most);

#endif
