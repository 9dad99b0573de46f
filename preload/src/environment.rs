// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the VMM's children should not inherit.

#![expect(unsafe_code, reason = "changes the environment before main")]

use std::env;

/// Takes our variables out of the environment, and our library out of `LD_PRELOAD`.
pub(crate) fn forget() {
    let rest = env::var("LD_PRELOAD").ok().map(|all| {
        let foreign = |part: &&str| !part.contains("libpagefusion_preload");
        all.split([':', ' '])
            .filter(foreign)
            .collect::<Vec<_>>()
            .join(":")
    });
    // SAFETY: this runs before the VMM's main, on the only thread of the process.
    unsafe {
        env::remove_var("PAGEFUSION_ENGINE_SOCKET");
    }
    // SAFETY: as above.
    unsafe {
        env::remove_var("PAGEFUSION_QMP_SOCKET");
    }
    match rest.filter(|rest| !rest.is_empty()) {
        // SAFETY: as above.
        Some(rest) => unsafe { env::set_var("LD_PRELOAD", rest) },
        // SAFETY: as above.
        None => unsafe { env::remove_var("LD_PRELOAD") },
    }
}
