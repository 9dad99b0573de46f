// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Stands for a kernel that has a device which this machine has not: looks on when the VMM makes
//! a certain system call, and answers in the kernel's place.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, Sender};

/// What was seen of one call.
pub(crate) type Seen<T> = Receiver<T>;

/// From now on `ioctl`s of this thread with this request are answered with 0, each after `look`.
pub(crate) fn answer_ioctl<T: Send + 'static>(
    request: u32,
    look: impl Fn() -> T + Send + 'static,
) -> Seen<T> {
    let (give_listener, take_listener): (Sender<OwnedFd>, _) = mpsc::channel();
    let (seen, sees) = mpsc::channel();
    // Born before the filter, so that its own calls are answered by the kernel.
    std::thread::spawn(move || {
        let listener = take_listener.recv().unwrap();
        loop {
            let Ok(call) = receive(&listener) else { return };
            let _ = seen.send(look());
            if answer(&listener, call).is_err() {
                return;
            }
        }
    });
    give_listener.send(install(request)).unwrap();
    sees
}

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const SECOND_ARGUMENT: u32 = 16 + 8;

fn install(request: u32) -> OwnedFd {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
    let load = |offset| statement(BPF_LD | BPF_W | BPF_ABS, offset, 0);
    let unless = |value, skip| statement(BPF_JMP | BPF_JEQ | BPF_K, value, skip);
    let end = |action| statement(BPF_RET | BPF_K, action, 0);
    let mut filter = [
        load(NUMBER),
        unless(libc::SYS_ioctl as u32, 3),
        load(SECOND_ARGUMENT),
        unless(request, 1),
        end(libc::SECCOMP_RET_USER_NOTIF),
        end(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: this thread promises to gain no privileges.
    let promised = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(promised, 0);
    // SAFETY: the kernel reads the program, which lives until it has.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    assert!(listener >= 0, "{}", io::Error::last_os_error());
    // SAFETY: a descriptor the kernel has just made.
    unsafe { OwnedFd::from_raw_fd(listener as i32) }
}

/// One instruction; a comparison that fails skips `skip` others.
fn statement(code: u32, value: u32, skip: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: skip,
        k: value,
    }
}

fn receive(listener: &OwnedFd) -> io::Result<u64> {
    // SAFETY: plain numbers, for which zero is a value; the kernel wants zeros.
    let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes a structure of this type.
    let result = unsafe {
        libc::syscall(
            libc::SYS_ioctl,
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_RECV,
            &raw mut call,
        )
    };
    if result == 0 {
        Ok(call.id)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn answer(listener: &OwnedFd, id: u64) -> io::Result<()> {
    let mut response = libc::seccomp_notif_resp {
        id,
        val: 0,
        error: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads a structure of this type.
    let result = unsafe {
        libc::syscall(
            libc::SYS_ioctl,
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SEND,
            &raw mut response,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
