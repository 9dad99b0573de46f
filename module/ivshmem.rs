// SPDX-License-Identifier: GPL-2.0

//! An ivshmem device: shared memory in BAR2, doorbell in BAR0, an interrupt if it has one.

use crate::compat;
use crate::ring::Memory;
use crate::thread;
use crate::wire::{header, Layout, LayoutError};
use core::ptr::{from_ref, NonNull};
use kernel::bindings;
use kernel::device::Core;
use kernel::error::to_result;
use kernel::pci;
use kernel::prelude::*;
use kernel::sync::aref::ARef;

const NAME: &CStr = c"pagefusion";
/// Byte offset of the doorbell in BAR0.
const DOORBELL: usize = 12;
/// Bytes of BAR0 that QEMU's device has.
const REGISTERS_BYTES: u64 = 256;
const REGISTERS_BAR: c_int = 0;
const MEMORY_BAR: c_int = 2;

/// Memory that the host writes as well: only whole words, each read or written exactly once.
///
/// # Invariants
///
/// `base` maps `bytes` bytes, write-back, aligned to pages, until this is dropped.
struct SharedMemory {
    base: NonNull<c_void>,
    bytes: u64,
}

impl SharedMemory {
    fn map(start: u64, bytes: u64) -> Result<Self> {
        let flags = bindings::MEMREMAP_WB as usize;
        // SAFETY: The range is a BAR that we have requested; it is memory on the host's side.
        let base = unsafe { bindings::memremap(start, bytes as usize, flags) };
        // INVARIANT: Just mapped.
        Ok(Self {
            base: NonNull::new(base).ok_or(ENOMEM)?,
            bytes,
        })
    }

    /// Where the word at `offset` is.
    fn word(&self, offset: u64) -> Option<*mut u64> {
        let inside = offset.checked_add(8).is_some_and(|end| end <= self.bytes);
        // `wrapping` as the pointer is only followed where it is inside.
        (inside && offset % 8 == 0).then(|| {
            self.base
                .as_ptr()
                .cast::<u8>()
                .wrapping_add(offset as usize)
                .cast()
        })
    }

    fn read(&self, offset: u64) -> u64 {
        self.word(offset).map_or(0, |word| {
            // SAFETY: Inside the mapping and aligned; all bit patterns are valid, and a volatile
            // read may race with the host.
            u64::from_le(unsafe { word.read_volatile() })
        })
    }

    fn write(&self, offset: u64, value: u64) {
        if let Some(word) = self.word(offset) {
            // SAFETY: Inside the mapping and aligned; a volatile write may race with the host.
            unsafe { word.write_volatile(value.to_le()) };
        }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: Mapped by `memremap`, and not used after this.
        unsafe { bindings::memunmap(self.base.as_ptr()) };
    }
}

/// The device's registers.
///
/// # Invariants
///
/// `base` maps BAR0 of `device`, which has at least [`REGISTERS_BYTES`] bytes.
struct Registers {
    device: ARef<pci::Device>,
    base: NonNull<c_void>,
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: Mapped by `pci_iomap` for this device, and not used after this.
        unsafe { bindings::pci_iounmap(raw(&self.device), self.base.as_ptr()) };
    }
}

/// The interrupt; the worker is woken by it.
///
/// # Invariants
///
/// `device` has interrupt vectors, and `irq`, the first, has [`interrupted`] as handler.
struct Interrupt {
    device: ARef<pci::Device>,
    irq: c_uint,
}

impl Interrupt {
    /// `None` when the device has no interrupts.
    fn request(device: &pci::Device<Core<'_>>) -> Option<Self> {
        let pdev = raw(device);
        // SAFETY: The device is valid and bound to us.
        let vectors = unsafe {
            bindings::pci_alloc_irq_vectors(
                pdev,
                1,
                1,
                bindings::PCI_IRQ_MSIX | bindings::PCI_IRQ_MSI,
            )
        };
        if vectors < 1 {
            return None;
        }
        // SAFETY: Vector 0 was just allocated.
        let irq = unsafe { bindings::pci_irq_vector(pdev, 0) };
        // SAFETY: The handler needs no data; the device pointer only identifies it.
        let requested = to_result(unsafe {
            bindings::request_threaded_irq(
                irq as c_uint,
                Some(interrupted),
                None,
                0,
                NAME.as_char_ptr(),
                pdev.cast(),
            )
        });
        if irq < 0 || requested.is_err() {
            // SAFETY: Allocated above, and no handler is left.
            unsafe { bindings::pci_free_irq_vectors(pdev) };
            return None;
        }
        // INVARIANT: As just set up.
        Some(Self {
            device: device.into(),
            irq: irq as c_uint,
        })
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        let pdev = raw(&self.device);
        // SAFETY: By the invariants; waits for a handler that is running.
        unsafe { bindings::free_irq(self.irq, pdev.cast()) };
        // SAFETY: The only handler is gone.
        unsafe { bindings::pci_free_irq_vectors(pdev) };
    }
}

/// # Safety
///
/// None: it uses none of its arguments.
unsafe extern "C" fn interrupted(_: c_int, _: *mut c_void) -> bindings::irqreturn_t {
    thread::kick();
    compat::IRQ_HANDLED
}

/// An enabled device with its BARs requested.
///
/// # Invariants
///
/// The device is enabled and both BARs belong to us.
struct Enabled(ARef<pci::Device>);

impl Enabled {
    fn new(device: &pci::Device<Core<'_>>) -> Result<Self> {
        let pdev = raw(device);
        device.enable_device_mem()?;
        for bar in [REGISTERS_BAR, MEMORY_BAR] {
            // SAFETY: The device is valid, and the BAR number as well.
            let requested = unsafe { bindings::pci_request_region(pdev, bar, NAME.as_char_ptr()) };
            if let Err(error) = to_result(requested) {
                if bar == MEMORY_BAR {
                    // SAFETY: Requested in the round before.
                    unsafe { bindings::pci_release_region(pdev, REGISTERS_BAR) };
                }
                // SAFETY: Enabled above.
                unsafe { bindings::pci_disable_device(pdev) };
                return Err(error);
            }
        }
        // INVARIANT: As just set up.
        Ok(Self(device.into()))
    }
}

impl Drop for Enabled {
    fn drop(&mut self) {
        let pdev = raw(&self.0);
        for bar in [MEMORY_BAR, REGISTERS_BAR] {
            // SAFETY: By the invariants.
            unsafe { bindings::pci_release_region(pdev, bar) };
        }
        // SAFETY: By the invariants.
        unsafe { bindings::pci_disable_device(pdev) };
    }
}

/// One of our devices. The order of the fields is the order in which they are undone.
pub(crate) struct Ivshmem {
    interrupt: Option<Interrupt>,
    registers: Option<Registers>,
    memory: SharedMemory,
    _enabled: Enabled,
    host_peer: u16,
    layout: Layout,
}

// SAFETY: The device may be used and let go by any thread.
unsafe impl Send for Ivshmem {}

impl Ivshmem {
    /// Takes a device whose shared memory is ours; `ENODEV` for one that belongs to others.
    pub(crate) fn probe(device: &pci::Device<Core<'_>>) -> Result<Self> {
        let (start, bytes) = (device.resource_start(2)?, device.resource_len(2)?);
        if bytes < Layout::MIN_BYTES {
            return Err(ENODEV);
        }
        let enabled = Enabled::new(device)?;
        let memory = SharedMemory::map(start, bytes)?;
        let layout = match Layout::from_header(|offset| memory.read(offset as u64), bytes) {
            Ok(layout) => layout,
            Err(LayoutError::Magic) => {
                dev_dbg!(device, "not a pagefusion device\n");
                return Err(ENODEV);
            }
            Err(LayoutError::Version(major, minor)) => {
                dev_err!(
                    device,
                    "host speaks version {}.{}, which is not ours\n",
                    major,
                    minor
                );
                return Err(ENODEV);
            }
            Err(LayoutError::Areas) => {
                dev_err!(device, "header of the shared memory makes no sense\n");
                return Err(ENODEV);
            }
        };
        let host_peer = memory.read(header::HOST_PEER as u64) as u16;
        device.set_master();
        // A kernel without MSI can still ring. Where there is no doorbell, ringing does nothing.
        let registers = Self::registers(device)?;
        let interrupt = Interrupt::request(device);
        Ok(Self {
            interrupt,
            registers,
            memory,
            _enabled: enabled,
            host_peer,
            layout,
        })
    }

    fn registers(device: &pci::Device<Core<'_>>) -> Result<Option<Registers>> {
        if device.resource_len(0)? < REGISTERS_BYTES {
            return Ok(None);
        }
        // SAFETY: The device is valid and the BAR was requested.
        let base = unsafe { bindings::pci_iomap(raw(device), REGISTERS_BAR, 0) };
        // INVARIANT: Just mapped.
        Ok(NonNull::new(base).map(|base| Registers {
            device: device.into(),
            base,
        }))
    }

    /// Where everything is.
    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// The features that the host offers.
    pub(crate) fn features(&self) -> u64 {
        self.memory.read(header::FEATURES as u64)
    }

    /// Whether the host can interrupt us; otherwise it has to be looked at now and then.
    pub(crate) fn has_interrupt(&self) -> bool {
        self.interrupt.is_some()
    }
}

impl Memory for Ivshmem {
    fn read(&self, offset: u64) -> u64 {
        self.memory.read(offset)
    }

    fn write(&self, offset: u64, value: u64) {
        self.memory.write(offset, value);
    }

    // The other side is another CPU on the same memory, also when this kernel knows one only.
    fn read_barrier(&self) {
        compat::rmb();
    }

    fn write_barrier(&self) {
        compat::wmb();
    }

    fn full_barrier(&self) {
        compat::mb();
    }

    fn doorbell(&self) {
        if let Some(registers) = &self.registers {
            let address = registers.base.as_ptr().wrapping_byte_add(DOORBELL);
            // SAFETY: Inside BAR0 by the invariants, and a register of 32 bits.
            unsafe { bindings::iowrite32(u32::from(self.host_peer) << 16, address) };
        }
    }
}

/// The C side of a device.
fn raw<C: kernel::device::DeviceContext>(device: &pci::Device<C>) -> *mut bindings::pci_dev {
    // `pci::Device` is a transparent wrapper.
    from_ref(device).cast_mut().cast()
}
