//! Counts the physical frames that processes really use, as `/proc/<pid>/pagemap` tells them.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use anyhow::{Context, Result, ensure};

const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// How many distinct frames all these processes map together.
pub fn distinct(pids: &[u32]) -> Result<u64> {
    let mut frames = Vec::new();
    for pid in pids {
        collect(*pid, &mut frames)
            .with_context(|| format!("read the page map of process {pid}"))?;
    }
    ensure!(
        frames.iter().any(|frame| *frame != 0),
        "the kernel hides frame numbers; run as root"
    );
    frames.sort_unstable();
    frames.dedup();
    Ok(frames.len() as u64)
}

/// The frame of each of `pages` pages of a process from `address` on; 0 where there is none.
pub fn of_range(pid: u32, address: u64, pages: usize) -> Result<Vec<u64>> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut buffer = vec![0_u8; pages * 8];
    pagemap
        .read_exact_at(&mut buffer, address / 4096 * 8)
        .with_context(|| format!("the page map of process {pid} at {address:#x}"))?;
    let frame = |entry: u64| {
        if entry & PRESENT != 0 {
            entry & FRAME
        } else {
            0
        }
    };
    let entries = buffer
        .chunks_exact(8)
        .filter_map(|entry| entry.try_into().ok());
    Ok(entries.map(u64::from_le_bytes).map(frame).collect())
}

fn collect(pid: u32, frames: &mut Vec<u64>) -> Result<()> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut buffer = vec![0_u8; 64 << 10];
    for range in maps.lines().filter_map(range) {
        let mut at = range.start / 4096 * 8;
        let end = range.end / 4096 * 8;
        while at < end {
            let length = (end - at).min(buffer.len() as u64) as usize;
            pagemap.read_exact_at(&mut buffer[..length], at)?;
            let entries = buffer[..length]
                .chunks_exact(8)
                .filter_map(|entry| entry.try_into().ok());
            frames.extend(
                entries
                    .map(u64::from_le_bytes)
                    .filter(|entry| entry & PRESENT != 0)
                    .map(|e| e & FRAME),
            );
            at += length as u64;
        }
    }
    Ok(())
}

/// The addresses of one line of `/proc/<pid>/maps`; the vsyscall page is in no page map.
fn range(line: &str) -> Option<std::ops::Range<u64>> {
    if line.ends_with("[vsyscall]") {
        return None;
    }
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_parsed() {
        assert_eq!(range("7f00-7f10 r-xp 0 fe:00 1 /x"), Some(0x7f00..0x7f10));
        assert_eq!(
            range("ffffffffff600000-ffffffffff601000 --xp 0 00:00 0 [vsyscall]"),
            None
        );
    }

    #[test]
    fn a_process_counted_twice_uses_the_same_frames() {
        let me = std::process::id();
        let (Ok(once), Ok(twice)) = (distinct(&[me]), distinct(&[me, me])) else {
            return;
        };
        assert!(twice < once + once / 2, "{once} {twice}");
    }
}
