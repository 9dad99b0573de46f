// SPDX-License-Identifier: Apache-2.0 OR MIT

//! libblkio, through which QEMU's `blkio` drivers reach disks. Memory that it is given may be registered
//! with the kernel (`io_uring`) or with a device, and neither looks at page tables again.

#![expect(unsafe_code, reason = "a symbol of libblkio, called by C")]

use std::ffi::{CStr, c_int, c_void};

use crate::interpose::find_next;
use crate::runtime;

type MapRegion = unsafe extern "C" fn(*mut c_void, *const c_void) -> c_int;

const LIBRARY: &CStr = c"libblkio.so.1";
const SYMBOL: &CStr = c"blkio_map_mem_region";

/// The real function, if there is one. Not kept: the library may come later.
fn next() -> Option<MapRegion> {
    // SAFETY: the type is that of libblkio's header.
    let linked = unsafe { find_next::<MapRegion>(SYMBOL) };
    linked.or_else(|| {
        // A block driver that QEMU loads as a module has its libraries to itself.
        let flags = libc::RTLD_LAZY | libc::RTLD_NOLOAD;
        // SAFETY: finds the library if it is loaded, and loads nothing; it stays as long as its caller.
        let library = unsafe { libc::dlopen(LIBRARY.as_ptr(), flags) };
        if library.is_null() {
            return None;
        }
        // SAFETY: a lookup by a valid name in a library that is there.
        let symbol = unsafe { libc::dlsym(library, SYMBOL.as_ptr()) };
        // SAFETY: opened above; whoever calls us has it open as well.
        unsafe { libc::dlclose(library) };
        // SAFETY: as above.
        (!symbol.is_null())
            .then(|| unsafe { std::mem::transmute::<*mut c_void, MapRegion>(symbol) })
    })
}

/// Sees guest memory that a `blkio` driver is about to register, and ends sharing before.
///
/// # Safety
///
/// As `blkio_map_mem_region` of libblkio.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn blkio_map_mem_region(
    blkio: *mut c_void,
    region: *const c_void,
) -> c_int {
    let Some(next) = next() else {
        return -libc::ENOSYS;
    };
    if runtime::is_active() {
        let what = "a disk is reached by libblkio, which holds guest pages";
        if let Err(error) = runtime::disable(what) {
            crate::interpose::refuse(&error);
            return -libc::ENOMEM;
        }
    }
    // SAFETY: passed on as it came.
    unsafe { next(blkio, region) }
}
