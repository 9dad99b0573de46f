//! Page cache made to measure: in large folios, or in single pages that are contiguous with nothing.
#![expect(
    unsafe_code,
    reason = "mmap, madvise and a plain store into that memory"
)]

use std::{
    fs::{File, OpenOptions},
    os::{fd::AsRawFd, unix::fs::FileExt},
    ptr,
    ptr::NonNull,
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::held::Held;
use crate::protocol::FolioCount;

const PAGE: usize = 4096;
/// From `linux/kernel-page-flags.h`.
const COMPOUND_TAIL: u64 = 1 << 16;

/// Files that are read at the same time.
const TOGETHER: usize = 8;

/// Reads files into the page cache, several at a time.
pub(super) fn fill_all(paths: &[String], singly: bool) -> Result<()> {
    for paths in paths.chunks(TOGETHER) {
        thread::scope(|scope| {
            let readers: Vec<_> = paths
                .iter()
                .map(|path| scope.spawn(move || fill(path, singly)))
                .collect();
            readers.into_iter().try_for_each(|reader| {
                let ended = reader.join();
                ended.unwrap_or_else(|_| bail!("a reader panicked"))
            })
        })?;
    }
    Ok(())
}

/// Reads a whole file into the page cache: as a program that reads from start to end would, which gives large folios
/// where the file system has them, or by `readahead`, which gives single pages.
fn fill(path: &str, singly: bool) -> Result<()> {
    let file = File::open(path).with_context(|| format!("open {path}"))?;
    let length = file.metadata()?.len();
    let sink = OpenOptions::new()
        .write(true)
        .open("/dev/null")
        .context("open /dev/null")?;
    let mut done = 0;
    while done < length {
        let chunk = (length - done).min(1 << 20) as usize;
        if singly {
            // SAFETY: a plain system call on an open file.
            let result = unsafe { libc::readahead(file.as_raw_fd(), done as libc::off64_t, chunk) };
            ensure!(
                result == 0,
                "readahead {path}: {}",
                std::io::Error::last_os_error()
            );
            done += chunk as u64;
        } else {
            let mut offset = done;
            let sent = rustix::fs::sendfile(&sink, &file, Some(&mut offset), chunk)
                .with_context(|| format!("read {path}"))?;
            ensure!(sent > 0, "{path} ended early");
            done = offset;
        }
    }
    Ok(())
}

/// How many folios hold a file that is in the page cache.
pub(super) fn folios(path: &str) -> Result<FolioCount> {
    let mut count = FolioCount::default();
    let mut last = None;
    each_frame(path, |frame, is_tail| {
        count.pages += 1;
        count.folios += u64::from(!is_tail);
        count.runs += u64::from(last != Some(frame - 1));
        last = Some(frame);
    })?;
    Ok(count)
}

/// Which of its pages lie in one folio with the page before.
pub(super) fn tails(path: &str) -> Result<Vec<bool>> {
    let mut tails = Vec::new();
    each_frame(path, |_, is_tail| tails.push(is_tail))?;
    Ok(tails)
}

/// Calls `found` with the frame of each page of a cached file, and whether it begins no folio.
fn each_frame(path: &str, mut found: impl FnMut(u64, bool)) -> Result<()> {
    let frames = Held::map(path)?.touched_frames()?;
    let flags = File::open("/proc/kpageflags").context("open /proc/kpageflags")?;
    for frame in frames {
        ensure!(frame != 0, "a page of {path} is not there");
        let mut entry = [0; 8];
        flags
            .read_exact_at(&mut entry, frame * 8)
            .context("read /proc/kpageflags")?;
        found(frame, u64::from_le_bytes(entry) & COMPOUND_TAIL != 0);
    }
    Ok(())
}

/// Anonymous memory with a hole in every other page. While it is held, what is allocated next finds single frames
/// without a neighbour.
#[derive(Debug)]
pub(super) struct Fragments {
    start: NonNull<u8>,
    length: usize,
}

impl Fragments {
    /// Leaves `bytes` of holes.
    pub(super) fn make(bytes: u64) -> Result<Self> {
        let length = usize::try_from(bytes)? * 2;
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .context("map memory")?;
        let fragments = Self {
            start: NonNull::new(start.cast()).context("mmap returned null")?,
            length,
        };
        let page = |index: usize| {
            // SAFETY: `index * PAGE` is below `length`.
            unsafe { fragments.start.as_ptr().add(index * PAGE) }
        };
        // SAFETY: advice on this mapping.
        unsafe { madvise(start, length, Advice::LinuxNoHugepage) }.context("forbid huge pages")?;
        for index in 0..length / PAGE {
            // SAFETY: inside the mapping, to which nothing else refers.
            unsafe { page(index).write(1) };
        }
        for index in (0..length / PAGE).step_by(2) {
            // SAFETY: discards one page of this mapping.
            unsafe { madvise(page(index).cast(), PAGE, Advice::LinuxDontNeed) }
                .context("free a page")?;
        }
        Ok(fragments)
    }
}

impl Drop for Fragments {
    fn drop(&mut self) {
        // SAFETY: `make` made exactly this mapping, and nothing points into it any more.
        let result = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
        debug_assert!(result.is_ok());
    }
}
