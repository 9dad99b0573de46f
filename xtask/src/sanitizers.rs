//! The unit tests once more, under sanitizers: what they read and write is memory that is theirs, and threads do not
//! get in each other's way.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use crate::host_packages::find;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sanitizer {
    Address,
    /// The standard library must have it as well, or all that it does goes unseen.
    Thread,
}

/// Tests that can be run under one, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tests {
    pub(crate) what: &'static str,
    sanitizer: Sanitizer,
    packages: &'static [&'static str],
    skipped: &'static [&'static str],
    /// For the sanitizer.
    options: &'static str,
}

/// What a process has mapped or locked, what its child has, or how much memory it takes: sanitizers map terabytes of
/// their own.
const SKIPPED: &[&str] = &[
    "locked_memory_is_refused_by_name",
    "memory_is_refused_when_overlays_would_be_locked",
    "memory_that_is_being_changed",
    "a_child_of_the_vmm",
    "a_page_that_only_one_vm_has",
];

/// The library in QEMU is not among them: it is loaded by programs that know of no sanitizer.
pub(crate) const ALL: [Tests; 3] = [
    Tests {
        what: "the host's tests under AddressSanitizer",
        sanitizer: Sanitizer::Address,
        packages: &["pagefusion-abi", "pagefusion-fuzz", "pagefusion-host"],
        skipped: SKIPPED,
        options: "",
    },
    Tests {
        what: "the module's pure parts under AddressSanitizer",
        sanitizer: Sanitizer::Address,
        packages: &["pagefusion-module-tests"],
        // Loom runs many threads on stacks of its own making, which the sanitizer takes for one.
        skipped: &["hand_off"],
        // A session that ends with the machine is forgotten on purpose.
        options: "detect_leaks=0",
    },
    Tests {
        what: "the host's tests under ThreadSanitizer",
        sanitizer: Sanitizer::Thread,
        packages: &["pagefusion-host"],
        skipped: SKIPPED,
        options: "",
    },
];

impl Tests {
    /// What is missing here to run them.
    pub(crate) fn missing(&self) -> Option<&'static str> {
        if self.sanitizer == Sanitizer::Address {
            return None;
        }
        if library().is_none() {
            return Some(
                "no source of the standard library: rustup component add rust-src, or RUST_LIB_SRC=DIRECTORY",
            );
        }
        // Without names nothing can be excepted.
        let none = find("llvm-symbolizer").is_none();
        none.then_some("no llvm-symbolizer: apt install llvm")
    }

    /// Has `cargo` run them, and keep what it builds for that below `target`. A target that is named has the sanitizer to
    /// itself: build scripts and macros, which run inside the compiler, go without.
    pub(crate) fn command(&self, mut cargo: Command, checkout: &Path, target: &Path) -> Command {
        cargo.args(["test", "--no-fail-fast", "--lib", "--bins", "--tests"]);
        for package in self.packages {
            cargo.args(["--package", package]);
        }
        let arch = env::consts::ARCH;
        let (name, variable, options) = match self.sanitizer {
            Sanitizer::Address => ("address", "ASAN_OPTIONS", self.options.to_owned()),
            Sanitizer::Thread => {
                // With its whole path, as tests run in the directories of their packages.
                let excepted = checkout.join("xtask/assets/thread-sanitizer");
                let options = format!("{} suppressions={}", self.options, excepted.display());
                ("thread", "TSAN_OPTIONS", options)
            }
        };
        cargo
            .args(["--target", &format!("{arch}-unknown-linux-gnu")])
            .arg("--target-dir")
            .arg(target.join(format!("{name}-sanitizer")))
            // Every compiler has the sanitizers; those that are not nightly take the option when they are told to.
            .env("RUSTC_BOOTSTRAP", "1")
            .env(
                "RUSTFLAGS",
                format!("-Zsanitizer={name} -Cforce-frame-pointers=yes"),
            )
            .env(variable, options);
        if self.sanitizer == Sanitizer::Thread {
            cargo.arg("-Zbuild-std");
            if let Some(library) = library() {
                // Where cargo looks in place of the toolchain's own directories.
                cargo.env("__CARGO_TESTS_ONLY_SRC_ROOT", library);
            }
        }
        cargo.arg("--");
        for test in self.skipped {
            cargo.args(["--skip", test]);
        }
        cargo
    }
}

/// Source of the standard library: what `RUST_LIB_SRC` says, as when a kernel is built, or what came with the compiler.
fn library() -> Option<PathBuf> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let sysroot = || {
        let output = Command::new(rustc).args(["--print", "sysroot"]).output();
        let text = String::from_utf8(output.ok()?.stdout).ok()?;
        Some(Path::new(text.trim()).join("lib/rustlib/src/rust/library"))
    };
    let named = env::var_os("RUST_LIB_SRC").map(PathBuf::from);
    named
        .or_else(sysroot)
        .filter(|it| it.join("std/Cargo.toml").is_file())
}
