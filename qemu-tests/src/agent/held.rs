//! A file kept mapped read-only.
#![expect(unsafe_code, reason = "mmap, and reading what it maps")]

use std::{fs::File, ptr, ptr::NonNull};

use anyhow::{Context, Result, ensure};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use sha2::{Digest, Sha256};

use crate::{frames, pattern};

/// A read-only private mapping of a file or a part of it.
#[derive(Debug)]
pub(super) struct Held {
    start: NonNull<u8>,
    length: usize,
}

impl Held {
    /// Maps `path` and touches every page of it.
    pub(super) fn map(path: &str) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("open {path}"))?;
        let length = file.metadata()?.len();
        Self::of(&file, 0, length).with_context(|| format!("map {path}"))
    }

    /// Maps a part of `file` that begins with a page, and touches every page of it.
    pub(super) fn of(file: &File, offset: u64, length: u64) -> Result<Self> {
        let length = usize::try_from(length)?;
        if length == 0 {
            return Ok(Self {
                start: NonNull::dangling(),
                length,
            });
        }
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                length,
                ProtFlags::READ,
                MapFlags::PRIVATE | MapFlags::POPULATE,
                file,
                offset,
            )
        }?;
        Ok(Self {
            start: NonNull::new(start.cast()).context("mmap returned null")?,
            length,
        })
    }

    /// The machine's frame behind every page of a part of `file` that is in the page cache; 0 behind the others, none
    /// of which is read.
    pub(super) fn cached_frames(file: &File, offset: u64, length: u64) -> Result<Vec<u64>> {
        let length = usize::try_from(length)?;
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                length,
                ProtFlags::READ,
                MapFlags::PRIVATE,
                file,
                offset,
            )
        }?;
        let held = Self {
            start: NonNull::new(start.cast()).context("mmap returned null")?,
            length,
        };
        let mut cached = vec![0_u8; length.div_ceil(4096)];
        // SAFETY: the kernel writes a byte for each page of this mapping, and so many there are.
        let result = unsafe { libc::mincore(start, length, cached.as_mut_ptr()) };
        ensure!(result == 0, "mincore: {}", std::io::Error::last_os_error());
        for (page, _) in cached
            .iter()
            .enumerate()
            .filter(|(_, cached)| **cached & 1 != 0)
        {
            // SAFETY: inside the mapping.
            let byte = unsafe { held.start.as_ptr().add(page * 4096) };
            // SAFETY: as above; the page is in the file, or it would not be in its cache.
            unsafe { byte.read_volatile() };
        }
        let mut frames = held.mapped_frames()?;
        for (frame, _) in frames
            .iter_mut()
            .zip(&cached)
            .filter(|(_, cached)| **cached & 1 == 0)
        {
            *frame = 0;
        }
        Ok(frames)
    }

    /// The machine's frame behind every page, each touched just now.
    pub(super) fn frames(&self) -> Result<Vec<u64>> {
        // Reading it all makes sure that every page is there.
        self.sha256();
        self.mapped_frames()
    }

    /// The same without a look at all of their bytes.
    pub(super) fn touched_frames(&self) -> Result<Vec<u64>> {
        for offset in (0..self.length).step_by(4096) {
            // SAFETY: `offset` is inside the mapping, which lives as long as `self`.
            let byte = unsafe { self.start.as_ptr().add(offset) };
            // SAFETY: as above; the byte itself does not matter.
            unsafe { byte.read_volatile() };
        }
        self.mapped_frames()
    }

    fn mapped_frames(&self) -> Result<Vec<u64>> {
        let start = self.start.as_ptr().addr() as u64;
        frames::of_range(std::process::id(), start, self.length.div_ceil(4096))
    }

    /// SHA-256 of what the mapping shows now.
    pub(super) fn sha256(&self) -> String {
        let mut hasher = Sha256::new();
        let mut page = [0_u8; 4096];
        for offset in (0..self.length).step_by(page.len()) {
            let length = page.len().min(self.length - offset);
            // SAFETY: `offset` is inside the mapping, which lives as long as `self`.
            let from = unsafe { self.start.as_ptr().add(offset) };
            // SAFETY: `offset + length` is inside the mapping. No reference to it is made: the file may be
            // rewritten at any time, and a torn page only fails the comparison.
            unsafe { ptr::copy_nonoverlapping(from, page.as_mut_ptr(), length) };
            hasher.update(&page[..length]);
        }
        pattern::hex(&hasher.finalize())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: `map` made exactly this mapping, and nothing points into it any more.
            let result = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
            debug_assert!(result.is_ok());
        }
    }
}
