// SPDX-License-Identifier: GPL-2.0

//! pagefusion: tells the host which pages of this guest hold what read-only file mappings show,
//! so that virtual machines can share them.

use control::CONTROL;
use kernel::driver::Registration;
use kernel::pci;
use kernel::prelude::*;

mod address_space;
mod bindings;
mod compat;
mod control;
mod driver;
mod exclude;
mod file;
mod filter;
mod inflight;
mod inodes;
mod iomem;
mod ivshmem;
mod kernel_memory;
mod leaf;
mod leaves;
mod list;
mod look;
mod page_cache;
mod pages;
mod pass;
mod policy;
mod ranges;
mod recent;
mod report;
mod restart;
mod ring;
mod runs;
mod scan;
mod session;
mod shrinker;
mod sight;
mod superblock;
mod sysfs;
mod thread;
mod tracepoints;
mod tracker;
mod values;
mod walk;
// The host's side of it is not used here.
#[allow(dead_code, unreachable_pub, unused_imports)]
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
    params: {
        run: u8 {
            default: 1,
            description: "The knob `run` at first: 0 stops, 1 runs, 2 stops and withdraws everything",
        },
    },
}

/// The module. Fields are dropped in order: first the driver with its worker, then the knobs, then
/// what they keep.
#[pin_data]
struct PageFusion {
    #[pin]
    driver: Registration<pci::Adapter<driver::Driver>>,
    directory: sysfs::Directory,
    exclusions: control::Exclusions,
}

impl kernel::InPlaceModule for PageFusion {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        let allowed = policy::may_load(compat::is_confidential()).map_err(|why| {
            pr_err!("{why}\n");
            compat::not_supported()
        });
        try_pin_init!(Self {
            exclusions: allowed.and_then(|()| {
                let run = compat::parameter(module_parameters::run.value());
                CONTROL.run.set(run.into()).inspect_err(|_| {
                    pr_err!("refused: run is {run}, and may be 0, 1 or 2\n");
                })?;
                // SAFETY: Once for each time the module is loaded, before anything else is set up.
                unsafe { thread::init() };
                // SAFETY: As above.
                Ok(unsafe { control::Exclusions::new() })
            })?,
            directory: sysfs::Directory::new()?,
            driver <- Registration::new(<Self as kernel::ModuleMetadata>::NAME, module),
        })
    }
}
