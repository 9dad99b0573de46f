//! What could be shared at most, and what is: by the bytes and the host's frames of all guest memory, looked at from
//! outside.

use std::{fs::File, os::unix::fs::FileExt};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use crate::{
    frames,
    guest::Guest,
    protocol::{FrameKind, Op},
};

/// Pages read at a time.
const CHUNK: usize = 512;
/// From `linux/kernel-page-flags.h`.
const ZERO_PAGE: u64 = 1 << 24;

/// One class of guest memory. Frames that the host has given no memory count nowhere.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Class {
    /// Frames.
    pub frames: u64,
    /// Of these, how many would not be needed if each content were there once.
    pub shareable: u64,
    /// Of these, those whose like is in the same guest.
    pub within: u64,
    /// Frames of zeros alone.
    pub zero: u64,
    /// How many frames of the host are not needed, because several of these are one.
    pub shared: u64,
}

impl Class {
    /// What is shared, as a fraction of what could be.
    pub fn share(&self) -> f64 {
        self.shared as f64 / self.shareable as f64
    }
}

/// All guest memory.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Oracle {
    /// All of it.
    pub all: Class,
    /// Page cache in the range of read-only mappings.
    pub mapped: Class,
    /// All clean page cache, that included.
    pub clean: Class,
    /// Memory of processes.
    pub anonymous: Class,
    /// The rest: the kernel and its text, page cache that is dirty or of no disk, and what is free; older results do not
    /// have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other: Option<Class>,
}

/// One frame.
#[derive(Clone, Copy, Debug)]
struct Frame {
    content: u128,
    host: u64,
    guest: usize,
    kind: FrameKind,
}

/// What the guests' frames hold, as their own kernels tell.
pub(super) fn census(guests: &mut [Guest]) -> Result<Vec<Vec<FrameKind>>> {
    let mut all = Vec::new();
    for guest in guests {
        let runs: Vec<(u64, FrameKind)> = guest.request(Op::Census)?;
        let kinds = runs
            .into_iter()
            .flat_map(|(count, kind)| std::iter::repeat_n(kind, count as usize));
        all.push(kinds.collect());
    }
    Ok(all)
}

/// Looks at the memory of guests that stand still.
pub(super) fn look(guests: &mut [Guest], mib: u32, census: &[Vec<FrameKind>]) -> Result<Oracle> {
    let mut all = Vec::new();
    for (index, (guest, kinds)) in guests.iter_mut().zip(census).enumerate() {
        for (first, address, pages) in guest.memory(mib)? {
            let before = all.len();
            read(guest.pid(), address, pages, |page, content, host| {
                let kind = kinds.get((first + page) as usize);
                all.push(Frame {
                    content,
                    host,
                    guest: index,
                    kind: kind.copied().unwrap_or(FrameKind::Other),
                });
            })
            .with_context(|| format!("read the memory of {}", guest.name()))?;
            ensure!(
                all.len() > before,
                "the memory of {} is not there",
                guest.name()
            );
        }
    }
    Ok(Oracle::of(&all))
}

/// Calls `take` with the number, the content and the host's frame of each page that has one.
fn read(pid: u32, address: u64, pages: u64, mut take: impl FnMut(u64, u128, u64)) -> Result<()> {
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let flags = File::open("/proc/kpageflags").context("open the host's page flags")?;
    let mut buffer = vec![0; CHUNK * 4096];
    for first in (0..pages).step_by(CHUNK) {
        let count = CHUNK.min((pages - first) as usize);
        let buffer = &mut buffer[..count * 4096];
        let address = address + first * 4096;
        memory.read_exact_at(buffer, address)?;
        // Reading has put everything into the page tables, the zero page where there was nothing.
        let hosts = frames::of_range(pid, address, count)?;
        for (index, (page, host)) in buffer.chunks_exact(4096).zip(hosts).enumerate() {
            let mut flag = [0; 8];
            if host == 0 {
                continue;
            }
            flags.read_exact_at(&mut flag, host * 8)?;
            if u64::from_le_bytes(flag) & ZERO_PAGE == 0 {
                take(first + index as u64, xxh3_128(page), host);
            }
        }
    }
    Ok(())
}

impl Oracle {
    fn of(frames: &[Frame]) -> Self {
        use FrameKind::{Anonymous, Cache, Clean, Mapped, Other};
        let class = |kinds: &[FrameKind]| {
            let chosen = frames.iter().filter(|frame| kinds.contains(&frame.kind));
            Class::of(chosen)
        };
        Self {
            all: Class::of(frames.iter()),
            mapped: class(&[Mapped]),
            clean: class(&[Mapped, Clean]),
            anonymous: class(&[Anonymous]),
            other: Some(class(&[Cache, Other])),
        }
    }
}

impl Class {
    fn of<'a>(frames: impl Iterator<Item = &'a Frame>) -> Self {
        let zero = xxh3_128(&[0; 4096]);
        let mut class = Self::default();
        let mut contents = Vec::new();
        let mut hosts = Vec::new();
        for frame in frames {
            class.frames += 1;
            class.zero += u64::from(frame.content == zero);
            contents.push((frame.content, frame.guest));
            hosts.push(frame.host);
        }
        contents.sort_unstable();
        for pair in contents.windows(2) {
            class.shareable += u64::from(pair[0].0 == pair[1].0);
            class.within += u64::from(pair[0] == pair[1]);
        }
        hosts.sort_unstable();
        hosts.dedup();
        class.shared = class.frames - hosts.len() as u64;
        class
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(content: u8, host: u64, guest: usize, kind: FrameKind) -> Frame {
        Frame {
            content: xxh3_128(&[content; 4096]),
            host,
            guest,
            kind,
        }
    }

    #[test]
    fn what_could_be_shared_is_what_is_there_more_than_once() {
        use FrameKind::{Anonymous, Cache, Clean, Mapped, Other};
        let oracle = Oracle::of(&[
            frame(1, 10, 0, Mapped),
            frame(1, 11, 0, Mapped),
            frame(1, 11, 1, Mapped),
            frame(2, 12, 0, Mapped),
            frame(2, 13, 1, Clean),
            frame(3, 14, 0, Anonymous),
            frame(0, 15, 0, Anonymous),
            frame(0, 15, 1, Anonymous),
            frame(4, 16, 0, Cache),
            frame(4, 16, 1, Other),
        ]);
        let mapped = Class {
            frames: 4,
            shareable: 2,
            within: 1,
            zero: 0,
            shared: 1,
        };
        assert_eq!(oracle.mapped, mapped);
        assert_eq!(oracle.mapped.share(), 0.5);
        assert_eq!(oracle.clean.shareable, 3, "one more, in another class");
        assert_eq!((oracle.anonymous.zero, oracle.anonymous.shareable), (2, 1));
        let other = oracle.other.unwrap();
        assert_eq!((other.frames, other.shareable, other.shared), (2, 1, 1));
        assert_eq!((oracle.all.frames, oracle.all.shareable), (10, 5));
        assert_eq!(oracle.all.shared, 3);
    }

    #[test]
    fn this_process_has_its_bytes_where_they_are_said_to_be() {
        let mut memory = vec![0_u8; 1200 * 4096];
        for (index, byte) in memory.iter_mut().enumerate() {
            *byte = (index / 4096 % 251) as u8;
        }
        let start = (memory.as_ptr() as usize).next_multiple_of(4096);
        let mut seen = Vec::new();
        let pages = (start as u64, 1100);
        let done = read(
            std::process::id(),
            pages.0,
            pages.1,
            |page, content, host| {
                seen.push((page, content, host));
            },
        );
        if done.is_err() || seen.is_empty() {
            eprintln!("skipped: {done:?}");
            return;
        }
        let offset = start - memory.as_ptr() as usize;
        for (page, content, host) in seen {
            let at = offset + page as usize * 4096;
            assert_eq!(content, xxh3_128(&memory[at..at + 4096]));
            assert_ne!(host, 0);
        }
    }
}
