// SPDX-License-Identifier: GPL-2.0

//! pagefusion: tells the host which pages of this guest hold what read-only file mappings show,
//! so that virtual machines can share them.

use kernel::driver::Registration;
use kernel::pci;
use kernel::prelude::*;

mod bindings;
mod compat;
mod control;
mod driver;
mod file;
mod inflight;
mod ivshmem;
mod kernel_memory;
mod list;
mod page_cache;
mod pass;
mod policy;
mod ranges;
mod ring;
mod runs;
mod session;
mod sysfs;
mod thread;
mod tracker;
mod walk;
// The host's side of it is not used here.
#[allow(dead_code, unreachable_pub)]
#[rustfmt::skip] // Formatted with its own crate.
#[path = "../abi/src/wire/mod.rs"]
mod wire;
mod worker;

module! {
    type: PageFusion,
    name: "pagefusion",
    authors: ["pagefusion contributors"],
    description: "Page fusion for Linux guests: reports shareable pages to the host",
    license: "GPL v2",
}

/// The module. Fields are dropped in order: first the driver with its worker, then the knobs.
#[pin_data]
struct PageFusion {
    #[pin]
    driver: Registration<pci::Adapter<driver::Driver>>,
    directory: sysfs::Directory,
}

impl kernel::InPlaceModule for PageFusion {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        if compat::is_confidential() {
            pr_err!("this guest's memory is hidden from its host: there is nothing to share\n");
        }
        let allowed = if compat::is_confidential() {
            Err(EOPNOTSUPP)
        } else {
            Ok(())
        };
        try_pin_init!(Self {
            directory: allowed.and_then(|()| sysfs::Directory::new())?,
            driver <- Registration::new(<Self as kernel::ModuleMetadata>::NAME, module),
        })
    }
}
