// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The device's shared memory as words that both sides may write at any time.

#![expect(unsafe_code, reason = "maps shared memory and views it as atomics")]

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use pagefusion_abi::wire::{Layout, LayoutError};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Words that the other side may read and write at any time.
///
/// A slice of atomics is one, and so is whatever gives one out. Tests have others, which show
/// every order in which another processor may see what is written.
pub trait Words {
    /// How many there are.
    fn count(&self) -> usize;
    /// Reads one.
    fn load(&self, index: usize, order: Ordering) -> u64;
    /// Writes one.
    fn store(&self, index: usize, value: u64, order: Ordering);
    /// Orders everything before it with everything after it.
    fn full_barrier(&self);
}

impl<M: std::borrow::Borrow<[AtomicU64]>> Words for M {
    fn count(&self) -> usize {
        self.borrow().len()
    }

    fn load(&self, index: usize, order: Ordering) -> u64 {
        self.borrow()[index].load(order)
    }

    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.borrow()[index].store(value, order);
    }

    fn full_barrier(&self) {
        fence(Ordering::SeqCst);
    }
}

/// A mapping of the whole shared memory. The guest is expected to write to it in ways that
/// make no sense, at any time; every word is read once and then checked by the reader.
#[derive(Debug)]
pub struct SharedMemory {
    words: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the mapping belongs to this value alone and is only reached through atomics, which
// any thread may use.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps `fd`, which must be sealed against shrinking, so that no access can fault.
    pub fn map(fd: impl AsFd) -> std::io::Result<Self> {
        let bytes = rustix::fs::fstat(&fd)?.st_size as usize;
        let seals = rustix::fs::fcntl_get_seals(&fd)?;
        if bytes < 8 || !seals.contains(rustix::fs::SealFlags::SHRINK) {
            return Err(std::io::Error::other(
                "the device's shared memory is empty or not sealed against shrinking",
            ));
        }
        // SAFETY: a fresh mapping at an address the kernel chooses touches no other memory.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )?
        };
        let words = NonNull::new(base.cast::<AtomicU64>())
            .ok_or_else(|| std::io::Error::other("mapped at address zero"))?;
        Ok(Self {
            words,
            count: bytes / 8,
        })
    }

    /// All words, in the byte order of memory (little-endian).
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds `count` words, is page-aligned, zero-filled by the kernel
        // and lives until drop; the seal keeps it from shrinking. Other processes write to it,
        // which atomics allow.
        unsafe { slice::from_raw_parts(self.words.as_ptr(), self.count) }
    }

    /// Reads and checks the layout the header gives.
    pub fn layout(&self) -> Result<Layout, LayoutError> {
        let words = self.words();
        Layout::from_header(
            |offset| u64::from_le(words[offset / 8].load(Ordering::Relaxed)),
            self.count as u64 * 8,
        )
    }
}

impl std::borrow::Borrow<[AtomicU64]> for SharedMemory {
    fn borrow(&self) -> &[AtomicU64] {
        self.words()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: nothing borrows the mapping any more, and its size is `count` words rounded
        // down from the page-aligned size of the descriptor.
        let _ = unsafe { munmap(self.words.as_ptr().cast(), self.count * 8) };
    }
}
