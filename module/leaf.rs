// SPDX-License-Identifier: GPL-2.0

//! Entries packed into few bits: all of a leaf have fields of the same widths, just wide enough
//! for the largest of them.
//!
//! Single pages one after the other, wherever they lie in 1 TiB of memory, take 28 bits each.

use crate::list::{List, NoMemory};
use crate::ranges::Range;

/// Pages at or beyond this index are not reported (8 TiB into a file).
pub(crate) const MAX_PAGE: u64 = 1 << 31;
/// Frames at or beyond this number are not reported (16 TiB of guest memory).
pub(crate) const MAX_FRAME: u64 = 1 << 32;

/// Most pages of one entry.
pub(crate) const MAX_COUNT: u64 = 1 << COUNT_BITS;
const COUNT_BITS: u32 = 8;
/// Most pages between two entries of a leaf, in bits.
const GAP_BITS: u32 = 16;
/// Most words of a leaf: what one slab object of 512 bytes holds.
const MOST_WORDS: usize = 64;
const MOST_BITS: u32 = (MOST_WORDS as u32 - 1) * u64::BITS;
/// Most entries of a leaf.
pub(crate) const MOST_ENTRIES: usize = 1 << 9;
/// Widening all entries of a leaf must not cost more bits than a leaf of its own.
const LEAF_OVERHEAD: u32 = 8 * 64;

/// Pages that were reported at contiguous frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) page: u64,
    pub(crate) count: u64,
    pub(crate) frame: u64,
    /// The host refused them.
    pub(crate) refused: bool,
}

impl Entry {
    pub(crate) const fn end(&self) -> u64 {
        self.page.wrapping_add(self.count)
    }

    /// Where `page`, one of these, was reported.
    pub(crate) const fn frame_of(&self, page: u64) -> u64 {
        self.frame + (page - self.page)
    }

    /// How far frames are ahead of pages.
    pub(crate) const fn distance(&self) -> u64 {
        self.frame.wrapping_sub(self.page)
    }

    /// The part within `range`, which must overlap it.
    pub(crate) fn part(&self, range: Range) -> Self {
        let page = self.page.max(range.start);
        Self {
            page,
            count: self.end().min(range.end) - page,
            frame: self.frame_of(page),
            refused: self.refused,
        }
    }

    /// Both as one, when `next` continues this and there is room for all of it.
    pub(crate) fn join(&self, next: &Self) -> Option<Self> {
        let count = self.count + next.count;
        let follows = self.end() == next.page
            && self.frame + self.count == next.frame
            && self.refused == next.refused;
        (follows && count <= MAX_COUNT).then_some(Self { count, ..*self })
    }
}

/// Widths of the fields of an entry, from its lowest bit on.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Shape {
    gap: u8,
    count: u8,
    frame: u8,
    refused: u8,
}

impl Shape {
    const fn width(self) -> u32 {
        self.gap as u32 + self.count as u32 + self.frame as u32 + self.refused as u32
    }
}

/// Bits that `value` needs.
const fn bits(value: u64) -> u8 {
    (u64::BITS - value.leading_zeros()) as u8
}

const fn low(value: u64, width: u8) -> u64 {
    value & ((1 << width) - 1)
}

/// Words for so many bits, and one more, so that any entry can be read as two.
const fn words(bits: u32) -> usize {
    (if bits == 0 { 1 } else { bits.div_ceil(64) }) as usize + 1
}

/// The bits of `words` from `bit` on, if there is a further word.
#[inline(always)]
fn load(words: &[u64], bit: u32) -> Option<u64> {
    let (word, shift) = ((bit / 64) as usize, bit % 64);
    let &[first, second] = words.get(word..word + 2)? else {
        return None;
    };
    // In two steps, as a shift by 64 does nothing.
    Some(first >> shift | second << 1 << (63 - shift))
}

/// Up to [`MOST_ENTRIES`] entries in ascending order, at least one.
pub(crate) struct Leaf {
    words: List<u64>,
    first: u32,
    end: u32,
    /// What the frames have in common.
    base: u32,
    len: u16,
    shape: Shape,
}

/// A place in a leaf, with what it takes to read the entry there.
#[derive(Clone, Copy, Default)]
pub(crate) struct Spot {
    bit: u32,
    /// End of the entry before.
    after: u64,
    fields: Fields,
}

/// Where the fields of an entry are.
#[derive(Clone, Copy, Default)]
struct Fields {
    width: u32,
    gap_mask: u64,
    count_shift: u32,
    count_mask: u64,
    frame_shift: u32,
    frame_mask: u64,
    refused_shift: u32,
    refused_mask: u64,
    base: u64,
}

impl Leaf {
    /// First page.
    pub(crate) const fn first(&self) -> u64 {
        self.first as u64
    }

    /// Behind the last page.
    pub(crate) const fn end(&self) -> u64 {
        self.end as u64
    }

    /// Number of entries.
    pub(crate) const fn len(&self) -> usize {
        self.len as usize
    }

    /// Bits in use, of those in [`Leaf::bytes`].
    pub(crate) const fn used_bits(&self) -> usize {
        self.len as usize * self.shape.width() as usize
    }

    /// Bytes of memory behind this leaf.
    pub(crate) fn bytes(&self) -> usize {
        self.words.bytes()
    }

    /// Where the first entry is.
    pub(crate) fn start(&self) -> Spot {
        Spot {
            bit: 0,
            after: self.first(),
            fields: self.fields(),
        }
    }

    fn fields(&self) -> Fields {
        let Shape {
            gap,
            count,
            frame,
            refused,
        } = self.shape;
        Fields {
            width: self.shape.width(),
            gap_mask: low(u64::MAX, gap),
            count_shift: u32::from(gap),
            count_mask: low(u64::MAX, count),
            frame_shift: u32::from(gap + count),
            frame_mask: low(u64::MAX, frame),
            refused_shift: u32::from(gap + count + frame),
            refused_mask: low(u64::MAX, refused),
            base: u64::from(self.base),
        }
    }

    /// The bits from `bit` on; those beyond the entry there are of no meaning.
    #[inline(always)]
    fn load(&self, bit: u32) -> Option<u64> {
        load(&self.words, bit)
    }

    fn store(&mut self, bit: u32, value: u64) {
        let width = self.shape.width();
        let (word, shift) = ((bit / 64) as usize, bit % 64);
        let mask = (1_u64 << width) - 1;
        if let Some(low) = self.words.get_mut(word) {
            *low = *low & !(mask << shift) | value << shift;
        }
        if shift + width > 64 {
            if let Some(high) = self.words.get_mut(word + 1) {
                *high = *high & !(mask >> (64 - shift)) | value >> (64 - shift);
            }
        }
    }

    /// The entry at `spot`, if the leaf goes as far.
    #[inline(always)]
    pub(crate) fn get(&self, spot: &Spot) -> Option<Entry> {
        // Every page is in one entry, and what follows the last has none.
        if spot.after >= self.end() {
            return None;
        }
        let value = self.load(spot.bit)?;
        let fields = &spot.fields;
        // Nothing overflows here; the widths are those that were written.
        let field = |shift: u32, mask: u64| value.wrapping_shr(shift) & mask;
        Some(Entry {
            page: spot.after.wrapping_add(value & fields.gap_mask),
            count: field(fields.count_shift, fields.count_mask).wrapping_add(1),
            frame: field(fields.frame_shift, fields.frame_mask).wrapping_add(fields.base),
            refused: field(fields.refused_shift, fields.refused_mask) != 0,
        })
    }

    /// Goes through entries, from `spot` on, and `things`, side by side, for as long as one is like
    /// the other, and takes out what it has passed by. Returns how many pages that was.
    #[inline(always)]
    pub(crate) fn pass_alike<T>(
        &self,
        spot: &mut Spot,
        things: &mut &[T],
        are_alike: &impl Fn(&T, &Entry) -> bool,
    ) -> u64 {
        let (all, begin) = (*things, *spot);
        if !self.is_plain() {
            let mut pages = 0_u64;
            while let ([thing, rest @ ..], Some(entry)) = (*things, self.get(spot)) {
                if !are_alike(thing, &entry) {
                    break;
                }
                *things = rest;
                spot.pass(&entry);
                pages = pages.wrapping_add(entry.count);
            }
            return pages;
        }
        // The same, of single pages, with all that stays the same in a register.
        let left = self.end().saturating_sub(begin.after) as usize;
        let compared = all.get(..left).unwrap_or(all);
        let (words, fields) = (&self.words[..], &begin.fields);
        let (mut bit, mut page) = (begin.bit, begin.after);
        for thing in compared {
            let Some(value) = load(words, bit) else {
                break;
            };
            let entry = Entry {
                page,
                count: 1,
                frame: (value & fields.frame_mask).wrapping_add(fields.base),
                refused: false,
            };
            if !are_alike(thing, &entry) {
                break;
            }
            bit = bit.wrapping_add(fields.width);
            page = page.wrapping_add(1);
        }
        (spot.bit, spot.after) = (bit, page);
        let passed = page.wrapping_sub(begin.after);
        *things = all.get(passed as usize..).unwrap_or_default();
        passed
    }

    /// Whether there are but single pages, each behind the other, of which none was refused: where
    /// memory is in pieces most leaves are like that, and can be gone through with less work.
    const fn is_plain(&self) -> bool {
        self.shape.gap == 0 && self.shape.count == 0 && self.shape.refused == 0
    }

    /// All entries.
    pub(crate) fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        let mut spot = self.start();
        core::iter::from_fn(move || {
            let entry = self.get(&spot)?;
            spot.pass(&entry);
            Some(entry)
        })
    }

    /// Where the last entry begins.
    fn last_bit(&self) -> Option<u32> {
        let before = u32::from(self.len).checked_sub(1)?;
        Some(before * self.shape.width())
    }

    /// The last entry.
    fn last(&self) -> Option<Entry> {
        // Its gap, which depends on the entry before, does not matter.
        let entry = self.get(&Spot {
            bit: self.last_bit()?,
            after: 0,
            fields: self.fields(),
        })?;
        let page = self.end() - entry.count;
        Some(Entry { page, ..entry })
    }

    /// The bits of `entry` behind an entry that ends at `after`, if the widths allow it.
    fn pack(&self, after: u64, entry: &Entry) -> Option<u64> {
        let Shape {
            gap,
            count,
            frame,
            refused,
        } = self.shape;
        let fields = [
            (entry.page - after, gap),
            (entry.count - 1, count),
            (entry.frame ^ u64::from(self.base), frame),
            (u64::from(entry.refused), refused),
        ];
        let (mut value, mut shift) = (0, 0);
        for (field, width) in fields {
            if bits(field) > width {
                return None;
            }
            value |= field << shift;
            shift += width;
        }
        Some(value)
    }

    /// Appends an entry behind all others, or joins it with the last. False when that takes
    /// wider fields or another leaf.
    pub(crate) fn push(&mut self, entry: &Entry) -> Result<bool, NoMemory> {
        let Some(last) = self.last() else {
            return Ok(false);
        };
        if let Some(joined) = last.join(entry) {
            if bits(joined.count - 1) > self.shape.count {
                return Ok(false);
            }
            let Some((bit, value)) = self.last_bit().and_then(|bit| Some((bit, self.load(bit)?)))
            else {
                return Ok(false);
            };
            let more = (joined.count - last.count) << self.shape.gap;
            let value = value.wrapping_add(more);
            self.store(bit, low(value, self.shape.width() as u8));
            self.end = joined.end() as u32;
            return Ok(true);
        }
        let width = self.shape.width();
        let needed = (u32::from(self.len) + 1) * width;
        if self.len() == MOST_ENTRIES || needed > MOST_BITS {
            return Ok(false);
        }
        let Some(value) = self.pack(self.end(), entry) else {
            return Ok(false);
        };
        while self.words.len() < words(needed) {
            self.words.push(0)?;
        }
        self.store(u32::from(self.len) * width, value);
        self.len += 1;
        self.end = entry.end() as u32;
        Ok(true)
    }

    /// Marks the entry at `spot`. False when the leaf has no room for marks.
    pub(crate) fn refuse(&mut self, spot: &Spot) -> bool {
        let Shape {
            gap,
            count,
            frame,
            refused,
        } = self.shape;
        if refused == 0 {
            return false;
        }
        let Some(value) = self.load(spot.bit) else {
            return false;
        };
        let value = value | 1 << (gap + count + frame);
        self.store(spot.bit, low(value, self.shape.width() as u8));
        true
    }

    /// A leaf of as many of `entries`, at most `most`, as it can hold, and how many these are:
    /// at least one, of which there must be one.
    pub(crate) fn encode(entries: &[Entry], most: usize) -> Result<(Self, usize), NoMemory> {
        let mut plan = Plan::default();
        let most = most.clamp(1, MOST_ENTRIES);
        let mut taken = 0;
        for entry in &entries[..most.min(entries.len())] {
            if !plan.add(entry) {
                break;
            }
            taken += 1;
        }
        let entries = &entries[..taken];
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
            return Err(NoMemory);
        };
        let width = plan.shape.width();
        let mut leaf = Self {
            words: List::new(),
            first: first.page as u32,
            end: last.end() as u32,
            base: (plan.low & !low(u64::MAX, plan.shape.frame)) as u32,
            len: taken as u16,
            shape: plan.shape,
        };
        leaf.words.fill(words(taken as u32 * width), 0)?;
        let (mut after, mut bit) = (first.page, 0);
        for entry in entries {
            // The shape was made for it.
            let value = leaf.pack(after, entry).unwrap_or_default();
            leaf.store(bit, value);
            bit += width;
            after = entry.end();
        }
        Ok((leaf, taken))
    }
}

impl Spot {
    /// No entry before this one in the leaf ends after that.
    pub(crate) const fn after(&self) -> u64 {
        self.after
    }

    /// Moves behind `entry`, which must be the one here.
    #[inline(always)]
    pub(crate) fn pass(&mut self, entry: &Entry) {
        self.bit = self.bit.wrapping_add(self.fields.width);
        self.after = entry.end();
    }
}

/// What a leaf must be like for the entries it is to hold.
#[derive(Default)]
struct Plan {
    shape: Shape,
    len: u32,
    after: u64,
    low: u64,
    high: u64,
}

impl Plan {
    /// Whether one more entry belongs into the same leaf; if so, it is taken into account.
    fn add(&mut self, entry: &Entry) -> bool {
        let gap = if self.len == 0 {
            0
        } else {
            entry.page - self.after
        };
        let low = if self.len == 0 {
            entry.frame
        } else {
            self.low.min(entry.frame)
        };
        let high = self.high.max(entry.frame);
        let shape = Shape {
            gap: self.shape.gap.max(bits(gap)),
            count: self.shape.count.max(bits(entry.count - 1)),
            // The bits in which some differ; the others are the base.
            frame: bits(high ^ low),
            refused: self.shape.refused.max(u8::from(entry.refused)),
        };
        let widened = (shape.width() - self.shape.width()) * self.len;
        if self.len != 0
            && (gap >= 1 << GAP_BITS
                || (self.len + 1) * shape.width() > MOST_BITS
                || widened > LEAF_OVERHEAD)
        {
            return false;
        }
        *self = Self {
            shape,
            len: self.len + 1,
            after: entry.end(),
            low,
            high,
        };
        true
    }
}
