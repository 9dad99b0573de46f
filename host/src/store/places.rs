// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which leaves of sightings a file of a VM has, in the order of the file.
//!
//! Most files have one, which then takes a reference and nothing else. Others have a list.

use super::files::FileId;
use super::references::References;
use hashbrown::DefaultHashBuilder;
use std::hash::BuildHasher;
use std::ops::Deref;

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

/// All leaves of a file in one VM, in order.
pub(super) enum Parts<'a> {
    None,
    One(Part),
    Many(&'a [Part]),
}

impl Deref for Parts<'_> {
    type Target = [Part];

    fn deref(&self) -> &[Part] {
        match self {
            Parts::None => &[],
            Parts::One(part) => std::slice::from_ref(part),
            Parts::Many(parts) => parts,
        }
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
    lists: Vec<Vec<Part>>,
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
                let at = list.partition_point(|it| it.first < part.first);
                if list.len() == list.capacity() {
                    list.reserve_exact((list.len() / 8).max(2));
                }
                list.insert(at, part);
            }
            Some(leaf) => {
                let first = leaves.first(leaf);
                let mut list = vec![Part { first, leaf }, part];
                list.sort_unstable_by_key(|it| it.first);
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
    pub(super) fn remove(&mut self, leaves: &impl Leaves, owner: Owner, leaf: u32) {
        let Some(head) = self.head(leaves, owner) else {
            return;
        };
        if head & LIST == 0 {
            self.heads.remove(self.hash(owner), head);
            return;
        }
        let list = &mut self.lists[(head & !LIST) as usize];
        list.retain(|it| it.leaf != leaf);
        if let [last] = list[..] {
            *list = Vec::new();
            self.free.push(head & !LIST);
            self.heads.remove(self.hash(owner), head);
            self.set_head(leaves, owner, last.leaf);
        }
    }

    /// Memory taken, bytes, without what the allocator adds.
    pub(super) fn bytes(&self) -> usize {
        let lists = self.lists.iter().map(Vec::capacity);
        self.heads.bytes()
            + lists.sum::<usize>() * size_of::<Part>()
            + self.lists.capacity() * size_of::<Vec<Part>>()
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

fn owner_of(lists: &[Vec<Part>], leaves: &impl Leaves, head: u32) -> Owner {
    let leaf = match head & LIST {
        0 => head,
        _ => lists[(head & !LIST) as usize][0].leaf,
    };
    leaves.owner(leaf)
}
