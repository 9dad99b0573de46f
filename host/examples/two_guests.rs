// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A VMM in one file: two tiny guests under KVM share their pages, and one of them writes.
//!
//! ```text
//! cargo run -p pagefusion-host --no-default-features --example two_guests
//! ```
//!
//! The guests are a few bytes of real-mode code that add their memory up and, told to, write
//! to it. What a guest's kernel module would report is reported here on its behalf.

#![expect(unsafe_code, reason = "gives memory to KVM")]

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use pagefusion_host::engine::{Memory, ReportedRun, Sharing, StoreView, Uffd, audit, serve_faults};
use pagefusion_host::protocol::FileKey;
use pagefusion_host::store::{Group, LocalStore, PAGE};
use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// Guest memory: code in the first page, the "file" from [`FILE`] on.
const PAGES: usize = 96;
const FILE: usize = 16;
const FILE_PAGES: usize = 64;
/// Port that the guest talks on.
const PORT: u16 = 0x10;
/// The page of the file that a guest writes to.
const WRITTEN: usize = 5;

/// Adds the words of the file up, says the sum, adds CX to one word if it is not zero, halts;
/// and begins anew.
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
    0xf4, // hlt                            2:
    0xe9, 0xce, 0xff, // jmp to the beginning
];

/// A guest and the engine that looks after its memory.
struct Guest {
    // Dropped in this order: nobody uses memory that has gone.
    vcpu: VcpuFd,
    _vm: VmFd,
    sharing: Arc<Sharing>,
    memory: GuestMemoryMmap,
    stop: Option<OwnedFd>,
    faults: Option<JoinHandle<std::io::Result<()>>>,
}

impl Guest {
    fn new(kvm: &Kvm, group: &Arc<Mutex<Group>>, number: u32) -> Result<Self, Box<dyn Error>> {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), PAGES * PAGE)])?;
        memory.write_slice(CODE, GuestAddress(0))?;
        for page in 0..FILE_PAGES {
            memory.write_slice(&content(page), at(page))?;
        }
        let hva = memory.get_host_address(GuestAddress(0))? as usize;
        let vm = kvm.create_vm()?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: (PAGES * PAGE) as u64,
            userspace_addr: hva as u64,
        };
        // SAFETY: the memory lives as long as this guest, which drops its VM first.
        unsafe { vm.set_user_memory_region(slot) }?;
        let vcpu = vm.create_vcpu(0)?;
        let mut segments = vcpu.get_sregs()?;
        segments.cs.base = 0;
        segments.cs.selector = 0;
        vcpu.set_sregs(&segments)?;
        let mut registers = vcpu.get_regs()?;
        (registers.rip, registers.rflags, registers.rcx) = (0, 2, 0);
        vcpu.set_regs(&registers)?;

        // From here on it is the engine's.
        let uffd = Uffd::open(None)?;
        let events = uffd.try_clone()?;
        let mut engine = Memory::new(uffd)?;
        engine.set_guest_memory(&memory)?;
        let sharing = Arc::new(Sharing::new(engine));
        let (until, stop) = rustix::pipe::pipe()?;
        let served = sharing.clone();
        let faults = std::thread::spawn(move || serve_faults(&events, &served, until.as_fd()));
        let store = LocalStore::new(group.clone(), number);
        let (view, seed) = (StoreView::new(store.read_only()?)?, store.hash_seed());
        sharing.connect(Box::new(store), view, seed)?;
        Ok(Self {
            vcpu,
            _vm: vm,
            sharing,
            memory,
            stop: Some(stop),
            faults: Some(faults),
        })
    }

    /// Has the guest add its file up, and `add` to one word of it afterwards.
    fn run(&mut self, add: u64) -> Result<u16, Box<dyn Error>> {
        let mut registers = self.vcpu.get_regs()?;
        registers.rcx = add;
        self.vcpu.set_regs(&registers)?;
        let mut sum = None;
        loop {
            match self.vcpu.run()? {
                VcpuExit::IoOut(PORT, data) => sum = Some(u16::from_le_bytes(data.try_into()?)),
                VcpuExit::Hlt => return Ok(sum.ok_or("the guest halted without a word")?),
                other => return Err(format!("the guest did something else: {other:?}").into()),
            }
        }
    }

    /// Reports the file, as the guest's kernel would.
    fn report(&self) -> (u16, u16) {
        let file = FileKey {
            fs_uuid: [1; 16],
            inode: 2,
            size: (FILE_PAGES * PAGE) as u64,
            mtime_ns: 3,
            generation: 4,
            kind: 0,
        };
        let run = ReportedRun {
            file,
            page: 0,
            gfn: FILE as u64,
            pages: FILE_PAGES as u32,
        };
        let outcome = self.sharing.share(&[run])[0];
        (outcome.shared, outcome.remembered)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Err(error) = self.sharing.undo_all() {
            eprintln!("undo: {error}");
        }
        self.sharing.disconnect();
        drop(self.stop.take());
        if let Some(faults) = self.faults.take() {
            // That it panicked was said already.
            let _ = faults.join();
        }
    }
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

fn main() -> Result<(), Box<dyn Error>> {
    let kvm = Kvm::new()?;
    let group = Arc::new(Mutex::new(Group::anonymous()?));
    let mut one = Guest::new(&kvm, &group, 1)?;
    let mut two = Guest::new(&kvm, &group, 2)?;
    let sum = expected_sum();
    assert_eq!((one.run(0)?, two.run(0)?), (sum, sum));
    println!("both guests run; the file adds up to {sum:#06x}");

    // The first is alone with its pages; the second makes them worth sharing.
    assert_eq!(one.report(), (0, FILE_PAGES as u16));
    assert_eq!(two.report(), (FILE_PAGES as u16, 0));
    assert_eq!(one.report(), (FILE_PAGES as u16, 0));
    let stored = group
        .lock()
        .map_err(|_| "poisoned")?
        .statistics()
        .store_pages;
    let shared = |guest: &Guest| audit(&guest.sharing).map(|audit| (audit.intact, audit.broken));
    println!(
        "{:?} and {:?} pages (intact, broken) on {stored} canonical ones",
        shared(&one)?,
        shared(&two)?
    );
    assert_eq!((one.run(0)?, two.run(1)?), (sum, sum));

    // The second has written to one page, and has it for itself now.
    assert_eq!((one.run(0)?, two.run(0)?), (sum, sum.wrapping_add(1)));
    assert_eq!(shared(&one)?, (FILE_PAGES as u64, 0));
    assert_eq!(shared(&two)?, (FILE_PAGES as u64 - 1, 1));
    let mut page = vec![0; PAGE];
    one.memory.read_slice(&mut page, at(WRITTEN))?;
    assert_eq!(page, content(WRITTEN));
    println!(
        "one wrote: {:?} and {:?}; the other still adds up to {sum:#06x}",
        shared(&one)?,
        shared(&two)?
    );

    two.sharing.undo_all()?;
    assert_eq!((one.run(0)?, two.run(0)?), (sum, sum.wrapping_add(1)));
    println!(
        "undone in one: {:?} and {:?}; both still add up",
        shared(&one)?,
        shared(&two)?
    );
    Ok(())
}
