// SPDX-License-Identifier: Apache-2.0 OR MIT

//! VMMs send signals to their threads and expect to handle them: our threads take none.

#![expect(unsafe_code, reason = "signal masks")]

use std::mem::MaybeUninit;
use std::ptr;

/// Runs `start` with every signal blocked, so that threads it starts are born that way.
pub(crate) fn without<T>(start: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: fills the set.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: `all` was filled; `before` is filled by the call, which cannot fail so.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
    let result = start();
    // SAFETY: `before` was filled above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut()) };
    result
}
