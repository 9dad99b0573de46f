// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `userfaultfd` for write protection and for filling in memory without a gap.

#![expect(unsafe_code, reason = "ioctls of userfaultfd")]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode, opcode};

/// `UFFD_API`
const API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;

/// What the engine needs, and what goes wrong without it.
const FEATURES: [(u64, &str); 4] = [
    (FEATURE_PAGEFAULT_FLAG_WP, "write protection (Linux 5.7)"),
    (FEATURE_EVENT_REMAP, "remap events (Linux 4.11)"),
    (
        FEATURE_WP_HUGETLBFS_SHMEM,
        "write protection of shared memory (Linux 5.19)",
    ),
    (
        FEATURE_WP_UNPOPULATED,
        "write protection of unpopulated pages (Linux 6.4)",
    ),
];

/// `_UFFDIO_REGISTER`, `_UFFDIO_UNREGISTER`, `_UFFDIO_WAKE`, `_UFFDIO_COPY`,
/// `_UFFDIO_ZEROPAGE`, `_UFFDIO_WRITEPROTECT`
const REGISTER: u8 = 0x00;
const UNREGISTER: u8 = 0x01;
const WAKE: u8 = 0x02;
const COPY: u8 = 0x03;
const ZEROPAGE: u8 = 0x04;
const WRITEPROTECT: u8 = 0x06;
const API_NR: u8 = 0x3f;
const GROUP: u8 = 0xaa;

const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMAP: u8 = 0x14;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

// The kernel's ABI, derived again: a wrong size would be a wrong ioctl number.
const _: () = {
    assert!(size_of::<UffdioApi>() == 24);
    assert!(size_of::<UffdioRange>() == 16);
    assert!(size_of::<UffdioRegister>() == 32);
    assert!(size_of::<UffdioCopy>() == 40);
    assert!(size_of::<UffdioZeropage>() == 32);
    assert!(size_of::<UffdioWriteprotect>() == 24);
    assert!(opcode::read_write::<UffdioApi>(GROUP, API_NR) == 0xc018_aa3f);
    assert!(opcode::read_write::<UffdioRegister>(GROUP, REGISTER) == 0xc020_aa00);
    assert!(opcode::read::<UffdioRange>(GROUP, UNREGISTER) == 0x8010_aa01);
    assert!(opcode::read::<UffdioRange>(GROUP, WAKE) == 0x8010_aa02);
    assert!(opcode::read_write::<UffdioCopy>(GROUP, COPY) == 0xc028_aa03);
    assert!(opcode::read_write::<UffdioZeropage>(GROUP, ZEROPAGE) == 0xc020_aa04);
    assert!(opcode::read_write::<UffdioWriteprotect>(GROUP, WRITEPROTECT) == 0xc018_aa06);
};

/// `USERFAULTFD_IOC_NEW`
const DEVICE_NEW: Opcode = opcode::none(GROUP, 0x00);

/// An ioctl that takes a pointer to `T` and answers in it.
struct Updating<'a, T>(Opcode, &'a mut T);

// SAFETY: every opcode above is paired with the structure the kernel reads and writes for it;
// the output is what the structure holds afterwards.
unsafe impl<T> Ioctl for Updating<'_, T> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.0
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.1).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// `USERFAULTFD_IOC_NEW`: flags by value, a descriptor back.
struct New(usize);

// SAFETY: the argument is a plain integer and the kernel answers with a new descriptor.
unsafe impl Ioctl for New {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        DEVICE_NEW
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0)
    }

    unsafe fn output_from_ptr(fd: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the ioctl succeeded, so this is a descriptor nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Why write protection is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// Neither the device nor the system call works.
    #[error(
        "no userfaultfd ({0}): let the daemon open /dev/userfaultfd, or set \
         vm.unprivileged_userfaultfd=1"
    )]
    Open(#[source] io::Error),
    /// The kernel is too old.
    #[error("this kernel's userfaultfd lacks {0}")]
    Feature(&'static str),
    /// Another error.
    #[error("userfaultfd: {0}")]
    Io(#[from] io::Error),
}

/// What the kernel has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread waits at this address.
    Fault(usize),
    /// Memory was moved.
    Remap,
    /// Something else.
    Other,
}

/// A `userfaultfd` of this process, kernel faults included (KVM and vhost fault there).
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Opens one through `device` (`/dev/userfaultfd`) if given, else by the system call, and
    /// verifies that the kernel grants what a correct overlay needs.
    pub fn open(device: Option<BorrowedFd<'_>>) -> Result<Self, UffdError> {
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as usize;
        let fd = match device {
            // SAFETY: `New` is the ioctl of this device; on any other descriptor it fails.
            Some(device) => unsafe { ioctl::ioctl(device, New(flags)) },
            // SAFETY: creates a descriptor; does nothing to memory until ranges are registered.
            None => unsafe {
                rustix::mm::userfaultfd(
                    rustix::mm::UserfaultfdFlags::CLOEXEC | rustix::mm::UserfaultfdFlags::NONBLOCK,
                )
            },
        }
        .map_err(|e| UffdError::Open(e.into()))?;
        let uffd = Self { fd };
        let wanted = FEATURES.iter().fold(0, |all, (bit, _)| all | bit);
        let mut api = UffdioApi {
            api: API,
            features: wanted,
            ioctls: 0,
        };
        let asked = uffd.call(opcode::read_write::<UffdioApi>(GROUP, API_NR), &mut api);
        if asked.is_err() {
            // A kernel that lacks one refuses all and says what it has.
            let has = api.features;
            let missing = FEATURES.iter().find(|(bit, _)| has & bit == 0);
            if let Some((_, name)) = missing {
                return Err(UffdError::Feature(name));
            }
        }
        asked.map_err(io::Error::from)?;
        match FEATURES.iter().find(|(bit, _)| api.features & bit == 0) {
            Some((_, name)) => Err(UffdError::Feature(name)),
            None => Ok(uffd),
        }
    }

    pub(super) fn from_owned(fd: OwnedFd) -> Self {
        Self { fd }
    }

    fn call<T>(&self, opcode: Opcode, argument: &mut T) -> rustix::io::Result<()> {
        // SAFETY: the callers below pair opcodes with their structures. The ioctls change
        // protection and waiting of pages, never what this process may assume of Rust memory:
        // `copy` is the one that writes, and has a contract of its own.
        unsafe { ioctl::ioctl(&self.fd, Updating(opcode, argument)) }
    }

    fn register_mode(&self, range: &Range<usize>, mode: u64) -> rustix::io::Result<()> {
        let mut register = UffdioRegister {
            range: to_range(range),
            mode,
            ioctls: 0,
        };
        self.call(
            opcode::read_write::<UffdioRegister>(GROUP, REGISTER),
            &mut register,
        )
    }

    /// Makes `range` able to be write-protected.
    pub fn register(&self, range: &Range<usize>) -> rustix::io::Result<()> {
        self.register_mode(range, REGISTER_MODE_WP)
    }

    /// As [`Uffd::register`]; besides, threads that touch a page of `range` that is not there
    /// wait for [`Uffd::copy`] or [`Uffd::zero`].
    pub fn register_missing(&self, range: &Range<usize>) -> rustix::io::Result<()> {
        self.register_mode(range, REGISTER_MODE_MISSING | REGISTER_MODE_WP)
    }

    /// Undoes [`Uffd::register`].
    pub fn unregister(&self, range: &Range<usize>) -> rustix::io::Result<()> {
        self.call(
            opcode::read::<UffdioRange>(GROUP, UNREGISTER),
            &mut to_range(range),
        )
    }

    /// Stops writers to `range` until [`Uffd::unprotect`], or until the memory is replaced
    /// and [`Uffd::wake`] is called.
    pub fn protect(&self, range: &Range<usize>) -> rustix::io::Result<()> {
        self.write_protect(range, WRITEPROTECT_MODE_WP)
    }

    /// Lifts the protection and wakes who waits.
    pub fn unprotect(&self, range: &Range<usize>) -> rustix::io::Result<()> {
        self.write_protect(range, 0)
    }

    fn write_protect(&self, range: &Range<usize>, mode: u64) -> rustix::io::Result<()> {
        let request = opcode::read_write::<UffdioWriteprotect>(GROUP, WRITEPROTECT);
        loop {
            let mut protect = UffdioWriteprotect {
                range: to_range(range),
                mode,
            };
            match self.call(request, &mut protect) {
                // The address space is being remapped by somebody; the event is on its way.
                Err(Errno::AGAIN) => std::thread::yield_now(),
                other => return other,
            }
        }
    }

    /// Wakes the threads that wait for `range`; they fault again.
    pub fn wake(&self, range: &Range<usize>) -> rustix::io::Result<()> {
        self.call(
            opcode::read::<UffdioRange>(GROUP, WAKE),
            &mut to_range(range),
        )
    }

    /// Puts `bytes` at `address`, each page at once, and wakes who waits for them.
    ///
    /// # Safety
    ///
    /// `address` must be page-aligned guest memory that no Rust reference points into.
    pub unsafe fn copy(&self, address: usize, bytes: &[u8]) -> rustix::io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let mut copy = UffdioCopy {
                dst: (address + done) as u64,
                src: bytes[done..].as_ptr() as u64,
                len: (bytes.len() - done) as u64,
                mode: 0,
                copy: 0,
            };
            match self.call(opcode::read_write::<UffdioCopy>(GROUP, COPY), &mut copy) {
                Ok(()) => return Ok(()),
                // Part of it was copied, or the address space was in motion.
                Err(Errno::AGAIN) => {
                    done += usize::try_from(copy.copy).unwrap_or(0);
                    std::thread::yield_now();
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Fills pages of `range` that are not there with zeros, as the kernel would, and wakes
    /// who waits for them. Fails with `EEXIST` where there is one already.
    pub fn zero(&self, range: &Range<usize>) -> rustix::io::Result<()> {
        let mut zero = UffdioZeropage {
            range: to_range(range),
            mode: 0,
            zeropage: 0,
        };
        self.call(
            opcode::read_write::<UffdioZeropage>(GROUP, ZEROPAGE),
            &mut zero,
        )
    }

    /// The next event, `None` when there is none now.
    pub fn next_event(&self) -> io::Result<Option<Event>> {
        /// `struct uffd_msg`: event in byte 0, of a fault the address in bytes 16 to 23.
        const MESSAGE: usize = 32;
        let mut message = [0_u8; MESSAGE];
        match rustix::io::read(&self.fd, &mut message) {
            Ok(MESSAGE) => {}
            Ok(n) => return Err(io::Error::other(format!("userfaultfd gave {n} bytes"))),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        let mut address = [0; 8];
        address.copy_from_slice(&message[16..24]);
        Ok(Some(match message[0] {
            EVENT_PAGEFAULT => Event::Fault(u64::from_ne_bytes(address) as usize),
            EVENT_REMAP => Event::Remap,
            _ => Event::Other,
        }))
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn to_range(range: &Range<usize>) -> UffdioRange {
    UffdioRange {
        start: range.start as u64,
        len: range.len() as u64,
    }
}

/// Whether the kernel of this release may lift the protection of a page of zeros by itself: when
/// Linux 6.12 to 6.17 splits a large folio it puts the one page of zeros that all have in the place
/// of such a page, and loses the mark (mended by "mm/rmap: fix soft-dirty and uffd-wp bit loss when
/// remapping zero-filled mTHP subpage to shared zeropage").
pub(super) fn zeros_lose_protection(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next().and_then(|it| it.parse::<u32>().ok());
    let (major, minor) = (next(), next());
    major == Some(6) && minor.is_some_and(|minor| (12..18).contains(&minor))
}

#[cfg(test)]
mod tests {
    use super::zeros_lose_protection;

    #[test]
    fn kernels_that_lift_protection_of_zeros_are_known_by_their_release() {
        let affected = ["6.12.1", "6.12.57+deb13-amd64", "6.17-rc1"];
        assert!(affected.into_iter().all(zeros_lose_protection));
        let others = [
            "6.11.9",
            "6.1.0-41-amd64",
            "6.18.44",
            "7.3.4",
            "5.15",
            "",
            "x",
        ];
        assert!(!others.into_iter().any(zeros_lose_protection));
    }
}
