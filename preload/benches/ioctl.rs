// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What interposition adds to an `ioctl` of the VMM.
//!
//! This program runs itself with and without the library before libc, in turns; each time it
//! calls `ioctl(-1, KVM_RUN)`, which the kernel refuses at once, so that little but the way
//! there is measured. The least of many parts counts: what other programs take is in none of it.

#![expect(unsafe_code, reason = "calls ioctl as C does")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const CALLS: u32 = 20_000;
const PARTS: usize = 200;
const ROUNDS: usize = 11;
/// `KVM_RUN`, by far the most frequent of a VMM.
const KVM_RUN: libc::c_ulong = 0xae80;

/// Nanoseconds of one call.
fn measure() -> f64 {
    let mut least = f64::MAX;
    for _ in 0..PARTS {
        let start = Instant::now();
        for _ in 0..CALLS {
            // SAFETY: no such descriptor: the kernel refuses, and looks at no argument.
            let refused = unsafe { libc::ioctl(-1, KVM_RUN, 0) };
            assert_eq!(refused, -1);
        }
        least = least.min(start.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS));
    }
    least
}

fn library() -> PathBuf {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let built = Command::new(env!("CARGO"))
        .args(["build", "--release", "--lib", "--manifest-path", manifest])
        .status()
        .expect("cargo");
    assert!(built.success(), "the library is built");
    // Beside `deps`, where this program is.
    let program = std::env::current_exe().expect("this program");
    let target = program.parent().and_then(Path::parent).expect("target");
    target.join("libpagefusion_preload.so")
}

fn child(preload: Option<&Path>) -> f64 {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.arg("measure");
    if let Some(library) = preload {
        command.env("LD_PRELOAD", library);
    }
    let output = command.output().expect("this program runs");
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().expect("nanoseconds")
}

fn main() {
    if std::env::args().nth(1).as_deref() == Some("measure") {
        println!("{}", measure());
        return;
    }
    let library = library();
    let mut rounds: Vec<(f64, f64)> = (0..ROUNDS)
        .map(|_| (child(None), child(Some(&library))))
        .collect();
    rounds.sort_by(|a, b| (a.1 - a.0).total_cmp(&(b.1 - b.0)));
    let cost = |(plain, interposed): (f64, f64)| interposed - plain;
    let (plain, interposed) = rounds[ROUNDS / 2];
    println!(
        "ioctl: {plain:.1} ns, interposed {interposed:.1} ns; {:.1} ns more ({:.1} to {:.1}) in {ROUNDS} rounds",
        cost(rounds[ROUNDS / 2]),
        cost(rounds[0]),
        cost(rounds[ROUNDS - 1]),
    );
}
