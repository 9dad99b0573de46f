// SPDX-License-Identifier: GPL-2.0

//! The PCI driver: takes devices whose shared memory is ours, and gives each to a worker.

use crate::control::CONTROL;
use crate::ivshmem::Ivshmem;
use crate::thread::Thread;
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

/// A device at work. The thread is stopped before the place is free again.
pub(crate) struct Driver {
    _thread: Thread<Worker>,
    _claim: Claim,
}

kernel::pci_device_table!(
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
        Ok(Self {
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
        _: Option<&'bound Self::IdInfo>,
    ) -> impl PinInit<Self, Error> + 'bound {
        Self::start(device)
    }
}
