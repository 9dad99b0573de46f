// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's side of the device, as the kernel module is.

use pagefusion_abi::wire::{
    EMPTY_RECORD, FileIdentity, Layout, Outcome, Record, Run, feature, guest_area, guest_state,
    host_area,
};
use pagefusion_host::engine::SharedMemory;
use pagefusion_host::protocol::DeviceDescriptors;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::borrow::Borrow;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for the host; only reached when a test fails.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct Guest {
    memory: SharedMemory,
    layout: Layout,
    doorbell: OwnedFd,
    interrupt: OwnedFd,
    epoch: u64,
    head: u64,
}

impl Guest {
    /// Attaches to the host once that is there.
    pub(crate) fn attach(device: DeviceDescriptors) -> Self {
        let memory = SharedMemory::map(device.memory).unwrap();
        let layout = memory.layout().unwrap();
        let mut guest = Self {
            memory,
            layout,
            doorbell: device.from_guest,
            interrupt: device.to_guest,
            epoch: 0,
            head: 0,
        };
        guest.wait("an engine", |guest| {
            guest.host(host_area::INSTANCE).load(Ordering::SeqCst) != 0
        });
        let instance = guest.host(host_area::INSTANCE).load(Ordering::SeqCst);
        guest.epoch = guest.host(host_area::EPOCH).load(Ordering::SeqCst) + 1;
        for (field, value) in [
            (guest_area::HEAD, 0),
            (guest_area::REVOKED, 0),
            (guest_area::REQUEST_TAIL, 0),
            (guest_area::FEATURES, feature::ALL),
            (guest_area::INSTANCE, instance),
            (guest_area::EPOCH, guest.epoch),
            (guest_area::STATE, guest_state::ATTACHED),
        ] {
            guest.own(field).store(value, Ordering::SeqCst);
        }
        guest
    }

    /// Announces file `file`.
    pub(crate) fn announce(&mut self, file: u32, pages: u64) {
        let identity = FileIdentity {
            fs_uuid: [5; 16],
            inode: file.into(),
            size: pages * 4096,
            mtime_ns: 1,
            generation: 1,
            kind: 0,
        };
        self.report(&[Record::File {
            file,
            identity,
            name: b"/lib/a",
        }]);
    }

    /// Reports `pages` pages of `file` from its beginning at `gfn`.
    pub(crate) fn run(&mut self, file: u32, gfn: u64, pages: u32) -> Outcome {
        let run = Run {
            file,
            pages,
            page: 0,
            gfn,
        };
        self.report(&[Record::Run(run)])[0]
    }

    /// How often the host has asked for something.
    pub(crate) fn requests(&self) -> u64 {
        self.host(host_area::REQUEST_HEAD).load(Ordering::SeqCst)
    }

    /// Waits until it has more often than `before`.
    pub(crate) fn wait_for_request(&self, before: u64) {
        self.wait("a request", |guest| guest.requests() > before);
    }

    /// Reports and waits for the acknowledgement.
    fn report(&mut self, records: &[Record<'_>]) -> Vec<Outcome> {
        let mut positions = Vec::new();
        for record in records {
            let mut buffer = EMPTY_RECORD;
            let slots = record.encode(&mut buffer);
            for (i, slot) in (0..).zip(&buffer[..slots]) {
                for (word, value) in (0..).zip(*slot) {
                    let at = self.layout.ring_slot(self.head + i) + word * 8;
                    self.word(at).store(value.to_le(), Ordering::SeqCst);
                }
            }
            positions.push(self.head);
            self.head += slots as u64;
        }
        self.own(guest_area::NOTIFY_AT)
            .store(self.head, Ordering::SeqCst);
        self.own(guest_area::HEAD)
            .store(self.head, Ordering::SeqCst);
        rustix::io::write(&self.doorbell, &1_u64.to_ne_bytes()).unwrap();
        self.wait("an acknowledgement", |guest| {
            guest.host(host_area::EPOCH).load(Ordering::SeqCst) == guest.epoch
                && guest.host(host_area::ACK).load(Ordering::SeqCst) >= guest.head
        });
        let outcome = |at: u64| {
            let word = self.word(self.layout.outcome(at)).load(Ordering::SeqCst);
            Outcome::from_word(word).unwrap()
        };
        positions.into_iter().map(outcome).collect()
    }

    fn wait(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !done(self) {
            assert!(Instant::now() < deadline, "the guest waited for {what}");
            // Whoever comes late has rung already: look again now and then.
            let moment = Timespec {
                tv_sec: 0,
                tv_nsec: 10_000_000,
            };
            let mut fds = [PollFd::new(&self.interrupt, PollFlags::IN)];
            if rustix::event::poll(&mut fds, Some(&moment)) == Ok(1) {
                let _ = rustix::io::read(&self.interrupt, &mut [0; 8]);
            }
        }
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        let words: &[AtomicU64] = self.memory.borrow();
        &words[(offset / 8) as usize]
    }

    fn host(&self, field: usize) -> &AtomicU64 {
        self.word(self.layout.host_area + field as u64)
    }

    fn own(&self, field: usize) -> &AtomicU64 {
        self.word(self.layout.guest_area + field as u64)
    }
}
