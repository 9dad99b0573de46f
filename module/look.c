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

static __always_inline u64 extent(unsigned long page, unsigned long pages)
{
	return page | (u64)pages << PAGEFUSION_SIGHT_PAGES_SHIFT;
}

/* Adds pages that were seen; false when there is no room for them. */
static __always_inline bool add(struct look *look, unsigned long page, unsigned long pages,
				unsigned long pfn, bool unsettled)
{
	struct pagefusion_sight *sight = look->sights + look->seen;
	const u64 mark = unsettled ? PAGEFUSION_SIGHT_UNSETTLED : 0;

	if (look->entries == MOST_ENTRIES)
		return false;
	if (look->seen) {
		const u64 before = (sight[-1].extent & ~PAGEFUSION_SIGHT_UNSETTLED) >>
				   PAGEFUSION_SIGHT_PAGES_SHIFT;

		if (page == (u32)sight[-1].extent + before && pfn == sight[-1].pfn + before &&
		    mark == (sight[-1].extent & PAGEFUSION_SIGHT_UNSETTLED)) {
			sight[-1].extent += extent(0, pages);
			look->entries++;
			return true;
		}
	}
	if (look->seen == look->most)
		return false;
	*sight = (struct pagefusion_sight){ pfn, extent(page, pages) | mark };
	look->seen++;
	look->entries++;
	return true;
}

/*
 * Goes on through single pages in the node of the array that has the entry at hand, a single page
 * as well, as far as there is nothing but such pages. What xas_for_each() would do, in a quarter
 * of the time.
 */
static __always_inline void add_singles(struct look *look, struct xa_state *xas,
					unsigned long last)
{
	void __rcu *const *slots = xas->xa_node->slots;
	struct pagefusion_sight *sight = look->sights + look->seen - 1;
	const unsigned int first = xas->xa_offset + 1;
	const unsigned long room = min3((unsigned long)(look->most - look->seen),
					(unsigned long)(MOST_ENTRIES - look->entries),
					last - xas->xa_index);
	const unsigned int end = min_t(unsigned long, XA_CHUNK_SIZE, first + room);
	u64 single = extent(xas->xa_index, 1);
	unsigned long follows = sight->pfn + (sight->extent >> PAGEFUSION_SIGHT_PAGES_SHIFT);
	unsigned int offset;

	for (offset = first; offset < end; offset++) {
		void *entry = rcu_dereference_raw(slots[offset]);
		unsigned long pfn;

		/* Nothing, a value, or what belongs to the array. */
		if (!entry || (unsigned long)entry & 3)
			break;
		pfn = folio_pfn(entry);
		single++;
		if (pfn == follows)
			sight->extent += extent(0, 1);
		else
			*++sight = (struct pagefusion_sight){ pfn, single };
		follows = pfn + 1;
	}
	/* If a sibling comes, there is more than one page to the entry before, which is met again. */
	if (offset > first && offset < XA_CHUNK_SIZE &&
	    xa_is_sibling(rcu_dereference_raw(slots[offset]))) {
		offset--;
		if (sight->extent == single)
			sight--;
		else
			sight->extent -= extent(0, 1);
	}
	look->seen = sight - look->sights + 1;
	look->entries += offset - first;
	xas->xa_index += offset - first;
	xas->xa_offset = offset - 1;
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
		else if (!xa_is_value(entry) && xas.xa_node && !xas.xa_node->shift && !tagged)
			add_singles(&look, &xas, last);
	}
	rcu_read_unlock();
	return look.seen;
}
