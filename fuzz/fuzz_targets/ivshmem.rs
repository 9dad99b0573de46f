// SPDX-License-Identifier: Apache-2.0 OR MIT

//! [`pagefusion_fuzz::ivshmem`] under libFuzzer, or, without it, with the files given.

#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| pagefusion_fuzz::ivshmem(data));

#[cfg(not(fuzzing))]
fn main() -> std::io::Result<()> {
    pagefusion_fuzz::replay_arguments(pagefusion_fuzz::ivshmem)
}
