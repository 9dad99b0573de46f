// SPDX-License-Identifier: GPL-2.0

//! The PCI driver: takes devices whose shared memory is ours, and gives each to a worker.

use crate::compat;
use crate::control::CONTROL;
use crate::ivshmem::Ivshmem;
use crate::policy::POLLING_SLEEP_MS;
use crate::restart::Notifier;
use crate::shrinker::Shrinker;
use crate::thread::Thread;
use crate::tracepoints::Watch;
use crate::worker::Worker;
use kernel::alloc::KBox;
use kernel::device::Core;
use kernel::pci;
use kernel::prelude::*;

/// ivshmem, all variants.
const DEVICE: u32 = 0x1110;

/// The place for the one worker there may be.
struct Claim;

impl Drop for Claim {
    fn drop(&mut self) {
        CONTROL.release();
    }
}

/// A device at work. Who wakes the thread or waits for it is gone before it, and it is stopped
/// before the place is free again.
pub(crate) struct Driver {
    _notifier: Notifier,
    _watch: Option<Watch>,
    _shrinker: Option<Shrinker>,
    _thread: Thread<Worker>,
    _claim: Claim,
}

compat::pci_device_table!(
    PCI_TABLE,
    <Driver as pci::Driver>::IdInfo,
    [(
        pci::DeviceId::from_id(pci::Vendor::REDHAT_QUMRANET, DEVICE),
        ()
    )]
);

impl Driver {
    fn start(device: &pci::Device<Core<'_>>) -> Result<Self> {
        let memory = Ivshmem::probe(device)?;
        if !CONTROL.claim() {
            dev_err!(
                device,
                "there is a pagefusion device already; this one is left alone\n"
            );
            return Err(EBUSY);
        }
        let claim = Claim;
        let worker = KBox::new(Worker::new(memory)?, GFP_KERNEL)?;
        let thread = Thread::start(worker, c"pagefusion")?;
        let watch = Watch::start();
        if watch.is_none() {
            dev_dbg!(
                device,
                "no tracepoints of page faults: new files are looked for now and then\n"
            );
            CONTROL
                .max_sleep_millisecs
                .replace_default(POLLING_SLEEP_MS);
        }
        Ok(Self {
            _notifier: Notifier::new(&thread)?,
            _watch: watch,
            _shrinker: Shrinker::register().ok(),
            _thread: thread,
            _claim: claim,
        })
    }
}

impl pci::Driver for Driver {
    type IdInfo = ();
    type Data<'bound> = Self;
    const ID_TABLE: pci::IdTable<Self::IdInfo> = &PCI_TABLE;

    fn probe<'bound>(
        device: &'bound pci::Device<Core<'_>>,
        _info: compat::IdInfo<'bound, Self::IdInfo>,
    ) -> impl PinInit<Self, Error> + 'bound {
        Self::start(device)
    }
}
