// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The daemon with real processes: some are VMMs, some are killed, some mean harm.

mod foreign;
mod groups;
mod hostile;
mod lives;
mod operator;
mod policy;
mod reconnects;
mod support;
mod users;
mod vmm;
