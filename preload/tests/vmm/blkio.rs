// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Disks by libblkio. The real one need not be here: a library of its name stands for it, and another
//! one for QEMU's block driver, which is a module that has its libraries to itself.

use crate::NoMemory;
use crate::machine::{Machine, PAGES, in_vmm};
use std::ffi::{CStr, CString, c_int, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Calls what it is given as the disk.
const LIBRARY: &str = "
int blkio_map_mem_region(int (*disk)(void), const void *region) { return disk(); }
";
const DRIVER: &str = "
int blkio_map_mem_region(int (*disk)(void), const void *region);
int give_memory(int (*disk)(void)) { return blkio_map_mem_region(disk, 0); }
";

type Disk = extern "C" fn() -> c_int;
type GiveMemory = extern "C" fn(Disk) -> c_int;

fn compile(directory: &Path, name: &str, source: &str, more: &[&str]) {
    let file = directory.join(name).with_extension("c");
    std::fs::write(&file, source).unwrap();
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .arg(directory.join(name))
        .arg(file)
        .args(more)
        .status();
    assert!(compiled.unwrap().success(), "{name}");
}

fn open(library: &Path) -> *mut c_void {
    let library = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: a library without constructors.
    let opened = unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!opened.is_null(), "it cannot be loaded");
    opened
}

/// What the driver does when it is given guest memory.
fn driver(vmm: &Machine) -> GiveMemory {
    let directory = &vmm.directory;
    compile(
        directory,
        "libblkio.so.1",
        LIBRARY,
        &["-Wl,-soname,libblkio.so.1"],
    );
    let rpath = format!("-Wl,-rpath,{}", directory.display());
    let path = directory.join("libblkio.so.1");
    compile(
        directory,
        "driver.so",
        DRIVER,
        &[path.to_str().unwrap(), &rpath],
    );
    let give = symbol(open(&directory.join("driver.so")), c"give_memory");
    // SAFETY: of this type above.
    unsafe { std::mem::transmute::<*mut c_void, GiveMemory>(give) }
}

fn symbol(library: *mut c_void, name: &CStr) -> *mut c_void {
    // SAFETY: a lookup by a valid name.
    let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
    assert!(!symbol.is_null(), "{name:?}");
    symbol
}

static ASKED: AtomicUsize = AtomicUsize::new(0);

/// Answers how much of this process lies on a store while the disk gets it.
extern "C" fn disk() -> c_int {
    ASKED.fetch_add(1, Ordering::Relaxed);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(".pages")).count() as c_int
}

#[test]
fn a_disk_gets_the_memory_that_the_guest_goes_on_with() {
    let name = "blkio::a_disk_gets_the_memory_that_the_guest_goes_on_with";
    in_vmm(name, |vmm| {
        let give = driver(vmm);
        vmm.load();
        vmm.boot();
        vmm.share_all();
        assert!(disk() > 0);
        assert_eq!(give(disk), 0, "the disk has pages of the store");
        assert_eq!(ASKED.load(Ordering::Relaxed), 2);
        vmm.check(0..PAGES);
        assert_eq!((vmm.overlaid(0..PAGES), vmm.share()), (0, 0));
        assert!(vmm.refusal().contains("libblkio"), "{}", vmm.refusal());
    });
}

#[test]
fn a_disk_gets_nothing_when_overlays_cannot_be_undone() {
    let name = "blkio::a_disk_gets_nothing_when_overlays_cannot_be_undone";
    in_vmm(name, |vmm| {
        let give = driver(vmm);
        vmm.load();
        vmm.boot();
        vmm.share_all();
        let limit = NoMemory::from_now_on();
        let refused = give(disk);
        drop(limit);
        assert_eq!(refused, -libc::ENOMEM);
        assert_eq!(ASKED.load(Ordering::Relaxed), 0, "the disk has got memory");
        vmm.check(0..PAGES);
        assert_eq!(give(disk), 0);
        assert_eq!(vmm.overlaid(0..PAGES), 0);
    });
}

#[test]
fn without_libblkio_nothing_ends() {
    in_vmm("blkio::without_libblkio_nothing_ends", |vmm| {
        vmm.load();
        vmm.boot();
        vmm.share_all();
        let map = symbol(libc::RTLD_DEFAULT, c"blkio_map_mem_region");
        // SAFETY: of this type in libblkio's header.
        let map: extern "C" fn(Disk, *const c_void) -> c_int = unsafe { std::mem::transmute(map) };
        assert_eq!(map(disk, std::ptr::null()), -libc::ENOSYS);
        assert!(vmm.is_overlaid(0..PAGES));
        assert_eq!(vmm.refusal(), "");
    });
}
