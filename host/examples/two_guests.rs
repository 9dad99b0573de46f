// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A VMM in one file: two tiny guests under KVM share their pages, and one of them writes.
//!
//! ```text
//! cargo run -p pagefusion-host --no-default-features --example two_guests
//! ```
//!
//! The guests are a few bytes of real-mode code that add their memory up and, told to, write
//! to it and ring the doorbell of their device. What a guest's kernel module would put into the
//! device's memory is put there on its behalf ([`Module`]).

#![expect(unsafe_code, reason = "gives memory to KVM")]

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use pagefusion_abi::wire::{
    EMPTY_RECORD, FileIdentity, Layout, Outcome, Record, Run, guest_area, guest_state, header,
    host_area,
};
use pagefusion_host::device::{MEMORY_BYTES, PagefusionDevice, REGISTER_BYTES};
use pagefusion_host::engine::{Engine, Uffd};
use pagefusion_host::store::{Group, PAGE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::error::Error;
use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vm_device::bus::{MmioAddress, MmioRange};
use vm_device::device_manager::{IoManager, MmioManager};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

/// Guest memory: code in the first page, the "file" from [`FILE`] on.
const PAGES: usize = 96;
const FILE: usize = 16;
const FILE_PAGES: usize = 64;
/// Port that the guest talks on.
const PORT: u16 = 0x10;
/// The page of the file that a guest writes to.
const WRITTEN: usize = 5;
/// Where the guest finds its device: registers, and shared memory.
const BAR0: u64 = 0xd_0000;
const BAR2: u64 = 0x10_0000;
/// How long the engine may take to answer.
const PATIENCE: Timespec = Timespec {
    tv_sec: 60,
    tv_nsec: 0,
};

/// Adds the words of the file up, says the sum, adds CX to one word if it is not zero, rings the
/// device if DX is not zero, halts; and begins anew.
const CODE: &[u8] = &[
    0xb8, 0x00, 0x10, // mov ax, 0x1000     segment of page 16
    0x8e, 0xd8, // mov ds, ax
    0x31, 0xdb, // xor bx, bx
    0x31, 0xff, // xor di, di                0: add
    0x31, 0xf6, // xor si, si
    0x03, 0x1c, // add bx, [si]              1:
    0x83, 0xc6, 0x02, // add si, 2
    0x75, 0xf9, // jnz 1b                    64 KiB: a segment
    0x8c, 0xd8, // mov ax, ds
    0x05, 0x00, 0x10, // add ax, 0x1000
    0x8e, 0xd8, // mov ds, ax
    0x47, // inc di
    0x83, 0xff, 0x04, // cmp di, 4           256 KiB: the file
    0x75, 0xea, // jne 0b
    0x89, 0xd8, // mov ax, bx
    0xe7, 0x10, // out 0x10, ax
    0xb8, 0x00, 0x10, // mov ax, 0x1000
    0x8e, 0xd8, // mov ds, ax
    0xe3, 0x04, // jcxz 2f
    0x01, 0x0e, 0x00, 0x50, // add [0x5000], cx  page 5 of the file
    0x85, 0xd2, // test dx, dx              2:
    0x74, 0x0e, // jz 3f
    0xb8, 0x00, 0xd0, // mov ax, 0xd000     segment of BAR0
    0x8e, 0xd8, // mov ds, ax
    0x66, 0xc7, 0x06, 0x0c, 0x00, 0x00, 0x00, 0x01, 0x00, // mov dword [12], 1 << 16
    0xf4, // hlt                            3:
    0xe9, 0xbc, 0xff, // jmp to the beginning
];

type Failure = Box<dyn Error>;

/// A guest, its device, and the engine that looks after its memory.
struct Guest {
    // Dropped in this order: nobody uses memory that has gone.
    vcpu: VcpuFd,
    _vm: VmFd,
    module: Module,
    memory: GuestMemoryMmap,
    bus: IoManager,
    engine: Arc<Engine>,
    threads: Vec<JoinHandle<std::io::Result<()>>>,
}

impl Guest {
    fn new(kvm: &Kvm, group: &Arc<Mutex<Group>>, number: u32) -> Result<Self, Failure> {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), PAGES * PAGE)])?;
        memory.write_slice(CODE, GuestAddress(0))?;
        for page in 0..FILE_PAGES {
            memory.write_slice(&content(page), at(page))?;
        }

        // BAR0 is on the bus, BAR2 is memory that guest and host share.
        let device = Arc::new(PagefusionDevice::new()?);
        let mut bus = IoManager::new();
        let registers = MmioRange::new(MmioAddress(BAR0), REGISTER_BYTES)
            .map_err(|e| format!("the device's registers: {e:?}"))?;
        bus.register_mmio(registers, device.clone())?;
        let shared = FileOffset::new(File::from(device.memory().try_clone_to_owned()?), 0);
        let shared = (GuestAddress(BAR2), MEMORY_BYTES as usize, Some(shared));
        let shared = GuestMemoryMmap::from_ranges_with_files([shared])?;

        let vm = kvm.create_vm()?;
        give(&vm, 0, &memory)?;
        give(&vm, 1, &shared)?;
        let vcpu = vm.create_vcpu(0)?;
        let mut segments = vcpu.get_sregs()?;
        segments.cs.base = 0;
        segments.cs.selector = 0;
        vcpu.set_sregs(&segments)?;
        let mut registers = vcpu.get_regs()?;
        (registers.rip, registers.rflags) = (0, 2);
        vcpu.set_regs(&registers)?;

        // From here on the memory is the engine's as well.
        let engine = Arc::new(Engine::new(Uffd::open(None)?, &memory, device)?);
        engine.join(group, number)?;
        let (faults, ring) = (engine.clone(), engine.clone());
        let threads = vec![
            std::thread::spawn(move || faults.serve_faults()),
            std::thread::spawn(move || ring.serve_ring()),
        ];
        let mut guest = Self {
            vcpu,
            _vm: vm,
            module: Module::new(shared)?,
            memory,
            bus,
            engine,
            threads,
        };
        guest.module.attach()?;
        guest.run(0, true)?;
        guest.wait_for(host_area::EPOCH, Module::EPOCH)?;
        Ok(guest)
    }

    /// Has the guest add its file up, `add` to one word of it afterwards, and ring.
    fn run(&mut self, add: u64, ring: bool) -> Result<u16, Failure> {
        let mut registers = self.vcpu.get_regs()?;
        (registers.rcx, registers.rdx) = (add, u64::from(ring));
        self.vcpu.set_regs(&registers)?;
        let mut sum = None;
        loop {
            match self.vcpu.run()? {
                VcpuExit::IoOut(PORT, data) => sum = Some(u16::from_le_bytes(data.try_into()?)),
                VcpuExit::MmioWrite(at, data) => self.bus.mmio_write(MmioAddress(at), data)?,
                VcpuExit::Hlt => return Ok(sum.ok_or("the guest halted without a word")?),
                other => return Err(format!("the guest did something else: {other:?}").into()),
            }
        }
    }

    /// Reports the file; pages that are shared, and pages that are remembered.
    fn report(&mut self) -> Result<(u16, u16), Failure> {
        let run = self.module.put(&Record::Run(Run {
            file: 1,
            pages: FILE_PAGES as u32,
            page: 0,
            gfn: FILE as u64,
        }))?;
        self.run(0, true)?;
        self.wait_for(host_area::ACK, self.module.head)?;
        let outcome = self.module.load(self.module.layout.outcome(run))?;
        let outcome = Outcome::from_word(outcome).ok_or("acknowledged without an outcome")?;
        Ok((outcome.shared, outcome.remembered))
    }

    /// Waits for the device's interrupt until the host has written `value`.
    fn wait_for(&self, field: usize, value: u64) -> Result<(), Failure> {
        let interrupt = self.engine.device().interrupt();
        while self.module.host(field)? != value {
            let mut fds = [PollFd::from_borrowed_fd(interrupt, PollFlags::IN)];
            if poll(&mut fds, Some(&PATIENCE))? == 0 {
                return Err("the engine does not answer".into());
            }
            rustix::io::read(interrupt, &mut [0; 8])?;
        }
        Ok(())
    }

    /// Pages on overlays: not written since, and written.
    fn shared(&self) -> Result<(u64, u64), Failure> {
        let status = self.engine.status()?;
        Ok((status.pages_shared, status.pages_broken))
    }

    /// Ordinary memory from here on.
    fn stop(&mut self) -> Result<(), Failure> {
        self.engine.stop()?;
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| "a thread panicked")??;
        }
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("the end of a guest: {error}");
        }
    }
}

/// What the kernel module in a guest does with its device's memory.
struct Module {
    shared: GuestMemoryMmap,
    layout: Layout,
    head: u64,
}

impl Module {
    const EPOCH: u64 = 1;

    fn new(shared: GuestMemoryMmap) -> Result<Self, Failure> {
        let mut words = [0_u8; header::BYTES];
        shared.read_slice(&mut words, GuestAddress(BAR2))?;
        let word = |at: usize| words[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
        let layout = Layout::from_header(word, MEMORY_BYTES);
        Ok(Self {
            layout: layout.map_err(|e| format!("the device's memory: {e:?}"))?,
            shared,
            head: 0,
        })
    }

    fn load(&self, offset: u64) -> Result<u64, Failure> {
        Ok(self
            .shared
            .load(GuestAddress(BAR2 + offset), Ordering::SeqCst)?)
    }

    fn store(&self, offset: u64, value: u64) -> Result<(), Failure> {
        Ok(self
            .shared
            .store(value, GuestAddress(BAR2 + offset), Ordering::SeqCst)?)
    }

    fn host(&self, field: usize) -> Result<u64, Failure> {
        self.load(self.layout.host_area + field as u64)
    }

    fn set(&self, field: usize, value: u64) -> Result<(), Failure> {
        self.store(self.layout.guest_area + field as u64, value)
    }

    /// Says that there is a guest, and which file it will speak of.
    fn attach(&mut self) -> Result<(), Failure> {
        self.set(guest_area::INSTANCE, self.host(host_area::INSTANCE)?)?;
        self.set(guest_area::EPOCH, Self::EPOCH)?;
        self.set(guest_area::STATE, guest_state::ATTACHED)?;
        let identity = FileIdentity {
            fs_uuid: [1; 16],
            inode: 2,
            size: (FILE_PAGES * PAGE) as u64,
            mtime_ns: 3,
            generation: 4,
            kind: 0,
        };
        let name = b"/usr/lib/a_file";
        self.put(&Record::File {
            file: 1,
            identity,
            name,
        })?;
        Ok(())
    }

    /// Puts a record into the ring, with a wish to be interrupted once it is answered.
    fn put(&mut self, record: &Record<'_>) -> Result<u64, Failure> {
        let mut slots = EMPTY_RECORD;
        let position = self.head;
        let count = record.encode(&mut slots);
        for (i, slot) in (0..).zip(&slots[..count]) {
            for (j, word) in (0..).zip(slot) {
                self.store(self.layout.ring_slot(position + i) + j * 8, *word)?;
            }
        }
        self.head += count as u64;
        self.set(guest_area::NOTIFY_AT, self.head)?;
        self.set(guest_area::HEAD, self.head)?;
        Ok(position)
    }
}

/// Gives memory to a virtual machine.
fn give(vm: &VmFd, slot: u32, memory: &GuestMemoryMmap) -> Result<(), Failure> {
    for region in memory.iter() {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the memory lives as long as the guest, which drops its VM first.
        unsafe { vm.set_user_memory_region(slot) }?;
    }
    Ok(())
}

fn at(page: usize) -> GuestAddress {
    GuestAddress(((FILE + page) * PAGE) as u64)
}

fn content(page: usize) -> Vec<u8> {
    let byte = |at: usize| ((at * at / 7 + page * 13) % 251) as u8;
    (0..PAGE).map(byte).collect()
}

fn expected_sum() -> u16 {
    let bytes: Vec<u8> = (0..FILE_PAGES).flat_map(content).collect();
    let words = bytes
        .chunks_exact(2)
        .map(|it| u16::from_le_bytes([it[0], it[1]]));
    words.fold(0, u16::wrapping_add)
}

fn main() -> Result<(), Failure> {
    let kvm = Kvm::new()?;
    let group = Arc::new(Mutex::new(Group::anonymous()?));
    let mut one = Guest::new(&kvm, &group, 1)?;
    let mut two = Guest::new(&kvm, &group, 2)?;
    let sum = expected_sum();
    assert_eq!((one.run(0, false)?, two.run(0, false)?), (sum, sum));
    println!("both guests run; the file adds up to {sum:#06x}");

    // The first is alone with its pages; the second makes them worth sharing, and the first is
    // asked to report them again.
    assert_eq!(one.report()?, (0, FILE_PAGES as u16));
    assert_eq!(two.report()?, (FILE_PAGES as u16, 0));
    one.engine.look()?;
    assert_eq!(one.module.host(host_area::REQUEST_HEAD)?, 1);
    assert_eq!(one.report()?, (FILE_PAGES as u16, 0));
    let stored = group
        .lock()
        .map_err(|_| "poisoned")?
        .statistics()
        .store_pages;
    println!(
        "{:?} and {:?} pages (intact, broken) on {stored} canonical ones",
        one.shared()?,
        two.shared()?
    );
    assert_eq!((one.run(0, false)?, two.run(1, false)?), (sum, sum));

    // The second has written to one page, and has it for itself now.
    let written = sum.wrapping_add(1);
    assert_eq!((one.run(0, false)?, two.run(0, false)?), (sum, written));
    assert_eq!(one.shared()?, (FILE_PAGES as u64, 0));
    assert_eq!(two.shared()?, (FILE_PAGES as u64 - 1, 1));
    let mut page = vec![0; PAGE];
    one.memory.read_slice(&mut page, at(WRITTEN))?;
    assert_eq!(page, content(WRITTEN));
    println!(
        "one wrote: {:?} and {:?}; the other still adds up to {sum:#06x}",
        one.shared()?,
        two.shared()?
    );

    two.stop()?;
    assert_eq!((one.run(0, false)?, two.run(0, false)?), (sum, written));
    println!(
        "undone in one: {:?} and {:?}; both still add up",
        one.shared()?,
        two.shared()?
    );
    Ok(())
}
