// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Now and then has engines give up overlays that save nothing, and takes back what nobody
//! was given.

use super::control::Answer;
use super::registry::Registry;
use crate::protocol::{ControlReply, ControlRequest};
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// Most spans in one request; the rest waits for the next time.
const MAX_SPANS: usize = 1 << 16;
/// How long others wait for an engine before they are asked, too.
const TURN: Duration = Duration::from_secs(2);

/// How often memory between the pages of stores is looked for. It is no matter of taste, as
/// what engines do is, but of what a hostile VMM can take.
pub(super) const STRAYS: Duration = Duration::from_secs(5);

/// Gives back what VMMs have touched between the pages of stores.
pub(super) fn clear_strays(registry: &Registry) {
    for vm in registry.vms() {
        // Others get hold of the store in between.
        while vm.store().clear_strays() {}
    }
}

/// Has engines tidy up.
#[derive(Debug, Default)]
pub(super) struct Tidying {
    /// Of engines that were asked and have not answered yet, by VM.
    open: BTreeMap<u32, Receiver<Answer>>,
}

impl Tidying {
    /// Has every engine that is connected tidy up, as a rule one after the other: it is not urgent,
    /// and each may copy pages. One that does not answer is asked nothing more until it does, and
    /// keeps no other waiting for long.
    pub(super) fn round(&mut self, registry: &Registry) {
        let vms = registry.vms();
        self.open
            .retain(|number, _| vms.iter().any(|vm| vm.number == *number));
        for vm in vms {
            if let Some(answer) = self.open.remove(&vm.number) {
                self.wait(vm.number, answer, Duration::ZERO);
            }
            if self.open.contains_key(&vm.number) {
                continue;
            }
            let mut alone = vm.store().take_alone(vm.number);
            alone.truncate(MAX_SPANS);
            if let Some(answer) = vm.control.ask(ControlRequest::Tidy { alone }) {
                self.wait(vm.number, answer, TURN);
            }
        }
    }

    fn wait(&mut self, number: u32, answer: Receiver<Answer>, limit: Duration) {
        match answer.recv_timeout(limit) {
            Ok(Ok(ControlReply::Error(reason)) | Err(reason)) => {
                log::debug!("VM {number} was not tidied up: {reason}");
            }
            Ok(Ok(_)) => {}
            Err(RecvTimeoutError::Timeout) => {
                self.open.insert(number, answer);
            }
            Err(RecvTimeoutError::Disconnected) => {}
        }
    }
}
