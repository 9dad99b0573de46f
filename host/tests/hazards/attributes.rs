// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a VMM has asked of the kernel for its memory goes on, on overlays and after them.

#![expect(unsafe_code, reason = "does to its own memory what VMMs do to theirs")]

use crate::common::{alone, file};
use crate::support::{Equal, PAGES, advise, maps_of};
use pagefusion_abi::wire::reason;
use pagefusion_host::engine::ReportedRun;
use pagefusion_host::store::PAGE;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::Ordering;

/// KSM puts a page in the place of another without its write protection.
#[test]
fn ksm_is_kept_from_memory_while_it_is_replaced() {
    let equal = Equal::new();
    equal.write_all();
    equal.vm.ram.word(5, 0).fetch_xor(1, Ordering::Relaxed);
    if !Path::new("/sys/kernel/mm/ksm").exists() {
        eprintln!("skipped: this kernel has no KSM");
        return;
    }
    advise(&equal.vm.ram, 0..PAGES, libc::MADV_MERGEABLE);
    let is_mergeable = |page: usize| {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|it| it.split_once('-'));
            let number = |text| usize::from_str_radix(text, 16).ok();
            if let Some((Some(start), Some(end))) = range.map(|(s, e)| (number(s), number(e))) {
                inside = (start..end).contains(&equal.vm.ram.at(page));
            } else if inside && line.starts_with("VmFlags:") {
                return line.split(' ').any(|flag| flag == "mg");
            }
        }
        panic!("page {page} is not mapped");
    };
    let all = |pages: &[usize]| {
        pages
            .iter()
            .map(|&page| is_mergeable(page))
            .collect::<Vec<_>>()
    };
    assert_eq!(all(&[0, 5, 20]), [true, true, true]);
    let run = ReportedRun {
        file: file(1),
        page: 0,
        gfn: 0,
        pages: 16,
    };
    for protects in [false, true] {
        // Asked while the pages are protected.
        let seen = std::cell::RefCell::new(Vec::new());
        equal.vm.sharing.share_while(&[run], &|| {
            *seen.borrow_mut() = all(&[0, 15, 20]);
            protects
        });
        assert_eq!(*seen.borrow(), [false, false, true]);
        // What was not replaced, after all, is as it was.
        assert_eq!(all(&[5, 20]), [true, true]);
        assert_eq!(
            equal.vm.sharing.memory().overlays().pages(),
            if protects { 15 } else { 0 }
        );
    }
    equal.vm.sharing.undo_all().unwrap();
    assert_eq!(all(&[0, 5, 15, 20]), [true; 4]);
}

#[test]
fn what_the_vmm_has_set_is_set_on_overlays_and_on_what_takes_their_place() {
    let equal = Equal::new();
    equal.write_all();
    // Not the same everywhere: the second half is in dumps.
    advise(&equal.vm.ram, 0..PAGES, libc::MADV_DONTFORK);
    advise(&equal.vm.ram, 0..PAGES / 2, libc::MADV_DONTDUMP);
    let mergeable = has_ksm();
    if mergeable {
        advise(&equal.vm.ram, 0..PAGES, libc::MADV_MERGEABLE);
    }
    let maps_before = maps_of(&equal.range());
    let before = [equal.flags(0), equal.flags(PAGES - 1)];
    let has = |page, flag: &str| equal.flags(page).iter().any(|it| it == flag);

    // What reaches over the border would be wrong on one side.
    let over = equal.share_some(PAGES / 2 - 8, 16);
    assert_eq!(over, (0, reason::UNSUITABLE_MEMORY));
    assert_eq!(equal.share_some(0, PAGES / 2), (PAGES / 2, reason::NONE));
    assert_eq!(
        equal.share_some(PAGES / 2, PAGES / 2),
        (PAGES / 2, reason::NONE)
    );
    assert!(maps_of(&equal.range()) != maps_before);
    for page in [0, PAGES - 1] {
        assert!(has(page, "dc"), "page {page} would be there after a fork");
        assert_eq!(has(page, "dd"), page == 0, "page {page} in a core dump");
        assert!(!has(page, "mg"), "an overlay that KSM looks at");
    }
    equal.vm.sharing.undo_all().unwrap();
    assert_eq!(maps_of(&equal.range()), maps_before);
    let after = [equal.flags(0), equal.flags(PAGES - 1)];
    let set = |flags: &[Vec<String>; 2]| {
        let set = ["dc", "dd", "mg", "nh", "hg", "nr"];
        flags.clone().map(|it| {
            it.into_iter()
                .filter(|flag| set.contains(&flag.as_str()))
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(set(&after), set(&before));
    equal.check();
}

fn has_ksm() -> bool {
    fs::metadata("/sys/kernel/mm/ksm").is_ok()
}

#[test]
fn memory_bound_to_a_node_is_bound_again_after_an_undo_and_the_store_never_is() {
    let equal = Equal::new();
    equal.write_all();
    if !bind(&equal.range()) {
        eprintln!("skipped: no NUMA in this kernel");
        return;
    }
    let maps_before = maps_of(&equal.range());
    let policies_before = policies(&equal.range());
    assert!(policies_before.iter().all(|it| it.starts_with("bind")));
    assert_eq!(equal.share(), (PAGES, reason::NONE));
    // A policy of an overlay is one of the store's file, which is everybody's.
    let shared = policies(&equal.range());
    assert_eq!(shared, ["default"]);
    equal.vm.sharing.undo_all().unwrap();
    assert_eq!(maps_of(&equal.range()), maps_before);
    assert_eq!(policies(&equal.range()), policies_before);
    equal.check();
}

/// Binds memory to node 0; false without NUMA.
fn bind(range: &std::ops::Range<usize>) -> bool {
    const MPOL_BIND: i32 = 2;
    let nodes = [1_u64];
    // SAFETY: says where pages are to come from, and reads 64 bits.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            range.start,
            range.len(),
            MPOL_BIND,
            nodes.as_ptr(),
            64,
            0,
        )
    };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSYS), "{error}");
    }
    result == 0
}

/// Memory policies of the mappings in `range`.
fn policies(range: &std::ops::Range<usize>) -> Vec<String> {
    let maps = fs::read_to_string("/proc/self/numa_maps").unwrap();
    let policy = |line: &str| {
        let mut words = line.split(' ');
        let start = usize::from_str_radix(words.next()?, 16).ok()?;
        range
            .contains(&start)
            .then(|| words.next().map(str::to_owned))?
    };
    maps.lines().filter_map(policy).collect()
}

#[test]
fn a_child_of_the_vmm_has_its_own_copy_or_none() {
    if !alone("attributes::a_child_of_the_vmm_has_its_own_copy_or_none") {
        return;
    }
    for dont_fork in [false, true] {
        let equal = Equal::new();
        equal.write_all();
        if dont_fork {
            advise(&equal.vm.ram, 0..PAGES, libc::MADV_DONTFORK);
        }
        assert_eq!(equal.share(), (PAGES, reason::NONE));
        let (read, write) = rustix::pipe::pipe().unwrap();
        // SAFETY: the child makes system calls only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let mut byte = 0_u8;
            // The parent has written when it says so.
            // SAFETY: a byte of this stack.
            unsafe { libc::read(read.as_raw_fd(), (&raw mut byte).cast(), 1) };
            // A write of the child's own must not reach the parent or the store.
            equal.vm.ram.word(1, 0).store(0x77, Ordering::Relaxed);
            let sees = equal.vm.ram.word(0, 0).load(Ordering::Relaxed);
            let original = u64::from_ne_bytes(equal.bytes[..8].try_into().unwrap());
            // SAFETY: ends this process and nothing else.
            unsafe { libc::_exit(i32::from(sees != original)) };
        }
        equal.vm.ram.word(0, 0).store(0x55, Ordering::Relaxed);
        rustix::io::write(&write, b"x").unwrap();
        let mut status = 0;
        // SAFETY: a status of this stack.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        if dont_fork {
            assert!(libc::WIFSIGNALED(status), "the child has the memory");
            assert_eq!(libc::WTERMSIG(status), libc::SIGSEGV);
        } else {
            assert!(libc::WIFEXITED(status), "status {status:#x}");
            assert_eq!(
                libc::WEXITSTATUS(status),
                0,
                "the child saw what came later"
            );
        }
        assert_eq!(equal.vm.ram.word(0, 0).load(Ordering::Relaxed), 0x55);
        assert_eq!(equal.vm.ram.read_page(1), &equal.bytes[PAGE..2 * PAGE]);
    }
}
