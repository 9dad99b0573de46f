// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whether this process is the VMM, and what its children should not inherit.

#![expect(unsafe_code, reason = "changes the environment before main")]

use std::env;
use std::ffi::CStr;
use std::fs;

/// Programs that only start others. A script that ends with `exec qemu-system-x86_64 …` is one of
/// them until then, in the process that will be the VMM.
const STARTERS: [&str; 30] = [
    "ash",
    "bash",
    "bwrap",
    "busybox",
    "capsh",
    "cgexec",
    "choom",
    "chpst",
    "chroot",
    "chrt",
    "dash",
    "env",
    "ionice",
    "ip",
    "ksh",
    "nice",
    "nohup",
    "nsenter",
    "numactl",
    "prlimit",
    "setarch",
    "setpriv",
    "setsid",
    "sh",
    "softlimit",
    "stdbuf",
    "systemd-run",
    "taskset",
    "unshare",
    "zsh",
];
/// The same, with a version behind the name.
const STARTERS_OF_VERSIONS: [&str; 2] = ["perl", "python"];

/// Whether this process is the one that was registered as VMM, and is it already. What it starts
/// before that is not, and leaves everything as it is.
pub(crate) fn is_vmm() -> bool {
    let registered = env::var("PAGEFUSION_PROCESS").ok();
    let exe = fs::read_link("/proc/self/exe").unwrap_or_default();
    let name = exe.file_name().unwrap_or_default().to_string_lossy();
    let process = std::process::id();
    if let Some(why) = reason_for_operator(registered.as_deref(), process, &name) {
        eprintln!("pagefusion is off for this VM: {why}");
    }
    is_vmm_by(registered.as_deref(), process, &name)
}

/// A QEMU that will share nothing, which nobody would notice otherwise.
fn reason_for_operator(registered: Option<&str>, process: u32, name: &str) -> Option<String> {
    let registered = registered?;
    (name.starts_with("qemu-system") && registered != process.to_string()).then(|| {
        format!(
            "it is process {process}, and process {registered} was registered, which has started it; \
             have that become QEMU instead (exec)"
        )
    })
}

fn is_vmm_by(registered: Option<&str>, process: u32, name: &str) -> bool {
    let is_registered = registered.is_none_or(|it| it == process.to_string());
    let is_starter =
        STARTERS.contains(&name) || STARTERS_OF_VERSIONS.iter().any(|it| name.starts_with(it));
    is_registered && !is_starter
}

/// Allocators whose calls for memory come to this library: they are made with the allocator's
/// locks held, which the engine may wait for with its own. glibc's go to the kernel directly.
const ALLOCATORS: [(&CStr, &str); 3] = [
    (c"mallctl", "jemalloc"),
    (c"tc_version", "tcmalloc"),
    (c"mi_version", "mimalloc"),
];

/// The allocator of this process, if it is not glibc's. `object_of` finds where symbols are.
pub(crate) fn allocator(object_of: impl Fn(&CStr) -> Option<String>) -> Option<String> {
    if let Some((_, name)) = ALLOCATORS.iter().find(|(it, _)| object_of(it).is_some()) {
        return Some((*name).to_owned());
    }
    let libc = object_of(c"__libc_start_main");
    [c"malloc", c"free"]
        .into_iter()
        .map(&object_of)
        .find(|it| *it != libc)
        .map(|it| it.unwrap_or_else(|| "unknown".to_owned()))
}

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
    // SAFETY: as above.
    unsafe {
        env::remove_var("PAGEFUSION_PROCESS");
    }
    match rest.filter(|rest| !rest.is_empty()) {
        // SAFETY: as above.
        Some(rest) => unsafe { env::set_var("LD_PRELOAD", rest) },
        // SAFETY: as above.
        None => unsafe { env::remove_var("LD_PRELOAD") },
    }
}

#[cfg(test)]
mod tests {
    use super::{allocator, is_vmm_by, reason_for_operator};

    #[test]
    fn allocators_that_call_through_the_library_are_told_by_their_symbols() {
        assert_eq!(allocator(crate::interpose::object_of), None);
        let with = |name, object: &'static str| {
            allocator(move |it| match it.to_str() {
                Ok(it) if it == name => Some(object.to_owned()),
                Ok("malloc" | "free" | "__libc_start_main") => Some("libc.so.6".to_owned()),
                _ => None,
            })
        };
        assert_eq!(with("mallctl", "qemu").as_deref(), Some("jemalloc"));
        assert_eq!(with("tc_version", "tc.so").as_deref(), Some("tcmalloc"));
        assert_eq!(
            with("malloc", "hardened.so").as_deref(),
            Some("hardened.so")
        );
        assert_eq!(with("free", "hardened.so").as_deref(), Some("hardened.so"));
    }

    #[test]
    fn a_qemu_that_was_only_started_by_the_registered_process_says_why_it_shares_nothing() {
        let why = reason_for_operator(Some("17"), 18, "qemu-system-x86_64").unwrap();
        assert!(
            why.contains("process 18, and process 17 was registered"),
            "{why}"
        );
        assert_eq!(
            reason_for_operator(Some("17"), 17, "qemu-system-x86_64"),
            None
        );
        assert_eq!(reason_for_operator(None, 18, "qemu-system-x86_64"), None);
        assert_eq!(reason_for_operator(Some("17"), 18, "true"), None);
    }

    #[test]
    fn a_vmm_is_what_was_registered_and_starts_nobody_else() {
        assert!(is_vmm_by(Some("17"), 17, "qemu-system-x86_64"));
        assert!(is_vmm_by(None, 17, "qemu-system-x86_64"));
        assert!(!is_vmm_by(Some("17"), 18, "qemu-system-x86_64"));
        for starter in ["dash", "taskset", "python3.13"] {
            assert!(!is_vmm_by(Some("17"), 17, starter), "{starter}");
            assert!(!is_vmm_by(None, 17, starter), "{starter}");
        }
    }
}
