// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What of the VMM's ioctls concerns guest memory.

use std::ffi::c_ulong;
use std::ops::Range;

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

    /// Whether guest memory begins to exist here that is more than read.
    pub(crate) fn is_memory(&self) -> bool {
        self.memory_size != 0 && self.flags & READONLY == 0
    }

    /// Whether the guest has pages of it that the VMM cannot map.
    pub(crate) fn is_private(&self) -> bool {
        self.flags & GUEST_MEMFD != 0
    }
}

/// A range of addresses, with which `struct uffdio_register` begins.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UffdRange {
    pub(crate) start: u64,
    pub(crate) length: u64,
}

impl UffdRange {
    pub(crate) fn addresses(&self) -> Range<usize> {
        self.start as usize..self.start.saturating_add(self.length) as usize
    }
}

/// Whether an ioctl concerns us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Watched {
    /// No.
    No,
    /// `KVM_SET_USER_MEMORY_REGION` or its successor.
    MemoryRegion,
    /// `UFFDIO_REGISTER`: the VMM wants `userfaultfd` itself (postcopy, background snapshot),
    /// and a mapping can have only one.
    RegistersUserfaultfd,
    /// `UFFDIO_UNREGISTER`
    UnregistersUserfaultfd,
    /// A device gets hold of guest pages and would go on with the old ones.
    PinsMemory(&'static str),
}

const fn iow(group: u8, number: u8, size: u32) -> c_ulong {
    (1 << 30 | (size as c_ulong) << 16) | (group as c_ulong) << 8 | number as c_ulong
}

const fn ior(group: u8, number: u8, size: u32) -> c_ulong {
    (2 << 30 | (size as c_ulong) << 16) | (group as c_ulong) << 8 | number as c_ulong
}

const fn iowr(group: u8, number: u8, size: u32) -> c_ulong {
    iow(group, number, size) | ior(group, number, size)
}

const fn io(group: u8, number: u8) -> c_ulong {
    (group as c_ulong) << 8 | number as c_ulong
}

const SET_USER_MEMORY_REGION: c_ulong = iow(0xae, 0x46, 32);
const SET_USER_MEMORY_REGION2: c_ulong = iow(0xae, 0x49, 160);
/// `KVM_MEMORY_ENCRYPT_REG_REGION`: SEV pins what it encrypts.
const MEMORY_ENCRYPT_REG_REGION: c_ulong = ior(0xae, 0xbb, 16);
const VFIO_IOMMU_MAP_DMA: c_ulong = io(b';', 113);
const IOMMU_IOAS_MAP: c_ulong = io(b';', 0x85);
const IOMMU_IOAS_COPY: c_ulong = io(b';', 0x83);
const IOMMU_IOAS_MAP_FILE: c_ulong = io(b';', 0x8f);
/// `RDMA_VERBS_IOCTL`: a migration over RDMA registers all memory with the adapter.
const RDMA_VERBS_IOCTL: c_ulong = iowr(0x1b, 1, 24);
const UFFDIO_REGISTER: c_ulong = iowr(0xaa, 0x00, 32);
const UFFDIO_UNREGISTER: c_ulong = ior(0xaa, 0x01, 16);

const _: () = {
    assert!(size_of::<MemoryRegion>() == 32);
    assert!(SET_USER_MEMORY_REGION == 0x4020_ae46);
    assert!(SET_USER_MEMORY_REGION2 == 0x40a0_ae49);
    assert!(MEMORY_ENCRYPT_REG_REGION == 0x8010_aebb);
    assert!(VFIO_IOMMU_MAP_DMA == 0x3b71);
    assert!(IOMMU_IOAS_MAP == 0x3b85);
    assert!(IOMMU_IOAS_COPY == 0x3b83);
    assert!(IOMMU_IOAS_MAP_FILE == 0x3b8f);
    assert!(RDMA_VERBS_IOCTL == 0xc018_1b01);
    assert!(UFFDIO_REGISTER == 0xc020_aa00);
    assert!(UFFDIO_UNREGISTER == 0x8010_aa01);
};

/// Sorts an ioctl; comparisons of a register, since every ioctl of the VMM comes by here.
#[inline]
pub(crate) fn classify(request: c_ulong) -> Watched {
    match request {
        SET_USER_MEMORY_REGION | SET_USER_MEMORY_REGION2 => Watched::MemoryRegion,
        UFFDIO_REGISTER => Watched::RegistersUserfaultfd,
        UFFDIO_UNREGISTER => Watched::UnregistersUserfaultfd,
        VFIO_IOMMU_MAP_DMA | IOMMU_IOAS_MAP | IOMMU_IOAS_COPY | IOMMU_IOAS_MAP_FILE => {
            Watched::PinsMemory("a VFIO device is assigned, which holds guest pages")
        }
        MEMORY_ENCRYPT_REG_REGION => {
            Watched::PinsMemory("guest memory is encrypted (SEV), which holds guest pages")
        }
        RDMA_VERBS_IOCTL => {
            Watched::PinsMemory("an RDMA adapter is in use, which holds guest pages")
        }
        _ if is_vdpa(request) => {
            Watched::PinsMemory("a vDPA device is assigned, which holds guest pages")
        }
        _ => Watched::No,
    }
}

/// Memory is mapped for vDPA by messages; but every such device is asked for something by
/// `VHOST_VDPA_…` before, and no other vhost device is. What has higher numbers is for all of them.
#[inline]
fn is_vdpa(request: c_ulong) -> bool {
    request >> 8 & 0xff == 0xaf && (0x70..=0x82).contains(&(request & 0xff))
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
        assert!(slot.is_memory() && !slot.is_private() && slot.is_main_address_space());
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
            .is_memory()
        );
        assert!(
            MemoryRegion {
                flags: GUEST_MEMFD,
                ..slot
            }
            .is_private()
        );
        assert!(
            !MemoryRegion {
                memory_size: 0,
                ..slot
            }
            .is_memory()
        );
        assert!(
            MemoryRegion { flags: 1, ..slot }.is_memory(),
            "dirty logging changes nothing"
        );
    }

    #[test]
    fn what_holds_guest_pages_is_known_by_its_ioctls() {
        // As the kernel's headers have them.
        for (request, word) in [
            (0x3b71, "VFIO"),
            (0x3b83, "VFIO"),
            (0x3b85, "VFIO"),
            (0x3b8f, "VFIO"),
            (0x8004_af70, "vDPA"),
            (0x4001_af72, "vDPA"),
            (0x8004_af80, "vDPA"),
            (0x8010_aebb, "SEV"),
            (0xc018_1b01, "RDMA"),
        ] {
            let Watched::PinsMemory(what) = classify(request) else {
                panic!("{request:#x} is not known");
            };
            assert!(what.contains(word), "{what}");
        }
        // KVM_RUN, VHOST_SET_MEM_TABLE, VHOST_VSOCK_SET_RUNNING, VHOST_GET_ and
        // VHOST_SET_FEATURES_ARRAY, VHOST_SET_FORK_FROM_OWNER, VFIO_GROUP_GET_STATUS, TCGETS,
        // UFFDIO_API.
        for request in [
            0xae80,
            0x4008_af03,
            0x4004_af61,
            0x8008_af83,
            0x4008_af83,
            0x4001_af84,
            0x3b67,
            0x5401,
            0xc018_aa3f,
        ] {
            assert_eq!(classify(request), Watched::No, "{request:#x}");
        }
    }
}
