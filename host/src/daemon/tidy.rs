// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Now and then has engines give up overlays that save nothing.

use super::control::{self, SLOW};
use super::registry::Registry;
use crate::protocol::{ControlReply, ControlRequest};

/// Most spans in one request; the rest waits for the next time.
const MAX_SPANS: usize = 1 << 16;

/// Has every engine that is connected tidy up, one after the other: it is not urgent, and each
/// may copy pages.
pub(super) fn tidy(registry: &Registry) {
    for vm in registry.vms() {
        // Others get hold of the store in between.
        while vm.store().clear_strays() {}
        let mut alone = vm.store().take_alone(vm.number);
        alone.truncate(MAX_SPANS);
        let Some(answer) = vm.control.ask(ControlRequest::Tidy { alone }) else {
            continue;
        };
        match control::wait(&answer, SLOW) {
            Ok(ControlReply::Error(reason)) | Err(reason) => {
                log::debug!("VM {} ({}) was not tidied up: {reason}", vm.number, vm.name);
            }
            Ok(_) => {}
        }
    }
}
