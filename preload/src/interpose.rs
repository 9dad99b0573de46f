// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The functions that stand before libc's, and what starts the engine.

#![expect(unsafe_code, reason = "symbols of libc, called by C")]

use std::ffi::{CStr, c_int, c_long, c_ulong, c_void};
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use crate::kvm::{self, Watched};
use crate::runtime;

type Ioctl = unsafe extern "C" fn(c_int, c_ulong, *mut c_void) -> c_int;

/// The next definition of a symbol of this type after ours.
///
/// # Safety
///
/// `F` must be the function pointer type of the symbol `name`.
pub(crate) unsafe fn next<F: Copy>(name: &CStr) -> F {
    // SAFETY: by contract.
    let next = unsafe { find_next(name) };
    next.unwrap_or_else(|| panic!("libc has no {name:?}"))
}

/// As [`next`], for what no library need have.
///
/// # Safety
///
/// As [`next`].
pub(crate) unsafe fn find_next<F: Copy>(name: &CStr) -> Option<F> {
    // SAFETY: a lookup by a valid name.
    let symbol = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    assert_eq!(size_of::<F>(), size_of_val(&symbol));
    // SAFETY: a function pointer of this type, by contract.
    (!symbol.is_null()).then(|| unsafe { std::mem::transmute_copy(&symbol) })
}

/// The file of the program or library whose symbol of this name is used.
pub(crate) fn object_of(name: &CStr) -> Option<String> {
    // SAFETY: a lookup by a valid name.
    let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    let mut found = MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: `found` is as large as it must be, and any address may be asked about.
    if symbol.is_null() || unsafe { libc::dladdr(symbol, found.as_mut_ptr()) } == 0 {
        return None;
    }
    // SAFETY: filled above; all zeros are a value, too.
    let file = unsafe { found.assume_init() }.dli_fname;
    // SAFETY: the name of an object that stays loaded, or none.
    let file = (!file.is_null()).then(|| unsafe { CStr::from_ptr(file) });
    file.map(|file| file.to_string_lossy().into_owned())
}

fn next_ioctl() -> Ioctl {
    static NEXT: OnceLock<Ioctl> = OnceLock::new();
    // SAFETY: `int ioctl(int, unsigned long, ...)` with its one argument in a register.
    *NEXT.get_or_init(|| unsafe { next(c"ioctl") })
}

/// Sees KVM's memory slots, and devices that will hold on to guest memory.
///
/// # Safety
///
/// As `ioctl(2)`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    let watched = kvm::classify(request);
    if matches!(watched, Watched::No) || !runtime::is_active() {
        // SAFETY: passed on as it came.
        return unsafe { next_ioctl()(fd, request, argument) };
    }
    match watched {
        Watched::MemoryRegion => {
            // SAFETY: the caller passes a `kvm_userspace_memory_region` or its longer
            // successor, which begins alike; the kernel would read it as well.
            let slot = unsafe { argument.cast::<kvm::MemoryRegion>().read_unaligned() };
            // What goes away is made ordinary before KVM and the VMM let go of it.
            runtime::before_slot(&slot);
            // SAFETY: passed on as it came.
            let result = unsafe { next_ioctl()(fd, request, argument) };
            if result == 0 {
                runtime::after_slot(&slot);
            }
            result
        }
        Watched::PinsMemory(what) => {
            if let Err(error) = runtime::disable(what) {
                return refuse(&error);
            }
            // SAFETY: passed on as it came.
            unsafe { next_ioctl()(fd, request, argument) }
        }
        Watched::RegistersUserfaultfd => {
            // SAFETY: the caller passes a `uffdio_register`, which begins so.
            let range = unsafe { argument.cast::<kvm::UffdRange>().read_unaligned() };
            if let Err(error) = runtime::take_userfaultfd(&range) {
                return refuse(&error);
            }
            // SAFETY: passed on as it came.
            let outcome = Outcome::of(|| unsafe { next_ioctl()(fd, request, argument) });
            if outcome.result != 0 {
                runtime::give_userfaultfd_back(&range);
            }
            outcome.give()
        }
        Watched::UnregistersUserfaultfd => {
            // SAFETY: the caller passes a `uffdio_range`.
            let range = unsafe { argument.cast::<kvm::UffdRange>().read_unaligned() };
            // SAFETY: passed on as it came.
            let result = unsafe { next_ioctl()(fd, request, argument) };
            if result == 0 {
                runtime::give_userfaultfd_back(&range);
            }
            result
        }
        // SAFETY: passed on as it came.
        Watched::No => unsafe { next_ioctl()(fd, request, argument) },
    }
}

/// What a call has returned, and the `errno` that goes with it: what is done before its caller
/// sees that may change it.
pub(crate) struct Outcome {
    result: c_int,
    errno: c_int,
}

impl Outcome {
    pub(crate) fn of(call: impl FnOnce() -> c_int) -> Self {
        let result = call();
        Self {
            result,
            errno: std::io::Error::last_os_error().raw_os_error().unwrap_or(0),
        }
    }

    pub(crate) fn give(self) -> c_int {
        if self.result == -1 {
            set_errno(self.errno);
        }
        self.result
    }
}

fn set_errno(value: c_int) {
    // SAFETY: where the calling thread's own errno is.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { *errno = value };
}

/// Fails a call of the VMM: overlays could not be undone, and going on would let a guest read
/// what is not its own.
pub(crate) fn refuse(error: &std::io::Error) -> c_int {
    log::error!("a request of the VMM is refused, since overlays cannot be undone: {error}");
    set_errno(libc::ENOMEM);
    -1
}

extern "C" fn start(_argc: c_int, _argv: *const *const i8, _env: *const *const i8) {
    runtime::start();
}

/// Runs when the library is loaded, before the VMM's own `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn(c_int, *const *const i8, *const *const i8) = start;

const _: () = assert!(size_of::<c_long>() == 8, "64-bit hosts only");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_failed_has_its_own_errno_whatever_was_done_since() {
        let outcome = Outcome::of(|| {
            set_errno(libc::EAGAIN);
            -1
        });
        set_errno(libc::EBADF);
        let result = outcome.give();
        let errno = std::io::Error::last_os_error().raw_os_error();
        assert_eq!((result, errno), (-1, Some(libc::EAGAIN)));
    }

    #[test]
    fn a_call_that_succeeded_sets_no_errno() {
        set_errno(libc::EAGAIN);
        let outcome = Outcome::of(|| 0);
        set_errno(libc::EBADF);
        let result = outcome.give();
        let errno = std::io::Error::last_os_error().raw_os_error();
        assert_eq!((result, errno), (0, Some(libc::EBADF)));
    }
}
