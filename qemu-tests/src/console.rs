//! Watches a machine's console for everything that must never appear there.

/// What a kernel prints when something is wrong with it, and what it prints when memory of a process is.
const FATAL: [&str; 21] = [
    "Kernel panic",
    "Oops:",
    "BUG:",
    "kernel BUG at",
    "WARNING:",
    "Call Trace:",
    "soft lockup",
    "hard LOCKUP",
    "blocked for more than",
    "detected stall",
    "detected stalls",
    "KASAN:",
    "UBSAN:",
    "general protection fault",
    "traps: ",
    "segfault at",
    "unable to handle",
    "EXT4-fs error",
    "I/O error",
    "Out of memory:",
    "pf-init: ",
];

/// Lines that look alike and mean nothing.
const HARMLESS: [&str; 2] = ["pf-init: no hardware for", "pf-init: the agent ended: "];

/// The part of `line` that makes it a failure.
pub fn fatal(line: &str) -> Option<&'static str> {
    if HARMLESS.iter().any(|harmless| line.contains(harmless)) {
        return None;
    }
    FATAL.into_iter().find(|pattern| line.contains(pattern))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_trouble_is_fatal() {
        for line in [
            "[   12.3] Kernel panic - not syncing: sysrq triggered crash",
            "[   12.3] BUG: unable to handle page fault for address: ffff",
            "[    5.0] WARNING: CPU: 0 PID: 1 at mm/page_alloc.c:12 foo+0x1/0x2",
            "[    5.0] ------------[ cut here ]------------\n WARNING: mm/memory.c:1",
            "[   60.1] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!",
            "[  242.1] INFO: task kworker/0:1:10 blocked for more than 120 seconds.",
            "[   80.0] rcu: INFO: rcu_preempt self-detected stall on CPU",
            "[   80.0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "[    9.9] BUG: KASAN: use-after-free in foo",
            "[    9.9] postgres[300]: segfault at 0 ip 0 sp 0 error 4 in libc.so.6",
            "[    9.9] EXT4-fs error (device vda): ext4_lookup:1",
            "pf-init: mount ext4 on /newroot: No such device",
        ] {
            assert!(fatal(line).is_some(), "{line}");
        }
    }

    #[test]
    fn an_ordinary_boot_is_not() {
        for line in [
            "[    0.0] Linux version 7.3.4+deb13-cloud-amd64",
            "[    2.0] pagefusion: loading out-of-tree module taints kernel.",
            "[  OK  ] Started postgresql@17-main.service",
            "pf-init: no hardware for kvm_amd.ko",
            "[    0.1] RAS: Correctable Errors collector initialized.",
        ] {
            assert_eq!(fatal(line), None, "{line}");
        }
    }
}
