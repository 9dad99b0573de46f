// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which leaves of sightings a file of a VM has, in the order of the file.
//!
//! Most files have one, which then takes a reference and nothing else. Others have a list.

use super::files::FileId;
use super::references::References;
use hashbrown::DefaultHashBuilder;
use std::collections::BTreeMap;
use std::hash::BuildHasher;
use std::ops::RangeBounds;

/// Marks a reference to a list and not to a leaf.
const LIST: u32 = 1 << 31;

/// A VM and a file.
pub(super) type Owner = (u32, FileId);

/// A leaf, and the first page that it may have. It may have those up to the next leaf's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) first: u64,
    pub(super) leaf: u32,
}

/// Leaves by the first page that each may have. A guest can have a leaf for each page that it
/// reports, all of one file: nothing may look at all of them for one.
type List = BTreeMap<u64, u32>;

/// All leaves of a file in one VM, in order.
#[derive(Clone, Copy)]
pub(super) enum Parts<'a> {
    None,
    One(Part),
    Many(&'a List),
}

impl<'a> Parts<'a> {
    pub(super) fn is_empty(self) -> bool {
        matches!(self, Parts::None)
    }

    /// Those whose first page is in `pages`, which does not end before it begins.
    pub(super) fn range(
        self,
        pages: impl RangeBounds<u64> + 'a,
    ) -> impl DoubleEndedIterator<Item = Part> + 'a {
        let (one, many) = match self {
            Parts::None => (None, None),
            Parts::One(part) => (Some(part).filter(|it| pages.contains(&it.first)), None),
            Parts::Many(list) => (None, Some(list.range(pages))),
        };
        let part = |(&first, &leaf)| Part { first, leaf };
        one.into_iter().chain(many.into_iter().flatten().map(part))
    }
}

/// What is to be known of a leaf.
pub(super) trait Leaves {
    /// Whose it is.
    fn owner(&self, leaf: u32) -> Owner;
    /// The first page that it may have when it is the file's only one.
    fn first(&self, leaf: u32) -> u64;
}

/// The leaves of all files.
#[derive(Debug, Default)]
pub(super) struct Places {
    heads: References,
    lists: Vec<List>,
    free: Vec<u32>,
    hasher: DefaultHashBuilder,
}

impl Places {
    pub(super) fn parts(&self, leaves: &impl Leaves, owner: Owner) -> Parts<'_> {
        match self.head(leaves, owner) {
            None => Parts::None,
            Some(head) if head & LIST != 0 => Parts::Many(&self.lists[(head & !LIST) as usize]),
            Some(leaf) => Parts::One(Part {
                first: leaves.first(leaf),
                leaf,
            }),
        }
    }

    /// Adds a leaf, `first` that no other of the file has.
    pub(super) fn insert(&mut self, leaves: &impl Leaves, owner: Owner, part: Part) {
        match self.head(leaves, owner) {
            None => self.set_head(leaves, owner, part.leaf),
            Some(head) if head & LIST != 0 => {
                let list = &mut self.lists[(head & !LIST) as usize];
                list.insert(part.first, part.leaf);
            }
            Some(leaf) => {
                let first = leaves.first(leaf);
                let list = List::from([(first, leaf), (part.first, part.leaf)]);
                self.heads.remove(self.hash(owner), leaf);
                let index = match self.free.pop() {
                    Some(index) => {
                        self.lists[index as usize] = list;
                        index
                    }
                    None => {
                        self.lists.push(list);
                        (self.lists.len() - 1) as u32
                    }
                };
                self.set_head(leaves, owner, index | LIST);
            }
        }
    }

    /// Removes a leaf that is there. `leaves` knows it still.
    pub(super) fn remove(&mut self, leaves: &impl Leaves, owner: Owner, part: Part) {
        let Some(head) = self.head(leaves, owner) else {
            return;
        };
        if head & LIST == 0 {
            self.heads.remove(self.hash(owner), head);
            return;
        }
        let list = &mut self.lists[(head & !LIST) as usize];
        list.remove(&part.first);
        if list.len() > 1 {
            return;
        }
        let last = std::mem::take(list).into_values().next();
        self.free.push(head & !LIST);
        self.heads.remove(self.hash(owner), head);
        if let Some(last) = last {
            self.set_head(leaves, owner, last);
        }
    }

    /// Removes all leaves of a file in a VM, if it has any. `leaves` knows them still.
    pub(super) fn remove_all(&mut self, leaves: &impl Leaves, owner: Owner) {
        let Some(head) = self.head(leaves, owner) else {
            return;
        };
        self.heads.remove(self.hash(owner), head);
        if head & LIST != 0 {
            self.lists[(head & !LIST) as usize].clear();
            self.free.push(head & !LIST);
        }
    }

    /// Memory taken, bytes, without what the allocator adds.
    pub(super) fn bytes(&self) -> usize {
        self.heads.bytes()
            + self.lists.iter().map(list_bytes).sum::<usize>()
            + self.lists.capacity() * size_of::<List>()
            + self.free.capacity() * size_of::<u32>()
    }

    fn hash(&self, owner: Owner) -> u64 {
        self.hasher.hash_one(owner)
    }

    fn head(&self, leaves: &impl Leaves, owner: Owner) -> Option<u32> {
        let is_it = |head| owner_of(&self.lists, leaves, head) == owner;
        self.heads.find(self.hash(owner), is_it)
    }

    fn set_head(&mut self, leaves: &impl Leaves, owner: Owner, head: u32) {
        let Self {
            heads,
            lists,
            hasher,
            ..
        } = self;
        let hash_of = |head| hasher.hash_one(owner_of(lists, leaves, head));
        heads.insert(hasher.hash_one(owner), head, hash_of);
    }
}

/// The owner of what a head stands for, which is not empty.
fn owner_of(lists: &[List], leaves: &impl Leaves, head: u32) -> Owner {
    let leaf = match head & LIST {
        0 => head,
        _ => {
            let mut list = lists[(head & !LIST) as usize].values();
            *list.next().expect("a list has two leaves at least")
        }
    };
    leaves.owner(leaf)
}

/// Estimate of what a list takes. A node has room for eleven leaves; where files are read from
/// their beginning on, six of them are used, with one more in the node above.
fn list_bytes(list: &List) -> usize {
    /// Eleven leaves, and what joins them to others.
    const NODE: usize = 11 * (size_of::<u64>() + size_of::<u32>()) + 12;
    match list.len() {
        0 => 0,
        1..=11 => NODE,
        leaves => leaves.div_ceil(7) * (NODE + NODE / 4),
    }
}
