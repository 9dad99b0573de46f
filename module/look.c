// SPDX-License-Identifier: GPL-2.0
/*
 * A look at a page cache that takes no reference to what it sees: the array is walked under RCU,
 * as cachestat(2) does, and all there is to know is taken from it. No folio is touched, since it
 * may be freed and used for something else meanwhile; where it lies follows from its address.
 *
 * What is seen may be out of date, and while a large folio is split or replaced it may never have
 * been true. It is good for finding where a proper look is worth its cost, and for nothing else.
 */

#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/rcupdate.h>
#include <linux/xarray.h>

#include "look.h"

/* Entries of the array that are looked at in one RCU read-side section. */
#define MOST_ENTRIES 512

/* Elsewhere a frame's number takes a look at the folio. */
static_assert(IS_ENABLED(CONFIG_SPARSEMEM_VMEMMAP) || IS_ENABLED(CONFIG_FLATMEM));

/* What has been seen so far. */
struct look {
	struct pagefusion_sight *sights;
	unsigned int most;
	unsigned int seen;
	unsigned int entries;
};

/* Adds pages that were seen; false when there is no room for them. */
static __always_inline bool add(struct look *look, unsigned long page, unsigned long pages,
				unsigned long pfn, unsigned long unsettled)
{
	struct pagefusion_sight *sight = look->sights + look->seen;

	if (look->entries == MOST_ENTRIES)
		return false;
	if (look->seen && page == sight[-1].page + sight[-1].pages &&
	    pfn == sight[-1].pfn + sight[-1].pages && unsettled == sight[-1].unsettled) {
		sight[-1].pages += pages;
	} else {
		if (look->seen == look->most)
			return false;
		*sight = (struct pagefusion_sight){ page, pages, pfn, unsettled };
		look->seen++;
	}
	look->entries++;
	return true;
}

/*
 * Goes on through single pages that lie in the same node of the array as the entry at hand, as
 * far as there is nothing but such pages. What xas_for_each() would do, in a third of the time.
 */
static __always_inline void add_singles(struct look *look, struct xa_state *xas,
					unsigned long last)
{
	unsigned int offset = xas->xa_offset;
	void __rcu *const *slot = &xas->xa_node->slots[offset];
	unsigned long page = xas->xa_index;
	void *next = offset < XA_CHUNK_MASK ? rcu_dereference_raw(slot[1]) : NULL;

	while (page < last && next && !((unsigned long)next & 3)) {
		void *after = offset + 1 < XA_CHUNK_MASK ? rcu_dereference_raw(slot[2]) : NULL;

		/* A sibling, perhaps: then there is more than one page to it. */
		if (xa_is_internal(after))
			break;
		if (!add(look, page + 1, 1, folio_pfn(next), 0))
			break;
		offset++;
		slot++;
		page++;
		next = after;
	}
	xas->xa_offset = offset;
	xas->xa_index = page;
}

/*
 * Fills sights with what lies in the pages from *next to last, and moves *next behind what it has
 * seen: behind last when there is nothing more.
 */
unsigned int pagefusion_look(struct address_space *mapping, unsigned long *next,
			     unsigned long last, struct pagefusion_sight *sights,
			     unsigned int most)
{
	const bool tagged = mapping_tagged(mapping, PAGECACHE_TAG_DIRTY) ||
			    mapping_tagged(mapping, PAGECACHE_TAG_WRITEBACK);
	struct look look = { .sights = sights, .most = most };
	XA_STATE(xas, &mapping->i_pages, *next);
	void *entry;

	*next = last + 1;
	rcu_read_lock();
	xas_for_each(&xas, entry, last) {
		unsigned int order;
		unsigned long page;
		bool unsettled;

		if (xas_retry(&xas, entry))
			continue;
		order = xas_get_order(&xas);
		page = round_down(xas.xa_index, 1UL << order);
		unsettled = tagged && (xas_get_mark(&xas, PAGECACHE_TAG_DIRTY) ||
				       xas_get_mark(&xas, PAGECACHE_TAG_WRITEBACK));
		/* A value tells that a page was here, and is not. */
		if (xa_is_value(entry) ?
			    look.entries++ == MOST_ENTRIES :
			    !add(&look, page, 1UL << order, folio_pfn(entry), unsettled)) {
			*next = page;
			break;
		}
		if (order)
			xas_advance(&xas, page + (1UL << order) - 1);
		else if (xas.xa_node && !xas.xa_node->shift && !tagged)
			add_singles(&look, &xas, last);
	}
	rcu_read_unlock();
	return look.seen;
}
