//! The unit tests once more, under AddressSanitizer: what they read and write is memory that is theirs.

use std::{path::Path, process::Command};

/// Tests that can be run under it, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tests {
    pub(crate) what: &'static str,
    packages: &'static [&'static str],
    skipped: &'static [&'static str],
    /// For the sanitizer.
    options: &'static str,
}

/// The library in QEMU is not among them: it is loaded by programs that know of no sanitizer.
pub(crate) const ALL: [Tests; 2] = [
    Tests {
        what: "the host's tests under AddressSanitizer",
        packages: &["pagefusion-abi", "pagefusion-fuzz", "pagefusion-host"],
        // What a process has mapped or locked, or how much memory it takes: the sanitizer maps terabytes of its own.
        skipped: &[
            "locked_memory_is_refused_by_name",
            "memory_is_refused_when_overlays_would_be_locked",
            "memory_that_is_being_changed",
            "a_child_of_the_vmm",
            "a_page_that_only_one_vm_has",
        ],
        options: "",
    },
    Tests {
        what: "the module's pure parts under AddressSanitizer",
        packages: &["pagefusion-module-tests"],
        // Loom runs many threads on stacks of its own making, which the sanitizer takes for one.
        skipped: &["hand_off"],
        // A session that ends with the machine is forgotten on purpose.
        options: "detect_leaks=0",
    },
];

impl Tests {
    /// Has `cargo` run them, and keep what it builds for that below `target`. A target that is named has the sanitizer to
    /// itself: build scripts and macros, which run inside the compiler, go without.
    pub(crate) fn command(&self, mut cargo: Command, target: &Path) -> Command {
        cargo.args(["test", "--no-fail-fast", "--lib", "--bins", "--tests"]);
        for package in self.packages {
            cargo.args(["--package", package]);
        }
        let arch = std::env::consts::ARCH;
        cargo
            .args(["--target", &format!("{arch}-unknown-linux-gnu")])
            .arg("--target-dir")
            .arg(target.join("address-sanitizer"))
            // Every compiler has the sanitizers; those that are not nightly take the option when they are told to.
            .env("RUSTC_BOOTSTRAP", "1")
            .env(
                "RUSTFLAGS",
                "-Zsanitizer=address -Cforce-frame-pointers=yes",
            )
            .env("ASAN_OPTIONS", self.options)
            .arg("--");
        for test in self.skipped {
            cargo.args(["--skip", test]);
        }
        cargo
    }
}
