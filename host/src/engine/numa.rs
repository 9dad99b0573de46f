// SPDX-License-Identifier: Apache-2.0 OR MIT

//! On which NUMA nodes memory is wanted.

#![expect(unsafe_code, reason = "system calls that no crate of ours has")]

use std::ops::Range;

/// More than any kernel is built for (`MAX_NUMNODES`).
const MOST_NODES: usize = 1024;
const WORDS: usize = MOST_NODES / 64;
const MPOL_F_ADDR: libc::c_ulong = 1 << 1;
const MPOL_DEFAULT: i32 = 0;

/// What `mbind` has set on memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPolicy {
    /// `MPOL_…` and its flags.
    mode: i32,
    nodes: [u64; WORDS],
}

impl MemoryPolicy {
    /// The policy of the mapping at `address`, if it has one.
    pub(super) fn at(address: usize) -> Option<Self> {
        let mut policy = Self {
            mode: MPOL_DEFAULT,
            nodes: [0; WORDS],
        };
        // SAFETY: the kernel writes one `int` and as many bits as told; nothing of `address`
        // is touched.
        let result = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut policy.mode,
                policy.nodes.as_mut_ptr(),
                MOST_NODES as libc::c_ulong,
                address,
                MPOL_F_ADDR,
            )
        };
        // A kernel without NUMA has no policies.
        (result == 0 && policy.mode != MPOL_DEFAULT).then_some(policy)
    }

    /// Sets it on `range`: for pages that will be allocated there.
    pub(super) fn set(&self, range: &Range<usize>) {
        // One more than the highest bit, and one more again: mbind counts so.
        const BITS: libc::c_ulong = MOST_NODES as libc::c_ulong + 1;
        // SAFETY: changes where pages come from and not what is in them; reads as many bits
        // as told, of which the last is never looked at.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                range.start,
                range.len(),
                self.mode,
                self.nodes.as_ptr(),
                BITS,
                0,
            )
        };
        if result != 0 {
            // The nodes may have gone; the guest needs its memory all the same.
            let error = std::io::Error::last_os_error();
            log::warn!("memory policy of {range:x?}: {error}");
        }
    }
}
