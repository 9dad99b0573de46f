// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory that is left alone beside memory that is shared: the operator is told why.

use crate::machine::{FILE, Machine, PAGE, PAGES, Ram, in_vmm};
use crate::supervisor::{self, Seen};
use pagefusion_host::operator::{Explanation, explain};
use pagefusion_host::protocol::{Status, VmStatus};
use std::os::fd::{AsRawFd, OwnedFd};

/// As much memory again, that another process could map.
fn shared_ram() -> Ram {
    let ram = Ram::new(PAGES);
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let at = ram.at(0) as *mut _;
    // SAFETY: over memory that nobody has seen yet.
    let mapped = unsafe { libc::mmap(at, PAGES * PAGE, protection, flags, -1, 0) };
    assert_eq!(mapped, at);
    ram
}

const SET_USER_MEMORY_REGION2: u32 = 0x40a0_ae49;

/// Knows slots as the kernel does, for this thread.
struct Kvm {
    vm: OwnedFd,
    _calls: Seen<()>,
}

impl Kvm {
    fn new() -> Self {
        Self {
            vm: rustix::pipe::pipe().unwrap().0,
            _calls: supervisor::answer_ioctl(SET_USER_MEMORY_REGION2, || ()),
        }
    }

    fn set_slot(&self, slot: u64, flags: u64, gfn: usize, ram: &Ram) {
        // `struct kvm_userspace_memory_region2`, as far as there is anything in it.
        let mut argument = [0_u64; 20];
        argument[0] = slot | flags << 32;
        argument[1] = (gfn * PAGE) as u64;
        argument[2] = (ram.pages * PAGE) as u64;
        argument[3] = ram.base as u64;
        let (vm, argument) = (self.vm.as_raw_fd(), argument.as_mut_ptr());
        // SAFETY: a pipe knows no slots, and the answer leaves the argument alone.
        let set = unsafe { libc::ioctl(vm, SET_USER_MEMORY_REGION2.into(), argument) };
        assert_eq!(set, 0);
    }
}

fn explained(vm: &Machine) -> Explanation {
    // The guest of this test reaches the device without the VMM.
    let device = Some(true);
    let vm = VmStatus {
        device,
        ..vm.status()
    };
    explain(&Status::default(), &vm)
}

/// What is said of the pages of one report.
#[track_caller]
fn assert_named(vm: &Machine, name: &str, word: &str) {
    let status = vm.status().engine;
    assert_eq!(status.disabled, None);
    let pages = FILE as u64;
    assert_eq!(status.refusals.get(name), Some(&pages), "{status:?}");
    let causes = explained(vm).causes;
    let named = causes
        .iter()
        .find(|it| it.cause == format!("refused-{name}"));
    let named = named.unwrap_or_else(|| panic!("{causes:?}"));
    assert_eq!(named.pages, Some(pages));
    assert!(named.text.contains(word), "{named:?}");
    assert!(named.cure.is_some(), "{named:?}");
}

#[test]
fn a_shared_dimm_is_named_while_other_memory_is_shared() {
    let name = "refusals::a_shared_dimm_is_named_while_other_memory_is_shared";
    in_vmm(name, |vmm| {
        let dimm = shared_ram();
        let kvm = Kvm::new();
        kvm.set_slot(0, 0, 0, &vmm.ram);
        kvm.set_slot(1, 0, PAGES, &dimm);
        vmm.load();
        vmm.boot_without_monitor();
        vmm.share_all();
        assert_eq!(vmm.report(1, PAGES).shared, 0);
        assert_named(vmm, "memory-share-on", "share=on");
        assert!(vmm.is_overlaid(0..PAGES));
        assert_eq!(explained(vmm).pages_shared, PAGES as u64);
    });
}

#[test]
fn private_memory_is_named_while_other_memory_is_shared() {
    const GUEST_MEMFD: u64 = 1 << 2;
    let name = "refusals::private_memory_is_named_while_other_memory_is_shared";
    in_vmm(name, |vmm| {
        let private = Ram::new(PAGES);
        let kvm = Kvm::new();
        kvm.set_slot(1, GUEST_MEMFD, PAGES, &private);
        kvm.set_slot(0, 0, 0, &vmm.ram);
        vmm.load();
        vmm.boot_without_monitor();
        vmm.share_all();
        assert_eq!(vmm.report(1, PAGES).shared, 0);
        assert_named(vmm, "memory-guest-memfd", "guest_memfd");
        // The slot becomes ordinary memory.
        kvm.set_slot(1, 0, PAGES, &private);
        for page in 0..FILE {
            private.write_page(page, vmm.content(page));
        }
        assert_eq!(usize::from(vmm.report(1, PAGES).shared), FILE);
    });
}
