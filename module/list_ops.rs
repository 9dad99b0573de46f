// SPDX-License-Identifier: GPL-2.0

// What both kinds of `List` can do. Included, not a module: it needs their private parts.

/// What the slab allocator really hands out for `bytes`.
const fn allocation_bytes(bytes: usize) -> usize {
    match bytes {
        0 => 0,
        1..=8 => 8,
        65..=96 => 96,
        129..=192 => 192,
        _ => bytes.next_power_of_two(),
    }
}

impl<T> List<T> {
    /// Bytes of memory behind this list, as the allocator counts them.
    pub(crate) fn bytes(&self) -> usize {
        allocation_bytes(self.items.capacity() * core::mem::size_of::<T>())
    }

    /// Makes room for `additional` more items.
    pub(crate) fn reserve(&mut self, additional: usize) -> Result<(), NoMemory> {
        let needed = self.items.len().checked_add(additional).ok_or(NoMemory)?;
        if needed <= self.items.capacity() {
            return Ok(());
        }
        let size = core::mem::size_of::<T>().max(1);
        let wanted = needed + self.items.len() / 4;
        // Small ones take all of the slab object they get; large ones are whole pages.
        let bytes = wanted.checked_mul(size).ok_or(NoMemory)?;
        let bytes = if bytes <= 4096 {
            allocation_bytes(bytes)
        } else {
            bytes.next_multiple_of(4096)
        };
        self.reallocate((bytes / size).max(needed))
    }

    /// Appends an item.
    pub(crate) fn push(&mut self, item: T) -> Result<(), NoMemory> {
        self.reserve(1)?;
        self.append(item)
    }

    /// Removes the items `from..to`.
    pub(crate) fn remove(&mut self, from: usize, to: usize) {
        let len = self.items.len();
        self.items[from..].rotate_left(to - from);
        self.items.truncate(len - (to - from));
    }

    /// Replaces the items `from..to` by those of `with`. On failure nothing has changed.
    pub(crate) fn replace(&mut self, from: usize, to: usize, mut with: Self) -> Result<(), NoMemory> {
        let (old, new) = (to - from, with.len());
        self.reserve(new.saturating_sub(old))?;
        let both = old.min(new);
        self.items[from..from + both].swap_with_slice(&mut with.items[..both]);
        if new > old {
            with.items[both..].reverse();
            for _ in both..new {
                if let Some(item) = with.pop() {
                    // Room was made above.
                    self.append(item)?;
                }
            }
            self.items[from + both..].rotate_right(new - both);
        } else {
            self.remove(from + both, to);
        }
        Ok(())
    }

    /// Removes and returns the last item.
    pub(crate) fn pop(&mut self) -> Option<T> {
        self.items.pop()
    }

    /// Removes all items and gives their memory back.
    pub(crate) fn clear(&mut self) {
        *self = Self::new();
    }

    /// Gives memory back when more than a quarter of it is not used.
    pub(crate) fn shrink(&mut self) {
        let needed = allocation_bytes(self.items.len() * core::mem::size_of::<T>());
        if needed < self.bytes() - self.bytes() / 4 {
            // Without memory for it the old stays.
            let _ = self.reallocate(self.items.len());
        }
    }

    /// Removes all items and keeps the memory for the next ones.
    pub(crate) fn truncate(&mut self) {
        self.items.truncate(0);
    }
}

impl<T: Copy> List<T> {
    /// Replaces the items `from..to` by `with`. On failure nothing has changed.
    pub(crate) fn splice(&mut self, from: usize, to: usize, with: &[T]) -> Result<(), NoMemory> {
        let (old, len) = (to - from, self.items.len());
        if with.len() > old {
            let more = with.len() - old;
            self.reserve(more)?;
            let filler = with[0];
            for _ in 0..more {
                self.append(filler)?;
            }
        }
        self.items.copy_within(to..len, from + with.len());
        self.items[from..from + with.len()].copy_from_slice(with);
        self.items.truncate(len - old + with.len());
        Ok(())
    }

    /// Makes the list `len` long, filling it with `value`.
    pub(crate) fn fill(&mut self, len: usize, value: T) -> Result<(), NoMemory> {
        let mut fresh = Self::new();
        fresh.reallocate(len)?;
        for _ in 0..len {
            fresh.append(value)?;
        }
        *self = fresh;
        Ok(())
    }
}

impl<T> core::ops::Deref for List<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.items
    }
}

impl<T> core::ops::DerefMut for List<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.items
    }
}
