// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The daemon with real processes: some are VMMs, some are killed, some mean harm.

mod hostile;
mod lives;
mod support;
mod vmm;
