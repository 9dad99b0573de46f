//! The kernel's own memory, which is in no file.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Stage;
use crate::{
    guest::Guest,
    interrupt,
    protocol::Op,
    settle::settle,
    world::{Small, World},
};

const PAGE: u64 = 4096;

/// Two guests with one kernel that is not moved about share its read-only data and most of its text.
pub(super) fn kernels_at_one_address_share(stage: &mut Stage) -> Result<()> {
    let small = Small {
        kernel_arguments: "nokaslr".into(),
        ..Small::default()
    };
    stage.with_small_pair(&small, |world| {
        let deadline = Instant::now() + world.limits.settle;
        loop {
            interrupt::check()?;
            world.healthy()?;
            let (rodata, all) = same(world, "Kernel rodata")?;
            let (text, _) = same(world, "Kernel code")?;
            if rodata * 10 >= all * 9 && text > 0 {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "{rodata} of {all} pages of read-only data and {text} of text are the same memory"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        // Nothing that is shared has changed under the kernels.
        for guest in &mut world.guests {
            guest.wait_passes(3, Duration::from_secs(60))?;
        }
        Ok(())
    })
}

/// Prints what is left to share of kernels that were moved to addresses of their own.
pub(super) fn kernels_at_two_addresses_share_less(stage: &mut Stage) -> Result<()> {
    stage.with_small_pair(&Small::default(), |world| {
        settle(world, Instant::now())?;
        for part in ["Kernel code", "Kernel rodata"] {
            let (same, all) = same(world, part)?;
            println!("{part}: {same} of {all} pages are the same memory");
            ensure!(same < all, "two kernels were put at the same address");
        }
        Ok(())
    })
}

/// How many pages of a part of the kernel are the same memory of the host in both guests, and of how many.
fn same(world: &mut World, part: &str) -> Result<(usize, usize)> {
    let (first, second) = world.pair()?;
    let (first, second) = (frames(first, part)?, frames(second, part)?);
    let pairs = first.iter().zip(&second);
    let same = pairs.filter(|(one, other)| one == other && **one != 0);
    Ok((same.count(), first.len()))
}

fn frames(guest: &mut Guest, part: &str) -> Result<Vec<u64>> {
    let text: String = guest.request(Op::Read {
        path: "/proc/iomem".into(),
    })?;
    let line = text.lines().find(|line| line.ends_with(part));
    let line = line.with_context(|| format!("/proc/iomem has no {part}"))?;
    let range = line
        .trim()
        .split(' ')
        .next()
        .and_then(|range| range.split_once('-'));
    let (first, last) = range.context("parse /proc/iomem")?;
    let first = u64::from_str_radix(first, 16)?.div_ceil(PAGE);
    let end = (u64::from_str_radix(last, 16)? + 1) / PAGE;
    guest.host_frames_of(first, usize::try_from(end - first)?)
}
