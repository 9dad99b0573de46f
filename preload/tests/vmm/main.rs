// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The library in a VMM: real memory, a real daemon, a real guest's reports, and everything that
//! VMMs do to guest memory behind the library's back.

#![expect(unsafe_code, reason = "makes the calls that VMMs make")]

mod blkio;
mod errno;
mod guest;
mod machine;
mod refusals;
mod restarts;
mod starts;
mod supervisor;

use machine::{PAGE, PAGES, Ram, in_each_vmm, in_vmm, in_vmm_by_script, in_vmm_of};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

fn advise(ram: &Ram, pages: std::ops::Range<usize>, advice: i32) -> io::Result<()> {
    let bytes = pages.len() * PAGE;
    // SAFETY: guest memory, which nothing refers to but atomics.
    match unsafe { libc::madvise(ram.at(pages.start) as *mut _, bytes, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

const ZEROS: [u8; PAGE] = [0; PAGE];

#[test]
fn equal_pages_are_shared() {
    in_vmm("equal_pages_are_shared", |vmm| {
        vmm.load();
        vmm.boot();
        vmm.share_all();
        vmm.check(0..PAGES);
        let status = vmm.status().engine;
        assert_eq!((status.pages_shared, status.disabled), (PAGES as u64, None));
    });
}

#[test]
fn a_vmm_that_a_script_becomes_shares() {
    in_vmm_by_script("a_vmm_that_a_script_becomes_shares", |vmm| {
        vmm.load();
        vmm.boot();
        vmm.share_all();
        vmm.check(0..PAGES);
        for name in ["LD_PRELOAD", "PAGEFUSION_PROCESS"] {
            assert_eq!(std::env::var_os(name), None, "{name} is left to children");
        }
    });
}

/// Name and niceness of each thread of a process.
fn priorities(pid: u32) -> Vec<(String, i32)> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let stats = threads.map(|it| std::fs::read_to_string(it.unwrap().path().join("stat")).unwrap());
    let parse = |stat: String| {
        let (name, rest) = stat.split_once('(').unwrap().1.rsplit_once(") ").unwrap();
        (
            name.to_owned(),
            rest.split(' ').nth(16).unwrap().parse().unwrap(),
        )
    };
    stats.map(parse).collect()
}

#[test]
fn the_engine_gives_way_and_what_the_vmm_waits_for_does_not() {
    let name = "the_engine_gives_way_and_what_the_vmm_waits_for_does_not";
    in_vmm(name, |vmm| {
        vmm.load();
        vmm.boot();
        vmm.share_all();
        let nice = rustix::process::getpriority_process(None).unwrap();
        let all = priorities(std::process::id());
        let (engine, rest): (Vec<_>, Vec<_>) = all
            .into_iter()
            .partition(|(name, _)| ["pf-ring", "pf-control"].contains(&name.as_str()));
        assert_eq!(engine.len(), 2);
        assert!(engine.iter().all(|it| it.1 == nice + 5), "{engine:?}");
        assert!(rest.iter().any(|it| it.0 == "pf-faults"));
        assert!(rest.iter().all(|it| it.1 == nice), "{rest:?}");
    });
}

#[test]
fn discarded_memory_is_zero_and_never_what_was_shared() {
    in_vmm(
        "discarded_memory_is_zero_and_never_what_was_shared",
        |vmm| {
            vmm.load();
            vmm.boot();
            vmm.share_all();
            advise(&vmm.ram, 5..9, libc::MADV_DONTNEED).unwrap();
            for page in 5..9 {
                assert_eq!(vmm.ram.read_page(page), ZEROS, "page {page}");
            }
            vmm.check(0..5);
            vmm.check(9..PAGES);
            // What the guest puts there is its own, and goes when it is given back again.
            vmm.ram.word(6, 0).store(7, Ordering::Relaxed);
            advise(&vmm.ram, 0..PAGES, libc::MADV_DONTNEED).unwrap();
            assert_eq!(vmm.overlaid(0..PAGES), 0);
            for page in 0..PAGES {
                assert_eq!(vmm.ram.read_page(page), ZEROS, "page {page}");
            }
            // Zeros are content as any other.
            vmm.share();
            for page in 0..PAGES {
                assert_eq!(vmm.ram.read_page(page), ZEROS, "page {page}");
            }
            vmm.load();
            vmm.share_all();
        },
    );
}

#[test]
fn a_discard_of_less_than_a_page_is_one_of_the_page() {
    in_vmm("a_discard_of_less_than_a_page_is_one_of_the_page", |vmm| {
        vmm.load();
        vmm.boot();
        vmm.share_all();
        // SAFETY: guest memory, which nothing refers to but atomics.
        let result = unsafe {
            let bytes = PAGE + 1;
            libc::madvise(vmm.ram.at(5) as *mut _, bytes, libc::MADV_DONTNEED)
        };
        assert_eq!(result, 0);
        assert_eq!(vmm.ram.read_page(5), ZEROS);
        assert_eq!(vmm.ram.read_page(6), ZEROS);
        vmm.check(7..PAGES);
    });
}

#[test]
fn memory_that_may_be_freed_is_the_guests_own_or_zero() {
    in_vmm(
        "memory_that_may_be_freed_is_the_guests_own_or_zero",
        |vmm| {
            vmm.load();
            vmm.boot();
            vmm.share_all();
            vmm.ram.word(3, 0).store(7, Ordering::Relaxed);
            // Fails on memory from a file, which an overlay is.
            advise(&vmm.ram, 0..8, libc::MADV_FREE).unwrap();
            assert_eq!(vmm.overlaid(0..8), 0);
            // Has the kernel do now what it does when memory is short.
            advise(&vmm.ram, 0..8, libc::MADV_PAGEOUT).unwrap();
            for page in 0..8 {
                let found = vmm.ram.read_page(page);
                let is_own = found[8..] == vmm.content(page)[8..];
                assert!(found == ZEROS || is_own, "page {page}");
            }
            let word = vmm.ram.word(3, 0).load(Ordering::Relaxed);
            assert!(word == 0 || word == 7, "the canonical word came back");
            vmm.check(8..PAGES);
        },
    );
}

#[test]
fn a_call_is_refused_when_overlays_cannot_be_undone() {
    in_vmm("a_call_is_refused_when_overlays_cannot_be_undone", |vmm| {
        vmm.load();
        vmm.boot();
        vmm.share_all();
        let limit = NoMemory::from_now_on();
        // This may fail, and what is there must not be lost then.
        let removed = advise(&vmm.ram, 0..PAGES, libc::MADV_REMOVE);
        // SAFETY: guest memory, which nothing refers to but atomics.
        let locked = unsafe { libc::mlock(vmm.ram.at(0) as *const _, PAGE) };
        // SAFETY: as above.
        let unmapped = unsafe { libc::munmap(vmm.ram.at(0) as *mut _, PAGE) };
        // It takes no memory to give memory up.
        let discarded = advise(&vmm.ram, 5..9, libc::MADV_DONTNEED);
        drop(limit);
        discarded.unwrap();
        assert_eq!(removed.unwrap_err().raw_os_error(), Some(libc::ENOMEM));
        assert_eq!((locked, unmapped), (-1, -1));
        for pages in [0..5, 9..PAGES] {
            vmm.check(pages.clone());
            assert_eq!(vmm.overlaid(pages.clone()), pages.len(), "{pages:?}");
        }
        assert_eq!(vmm.ram.read_page(5), ZEROS);
    });
}

#[test]
fn a_discard_that_the_kernel_refuses_loses_nothing() {
    in_vmm("a_discard_that_the_kernel_refuses_loses_nothing", |vmm| {
        vmm.load();
        vmm.boot();
        vmm.share_all();
        vmm.ram.word(3, 0).store(7, Ordering::Relaxed);
        // For shared mappings alone.
        advise(&vmm.ram, 0..8, libc::MADV_REMOVE).unwrap_err();
        // Locked by now, which leaves what was written where it is.
        // SAFETY: locks memory of this process, which changes nothing in it.
        let locked = unsafe { libc::mlock(vmm.ram.at(0) as *const _, 8 * PAGE) };
        assert_eq!(locked, 0);
        for advice in [libc::MADV_DONTNEED, libc::MADV_FREE] {
            advise(&vmm.ram, 0..8, advice).unwrap_err();
        }
        // SAFETY: as above.
        let unlocked = unsafe { libc::munlock(vmm.ram.at(0) as *const _, 8 * PAGE) };
        assert_eq!(unlocked, 0);
        // More than there is.
        // SAFETY: refused for its length.
        let result =
            unsafe { libc::madvise(vmm.ram.at(0) as *mut _, usize::MAX, libc::MADV_DONTNEED) };
        assert_eq!(result, -1);
        // Not at the beginning of a page.
        let (at, bytes) = (vmm.ram.at(8) + 8, 4 * PAGE);
        // SAFETY: guest memory, which nothing refers to but atomics.
        let result = unsafe { libc::madvise(at as *mut _, bytes, libc::MADV_DONTNEED) };
        assert_eq!(result, -1);
        assert_eq!(vmm.ram.word(3, 0).load(Ordering::Relaxed), 7);
        vmm.ram.write_page(3, vmm.content(3));
        vmm.check(0..PAGES);
    });
}

#[test]
fn pages_that_become_a_guard_are_empty_when_they_are_none_any_more() {
    const GUARD_INSTALL: i32 = 102;
    const GUARD_REMOVE: i32 = 103;
    let name = "pages_that_become_a_guard_are_empty_when_they_are_none_any_more";
    in_vmm(name, |vmm| {
        vmm.load();
        vmm.boot();
        vmm.share_all();
        // One that the guest has written lies on the store as well, beneath what was written.
        vmm.ram.word(3, 0).store(7, Ordering::Relaxed);
        if let Err(error) = advise(&vmm.ram, 0..8, GUARD_INSTALL) {
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
            eprintln!("skipped: this kernel has no guard pages");
            return;
        }
        assert_eq!(vmm.overlaid(0..PAGES), PAGES - 8);
        let (_read, write) = rustix::pipe::pipe().unwrap();
        for page in 0..8 {
            // SAFETY: the kernel looks at guest memory, as far as it may.
            let told = unsafe {
                let at = vmm.ram.at(page) as *const _;
                libc::write(write.as_raw_fd(), at, 8)
            };
            let error = io::Error::last_os_error().raw_os_error();
            assert_eq!((told, error), (-1, Some(libc::EFAULT)), "page {page}");
        }
        advise(&vmm.ram, 0..8, GUARD_REMOVE).unwrap();
        for page in 0..8 {
            assert_eq!(vmm.ram.read_page(page), ZEROS, "page {page}");
        }
        vmm.check(8..PAGES);
        vmm.load();
        vmm.share_all();
    });
}

#[test]
fn locked_memory_is_left_alone_until_it_is_unlocked() {
    in_vmm("locked_memory_is_left_alone_until_it_is_unlocked", |vmm| {
        vmm.load();
        vmm.boot();
        vmm.share_all();
        // SAFETY: locks this process's memory, which changes nothing in it.
        assert_eq!(unsafe { libc::mlock(vmm.ram.at(3) as *const _, PAGE) }, 0);
        assert_eq!(vmm.overlaid(0..PAGES), 0);
        assert_eq!(vmm.share(), 0);
        assert!(vmm.refusal().contains("mlock"), "{}", vmm.refusal());
        // SAFETY: as above.
        assert_eq!(unsafe { libc::munlock(vmm.ram.at(3) as *const _, PAGE) }, 0);
        vmm.share_all();
        // SAFETY: as above.
        assert_eq!(unsafe { libc::mlockall(libc::MCL_FUTURE) }, 0);
        assert_eq!((vmm.overlaid(0..PAGES), vmm.share()), (0, 0));
        // SAFETY: as above.
        assert_eq!(unsafe { libc::munlockall() }, 0);
        vmm.share_all();
        vmm.check(0..PAGES);
    });
}

#[test]
fn a_userfaultfd_of_the_vmm_gets_the_memory_and_sharing_comes_back() {
    let name = "a_userfaultfd_of_the_vmm_gets_the_memory_and_sharing_comes_back";
    in_vmm(name, |vmm| {
        const UFFDIO_API: u64 = 0xc018_aa3f;
        const UFFDIO_REGISTER: u64 = 0xc020_aa00;
        const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
        vmm.load();
        vmm.boot();
        vmm.share_all();
        // As QEMU does for postcopy: asks what there is, which alone changes nothing.
        // SAFETY: makes a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) } as i32;
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        let ioctl = |request: u64, mut argument: [u64; 4]| {
            // SAFETY: each of these has an argument of at most four words.
            unsafe { libc::ioctl(fd, request, argument.as_mut_ptr()) }
        };
        assert_eq!(ioctl(UFFDIO_API, [0xaa, 0, 0, 0]), 0);
        assert!(vmm.is_overlaid(0..PAGES));
        let (start, length) = (vmm.ram.base as u64, (PAGES * PAGE) as u64);
        assert_eq!(ioctl(UFFDIO_REGISTER, [start, length, 1, 0]), 0);
        assert_eq!((vmm.overlaid(0..PAGES), vmm.share()), (0, 0));
        assert!(vmm.refusal().contains("userfaultfd"), "{}", vmm.refusal());
        vmm.check(0..PAGES);
        let asked = vmm.guest().requests();
        assert_eq!(ioctl(UFFDIO_UNREGISTER, [start, length, 0, 0]), 0);
        // What was reported before the guest would not report again by itself.
        vmm.guest().wait_for_request(asked);
        vmm.share_all();
        // One that is not to be had is not waited for.
        assert_eq!(ioctl(UFFDIO_REGISTER, [start, length, 1 << 20, 0]), -1);
        vmm.share_all();
        vmm.check(0..PAGES);
    });
}

#[test]
fn memory_may_go_and_come_back_elsewhere() {
    in_vmm("memory_may_go_and_come_back_elsewhere", |vmm| {
        vmm.load();
        vmm.boot();
        vmm.share_all();
        let old = vmm.ram.base;
        let bytes = PAGES * PAGE;
        // SAFETY: guest memory, which nothing refers to.
        assert_eq!(unsafe { libc::munmap(old as *mut _, bytes) }, 0);
        // What comes to lie there is nobody's business, and would be lost by an undo.
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: nothing is there.
        let other = unsafe { libc::mmap(old as *mut _, bytes, protection, flags, -1, 0) };
        assert_eq!(other as usize, old);
        let reason = vmm.report(1, 0).reason;
        assert_eq!(reason, pagefusion_abi::wire::reason::OUTSIDE_MEMORY);

        let mut ram = Ram::new(PAGES);
        std::mem::swap(&mut ram, &mut vmm.ram);
        vmm.load();
        vmm.monitor().show(&[(0, vmm.ram.base, PAGES)]);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while vmm.share() != PAGES {
            assert!(std::time::Instant::now() < deadline, "it was not found");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert!(vmm.is_overlaid(0..PAGES));
        vmm.check(0..PAGES);
        // SAFETY: locks memory and unlocks it: all that is shared is undone.
        assert_eq!(unsafe { libc::mlockall(libc::MCL_CURRENT) }, 0);
        assert_eq!(vmm.overlaid(0..PAGES), 0);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let start = format!("{old:x}-");
        let line = maps.lines().find(|line| line.starts_with(&start)).unwrap();
        assert!(line.contains("rw-s"), "{line}");
    });
}

#[test]
fn attributes_set_while_sharing_are_those_of_overlays() {
    in_vmm(
        "attributes_set_while_sharing_are_those_of_overlays",
        |vmm| {
            vmm.load();
            vmm.boot();
            vmm.share_all();
            advise(&vmm.ram, 0..PAGES, libc::MADV_DONTFORK).unwrap();
            assert_eq!(vmm.overlaid(0..PAGES), 0);
            vmm.share_all();
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mut overlay = false;
            let mut seen = 0;
            for line in smaps.lines() {
                if let Some(flags) = line.strip_prefix("VmFlags:") {
                    let kept = flags.split_ascii_whitespace().any(|it| it == "dc");
                    assert!(!overlay || kept, "an overlay that is there after a fork");
                    seen += usize::from(overlay);
                } else if line.split(' ').next().is_some_and(|it| it.contains('-')) {
                    overlay = line.contains(".pages");
                }
            }
            assert!(seen > 0);
        },
    );
}

#[test]
fn a_forked_child_is_none_of_the_librarys() {
    in_vmm("a_forked_child_is_none_of_the_librarys", |vmm| {
        vmm.load();
        vmm.boot();
        vmm.share_all();
        // SAFETY: the child makes system calls only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // Its own copy: neither waits for an engine it has not, nor touches its parent's.
            let done = advise(&vmm.ram, 0..PAGES, libc::MADV_NORMAL).is_ok()
                && advise(&vmm.ram, 0..PAGES, libc::MADV_DONTNEED).is_ok();
            // SAFETY: ends this process and nothing else.
            unsafe { libc::_exit(i32::from(!done)) };
        }
        let mut status = 0;
        // SAFETY: a status of this stack.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
        assert!(vmm.is_overlaid(0..PAGES));
        vmm.check(0..PAGES);
    });
}

/// With `vm.unprivileged_userfaultfd=0`, as Debian has it.
#[test]
fn a_vmm_of_an_ordinary_user_shares_and_cannot_write_to_the_store() {
    const NOBODY: u32 = 65534;
    let name = "a_vmm_of_an_ordinary_user_shares_and_cannot_write_to_the_store";
    in_vmm_of(name, NOBODY, |vmm| {
        assert_eq!(rustix::process::geteuid().as_raw(), NOBODY);
        // SAFETY: makes a descriptor, if it may.
        let own = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        if own >= 0 {
            eprintln!("vm.unprivileged_userfaultfd is 1: this shows less than it should");
        }
        vmm.load();
        vmm.boot();
        vmm.share_all();
        vmm.check(0..PAGES);
        let mut stores = 0;
        for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
            let path = entry.unwrap().path();
            let is_store = |it: std::path::PathBuf| it.extension().is_some_and(|it| it == "pages");
            if std::fs::read_link(&path).is_ok_and(is_store) {
                stores += 1;
                let opened = std::fs::OpenOptions::new().write(true).open(&path);
                assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            }
        }
        assert!(stores > 0);
    });
}

/// Until it is dropped, this process gets no more memory than a little.
struct NoMemory(libc::rlimit);

impl NoMemory {
    fn from_now_on() -> Self {
        let mut old = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: reads the limit into this stack.
        assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut old) }, 0);
        // Enough for what is small, and not for a window.
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
        let none = libc::rlimit {
            rlim_cur: (pages + 48) * PAGE as u64,
            ..old
        };
        // SAFETY: makes large mappings fail, which everything here can stand.
        let set = unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const none) };
        assert_eq!(set, 0);
        Self(old)
    }
}

impl Drop for NoMemory {
    fn drop(&mut self) {
        // SAFETY: as it was.
        unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const self.0) };
    }
}

/// Assigned devices. No device of these kinds is here: the calls that give
/// them guest memory are answered by the test in the kernel's place.
mod devices {
    use super::*;

    const VFIO_IOMMU_MAP_DMA: u32 = 0x3b71;
    const CALLS: [(u32, &str); 7] = [
        (VFIO_IOMMU_MAP_DMA, "VFIO"),
        (0x3b85, "VFIO"),      // IOMMU_IOAS_MAP
        (0x3b8f, "VFIO"),      // IOMMU_IOAS_MAP_FILE
        (0x8004_af70, "vDPA"), // VHOST_VDPA_GET_DEVICE_ID
        (0x8001_af71, "vDPA"), // VHOST_VDPA_GET_STATUS
        (0xc018_1b01, "RDMA"), // RDMA_VERBS_IOCTL
        (0x8010_aebb, "SEV"),  // KVM_MEMORY_ENCRYPT_REG_REGION
    ];

    fn call(request: u32) -> io::Result<()> {
        let nobody = rustix::pipe::pipe().unwrap().0;
        let mut argument = [0_u8; 256];
        let argument = argument.as_mut_ptr();
        // SAFETY: a pipe knows none of these, and the answer leaves the argument alone.
        match unsafe { libc::ioctl(nobody.as_raw_fd(), request.into(), argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Frames of guest memory, which a device would go on with; 0 without privilege.
    fn frames(base: usize) -> Vec<u64> {
        use std::os::unix::fs::FileExt;
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut entries = [0; PAGES * 8];
        let at = (base / PAGE * 8) as u64;
        pagemap.read_exact_at(&mut entries, at).unwrap();
        let frame = |entry: &[u8]| u64::from_ne_bytes(entry.try_into().unwrap()) & ((1 << 55) - 1);
        entries.chunks_exact(8).map(frame).collect()
    }

    #[test]
    fn a_device_gets_the_frames_that_the_guest_goes_on_with() {
        let name = "devices::a_device_gets_the_frames_that_the_guest_goes_on_with";
        in_vmm(name, |vmm| {
            vmm.load();
            vmm.boot();
            vmm.share_all();
            let base = vmm.ram.base;
            let maps = supervisor::answer_ioctl(VFIO_IOMMU_MAP_DMA, move || frames(base));
            call(VFIO_IOMMU_MAP_DMA).unwrap();
            let device = maps.recv().unwrap();
            assert!(device.iter().all(|&frame| frame != 0), "not root?");
            // What the guest writes, the device sees, and the other way round.
            for page in 0..PAGES {
                vmm.ram.word(page, 1).fetch_add(1, Ordering::Relaxed);
            }
            assert_eq!(frames(base), device);
            // Nothing is shared any more, whatever is reported.
            vmm.load();
            assert_eq!(vmm.share(), 0);
            assert_eq!(frames(base), device);
            assert!(vmm.refusal().contains("VFIO"), "{}", vmm.refusal());
        });
    }

    #[test]
    fn every_kind_of_device_ends_sharing_by_name() {
        let name = "devices::every_kind_of_device_ends_sharing_by_name";
        in_each_vmm(name, None, CALLS.len(), |vmm, number| {
            vmm.load();
            vmm.boot();
            vmm.share_all();
            call(0x3b67).unwrap_err(); // VFIO_GROUP_GET_STATUS holds nothing
            assert!(vmm.is_overlaid(0..PAGES));
            let (request, word) = CALLS[number];
            call(request).unwrap_err();
            assert_eq!(vmm.overlaid(0..PAGES), 0, "{request:#x}");
            assert!(vmm.refusal().contains(word), "{}", vmm.refusal());
            vmm.check(0..PAGES);
        });
    }

    #[test]
    fn a_device_is_refused_when_overlays_cannot_be_undone() {
        let name = "devices::a_device_is_refused_when_overlays_cannot_be_undone";
        in_vmm(name, |vmm| {
            vmm.load();
            vmm.boot();
            vmm.share_all();
            let maps = supervisor::answer_ioctl(VFIO_IOMMU_MAP_DMA, || ());
            let limit = NoMemory::from_now_on();
            let error = call(VFIO_IOMMU_MAP_DMA).unwrap_err();
            drop(limit);
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
            assert!(maps.try_recv().is_err(), "the device has got memory");
            vmm.check(0..PAGES);
            // When there is memory again, the device gets it.
            call(VFIO_IOMMU_MAP_DMA).unwrap();
            maps.recv().unwrap();
            assert_eq!(vmm.overlaid(0..PAGES), 0);
            vmm.check(0..PAGES);
        });
    }
}
