//! The unit tests once more, with somebody watching: what they read and write is memory that is theirs, and threads do
//! not get in each other's way.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{host_packages::find, process::cargo_program};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watcher {
    AddressSanitizer,
    /// The standard library must have it as well, or all that it does goes unseen.
    ThreadSanitizer,
    /// Interprets them: a hundred times slower, and knows few calls of the kernel.
    Miri,
}

/// Tests that can be run under one, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tests {
    pub(crate) what: &'static str,
    watcher: Watcher,
    packages: &'static [&'static str],
    /// All if there are none.
    only: &'static [&'static str],
    skipped: &'static [&'static str],
    /// For the watcher.
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
pub(crate) const ALL: [Tests; 5] = [
    Tests {
        what: "the host's tests under AddressSanitizer",
        watcher: Watcher::AddressSanitizer,
        packages: &["pagefusion-abi", "pagefusion-fuzz", "pagefusion-host"],
        only: &[],
        skipped: SKIPPED,
        options: "",
    },
    Tests {
        what: "the module's pure parts under AddressSanitizer",
        watcher: Watcher::AddressSanitizer,
        packages: &["pagefusion-module-tests"],
        only: &[],
        // Loom runs many threads on stacks of its own making, which the sanitizer takes for one.
        skipped: &["hand_off"],
        // A session that ends with the machine is forgotten on purpose.
        options: "detect_leaks=0",
    },
    Tests {
        what: "the host's tests under ThreadSanitizer",
        watcher: Watcher::ThreadSanitizer,
        packages: &["pagefusion-host"],
        only: &[],
        skipped: SKIPPED,
        options: "",
    },
    Tests {
        what: "the wire format under Miri",
        watcher: Watcher::Miri,
        packages: &["pagefusion-abi"],
        only: &[],
        skipped: &[],
        options: MIRI,
    },
    Tests {
        what: "the module's small pure parts under Miri",
        watcher: Watcher::Miri,
        packages: &["pagefusion-module-tests"],
        // What is tried on thousands of pages takes it hours.
        only: &[
            "exclude::",
            "fifo::",
            "iomem::",
            "list::",
            "policy::",
            "ranges::",
            "recent::",
            "runs::",
            "sight::",
            "values::",
        ],
        skipped: &[],
        options: MIRI,
    },
];

/// Proptest asks for the directory it is in.
const MIRI: &str = "-Zmiri-disable-isolation";

/// What runs Miri.
const NIGHTLY: [&str; 4] = ["run", "nightly", "cargo", "miri"];

impl Tests {
    /// What is missing here to run them.
    pub(crate) fn missing(&self) -> Option<&'static str> {
        match self.watcher {
            Watcher::AddressSanitizer => None,
            Watcher::ThreadSanitizer if library().is_none() => Some(
                "no source of the standard library: rustup component add rust-src, or RUST_LIB_SRC=DIRECTORY",
            ),
            // Without names nothing can be excepted.
            Watcher::ThreadSanitizer if find("llvm-symbolizer").is_none() => {
                Some("no llvm-symbolizer: apt install llvm")
            }
            Watcher::ThreadSanitizer => None,
            Watcher::Miri if !has_miri() => {
                Some("no Miri: rustup toolchain install nightly --component miri,rust-src")
            }
            Watcher::Miri => None,
        }
    }

    /// Has cargo run them, as a child that `start` makes, and keep what it builds for that below `target`.
    pub(crate) fn command(
        &self,
        start: impl Fn(&OsStr) -> Command,
        checkout: &Path,
        target: &Path,
    ) -> Command {
        let mut command = match self.watcher {
            Watcher::AddressSanitizer => {
                let mut command = start(&cargo_program());
                sanitized(&mut command, "address", target);
                command.env("ASAN_OPTIONS", self.options);
                command
            }
            Watcher::ThreadSanitizer => {
                let mut command = start(&cargo_program());
                sanitized(&mut command, "thread", target);
                // With its whole path, as tests run in the directories of their packages.
                let excepted = checkout.join("xtask/assets/thread-sanitizer");
                let options = format!("{} suppressions={}", self.options, excepted.display());
                command.arg("-Zbuild-std").env("TSAN_OPTIONS", options);
                if let Some(library) = library() {
                    // Where cargo looks in place of the toolchain's own directories.
                    command.env("__CARGO_TESTS_ONLY_SRC_ROOT", library);
                }
                command
            }
            Watcher::Miri => {
                let mut command = start(OsStr::new("rustup"));
                command
                    .args(NIGHTLY)
                    .args(["test", "--no-fail-fast", "--lib", "--tests"])
                    .arg("--target-dir")
                    .arg(target.join("miri"))
                    .env("MIRIFLAGS", self.options)
                    // Of each property, so that all take minutes.
                    .env("PROPTEST_CASES", "4");
                command
            }
        };
        for package in self.packages {
            command.args(["--package", package]);
        }
        command.arg("--").args(self.only);
        for test in self.skipped {
            command.args(["--skip", test]);
        }
        command
    }
}

/// A target that is named has the sanitizer to itself: build scripts and macros, which run inside the compiler, go without.
fn sanitized(command: &mut Command, name: &str, target: &Path) {
    command
        .args(["test", "--no-fail-fast", "--lib", "--bins", "--tests"])
        .args([
            "--target",
            &format!("{}-unknown-linux-gnu", env::consts::ARCH),
        ])
        .arg("--target-dir")
        .arg(target.join(format!("{name}-sanitizer")))
        // Every compiler has the sanitizers; those that are not nightly take the option when they are told to.
        .env("RUSTC_BOOTSTRAP", "1")
        .env(
            "RUSTFLAGS",
            format!("-Zsanitizer={name} -Cforce-frame-pointers=yes"),
        );
}

fn has_miri() -> bool {
    let mut miri = Command::new("rustup");
    miri.args(NIGHTLY).arg("--version");
    let status = miri.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|it| it.success())
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
