// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What of the VMM's ioctls concerns guest memory.

use std::ffi::c_ulong;

/// `struct kvm_userspace_memory_region`, with which `…_region2` begins.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryRegion {
    /// Slot in bits 0–15, address space in bits 16–31.
    pub(crate) slot: u32,
    pub(crate) flags: u32,
    pub(crate) guest_phys_addr: u64,
    pub(crate) memory_size: u64,
    pub(crate) userspace_addr: u64,
}

/// `KVM_MEM_READONLY`
const READONLY: u32 = 1 << 1;
/// `KVM_MEM_GUEST_MEMFD`
const GUEST_MEMFD: u32 = 1 << 2;

impl MemoryRegion {
    /// Slots of the system management address space show the same memory a second time.
    pub(crate) fn is_main_address_space(&self) -> bool {
        self.slot >> 16 == 0
    }

    /// Whether guest memory of the kind that can be shared begins to exist here.
    pub(crate) fn is_ordinary(&self) -> bool {
        self.memory_size != 0 && self.flags & (READONLY | GUEST_MEMFD) == 0
    }
}

/// Whether an ioctl concerns us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watched {
    /// No.
    No,
    /// `KVM_SET_USER_MEMORY_REGION` or its successor.
    MemoryRegion,
    /// A device gets hold of guest pages and would go on with the old ones.
    PinsMemory(&'static str),
}

const fn iow(group: u8, number: u8, size: u32) -> c_ulong {
    (1 << 30 | (size as c_ulong) << 16) | (group as c_ulong) << 8 | number as c_ulong
}

const fn io(group: u8, number: u8) -> c_ulong {
    (group as c_ulong) << 8 | number as c_ulong
}

const SET_USER_MEMORY_REGION: c_ulong = iow(0xae, 0x46, 32);
const SET_USER_MEMORY_REGION2: c_ulong = iow(0xae, 0x49, 160);
const VFIO_IOMMU_MAP_DMA: c_ulong = io(b';', 113);
const IOMMU_IOAS_MAP: c_ulong = io(b';', 0x85);
/// `VHOST_VDPA_GET_DEVICE_ID`, asked of every vDPA device before it maps memory.
const VHOST_VDPA_GET_DEVICE_ID: c_ulong = 2 << 30 | 4 << 16 | 0xaf << 8 | 0x70;
/// `UFFDIO_API`: the VMM wants `userfaultfd` itself (postcopy, background snapshot), and a
/// mapping can have only one.
const UFFDIO_API: c_ulong = 3 << 30 | 24 << 16 | 0xaa << 8 | 0x3f;

const _: () = {
    assert!(size_of::<MemoryRegion>() == 32);
    assert!(SET_USER_MEMORY_REGION == 0x4020_ae46);
    assert!(SET_USER_MEMORY_REGION2 == 0x40a0_ae49);
    assert!(VFIO_IOMMU_MAP_DMA == 0x3b71);
    assert!(IOMMU_IOAS_MAP == 0x3b85);
    assert!(VHOST_VDPA_GET_DEVICE_ID == 0x8004_af70);
    assert!(UFFDIO_API == 0xc018_aa3f);
};

/// Sorts an ioctl; comparisons of a register, since every ioctl of the VMM comes by here.
#[inline]
pub(crate) fn classify(request: c_ulong) -> Watched {
    match request {
        SET_USER_MEMORY_REGION | SET_USER_MEMORY_REGION2 => Watched::MemoryRegion,
        VFIO_IOMMU_MAP_DMA | IOMMU_IOAS_MAP => {
            Watched::PinsMemory("a VFIO device is assigned, which holds guest pages")
        }
        VHOST_VDPA_GET_DEVICE_ID => {
            Watched::PinsMemory("a vDPA device is assigned, which holds guest pages")
        }
        UFFDIO_API => Watched::PinsMemory("the VMM uses userfaultfd itself"),
        _ => Watched::No,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ordinary_memory_of_the_main_address_space_counts() {
        let slot = MemoryRegion {
            slot: 3,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: 4096,
            userspace_addr: 0x1000,
        };
        assert!(slot.is_ordinary() && slot.is_main_address_space());
        assert!(
            !MemoryRegion {
                slot: 1 << 16,
                ..slot
            }
            .is_main_address_space()
        );
        assert!(
            !MemoryRegion {
                flags: READONLY,
                ..slot
            }
            .is_ordinary()
        );
        assert!(
            !MemoryRegion {
                flags: GUEST_MEMFD,
                ..slot
            }
            .is_ordinary()
        );
        assert!(
            !MemoryRegion {
                memory_size: 0,
                ..slot
            }
            .is_ordinary()
        );
        assert!(
            MemoryRegion { flags: 1, ..slot }.is_ordinary(),
            "dirty logging changes nothing"
        );
    }
}
