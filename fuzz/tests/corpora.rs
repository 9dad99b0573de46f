// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the fuzzers have found worth keeping, and inputs like it, without a fuzzer.

use std::fs;
use std::path::Path;

/// Inputs made of each that is kept, by changing a byte here and there.
const LIKE_IT: u64 = 8;

fn next(random: &mut u64) -> usize {
    *random = random
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    (*random >> 33) as usize
}

fn replay(name: &str, target: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let mut paths: Vec<_> = fs::read_dir(corpus)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty());
    let mut random = 1;
    for path in paths {
        let kept = fs::read(&path).unwrap();
        // Said when the test fails: the number leads back to the bytes.
        println!("{}", path.display());
        target(&kept);
        for _ in 0..LIKE_IT {
            let mut like_it = kept.clone();
            for _ in 0..1 + next(&mut random) % 4 {
                let (at, byte) = (next(&mut random), next(&mut random) as u8);
                match like_it.len() {
                    0 => like_it.push(byte),
                    length => like_it[at % length] = byte,
                }
            }
            println!("{like_it:02x?}");
            target(&like_it);
        }
    }
}

#[test]
fn the_ring_consumer_takes_what_guests_have_written() {
    replay("ring", pagefusion_fuzz::ring);
}

#[test]
fn the_device_takes_what_guests_and_vmms_have_done_to_it() {
    replay("ivshmem", pagefusion_fuzz::ivshmem);
}

#[test]
fn the_daemon_takes_what_vmms_have_said() {
    replay("protocol", pagefusion_fuzz::protocol);
}

#[test]
fn the_preloaded_library_takes_what_monitors_have_said() {
    replay("qmp", pagefusion_fuzz::qmp);
}
