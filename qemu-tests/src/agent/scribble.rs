//! A guest that means ill: it writes to our device what no driver would.
#![expect(
    unsafe_code,
    reason = "the device's memory, which its other side reads and writes"
)]

use std::{
    fs::File,
    ptr,
    ptr::NonNull,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::pattern::Numbers;

/// The doorbell in BAR0.
const DOORBELL: u64 = 12;
/// Words of the header, which say where things are.
const HOST_AREA: u64 = 0x20;
const GUEST_AREA: u64 = 0x28;
const RING: u64 = 0x48;
const RING_SLOTS: u64 = 0x50;
const HOST_PEER: u64 = 0x58;
/// Words of the areas.
const HOST_INSTANCE: u64 = 0x00;
const HOST_EPOCH: u64 = 0x08;
const VERSION: u64 = 0x00;
const INSTANCE: u64 = 0x10;
const EPOCH: u64 = 0x18;
const HEAD: u64 = 0x20;
const STATE: u64 = 0x38;
const SLOT: u64 = 32;
/// The kind of a record that announces a file.
const FILE: u64 = 2;
/// Frames and pages that records name; some are behind the end of memory.
const FRAMES: u64 = 1 << 17;
/// How long the host may take to attach, before something else is tried.
const ATTACH_LIMIT: Duration = Duration::from_millis(200);

/// A mapped BAR.
#[derive(Debug)]
struct Bar {
    start: NonNull<u8>,
    bytes: u64,
}

impl Bar {
    fn map(path: &str) -> Result<Self> {
        let file = File::options().read(true).write(true).open(path);
        let file = file.with_context(|| format!("open {path}"))?;
        let bytes = file.metadata()?.len();
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let start = unsafe {
            mmap(
                ptr::null_mut(),
                usize::try_from(bytes)?,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        };
        let start = start.with_context(|| format!("map {path}"))?;
        let start = NonNull::new(start.cast()).context("mmap returned null")?;
        Ok(Self { start, bytes })
    }

    /// A word, of which `offset` is a multiple; beyond the end is the beginning again.
    fn at<T>(&self, offset: u64) -> *mut T {
        let offset = offset % self.bytes;
        // SAFETY: `offset` is inside the mapping, and with it all of an aligned word.
        unsafe { self.start.as_ptr().add(offset as usize).cast() }
    }

    fn read(&self, offset: u64) -> u64 {
        // SAFETY: inside the mapping and aligned, which is device memory: no reference to it is made.
        unsafe { self.at::<u64>(offset & !7).read_volatile() }
    }

    fn write(&self, offset: u64, value: u64) {
        // SAFETY: as above.
        unsafe { self.at::<u64>(offset & !7).write_volatile(value) }
    }

    fn write_register(&self, offset: u64, value: u32) {
        // SAFETY: as above.
        unsafe { self.at::<u32>(offset & !3).write_volatile(value) }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        // SAFETY: `map` made exactly this mapping, and nothing points into it any more.
        let result = unsafe { munmap(self.start.as_ptr().cast(), self.bytes as usize) };
        debug_assert!(result.is_ok());
    }
}

/// Returns how many records were written that the host may have looked at.
pub(super) fn scribble(device: &str, seed: u64, rounds: u64) -> Result<u64> {
    let registers = Bar::map(&format!("{device}/resource0"))?;
    let memory = Bar::map(&format!("{device}/resource2"))?;
    let mut guest = Hostile {
        host_area: memory.read(HOST_AREA),
        area: memory.read(GUEST_AREA),
        ring: memory.read(RING),
        slots: memory.read(RING_SLOTS).max(1),
        peer: memory.read(HOST_PEER),
        memory,
        registers,
        numbers: Numbers::new(seed),
        stolen: Vec::new(),
        head: 0,
        records: 0,
    };
    guest.steal();
    for _ in 0..rounds {
        guest.act();
        guest.ring_host();
    }
    Ok(guest.records)
}

#[derive(Debug)]
struct Hostile {
    memory: Bar,
    registers: Bar,
    host_area: u64,
    area: u64,
    ring: u64,
    slots: u64,
    peer: u64,
    numbers: Numbers,
    /// What a driver has said of files, word by word.
    stolen: Vec<Vec<u64>>,
    head: u64,
    records: u64,
}

impl Hostile {
    fn act(&mut self) {
        match self.numbers.below(16) {
            // Where it may write, and where only the host does.
            0 => self.words(64, self.area, 4096),
            1 => self.words(4096, self.ring, self.slots * SLOT),
            2 => self.words(64, 0, self.memory.bytes),
            3 => self.words(8, self.host_area, 4096),
            // A head that may lie anywhere.
            4 => {
                let head = self.numbers.any() >> self.numbers.below(64);
                self.memory.write(self.area + HEAD, head);
            }
            5 => self.flip(),
            _ => self.report(),
        }
    }

    fn words(&mut self, count: u64, from: u64, bytes: u64) {
        for _ in 0..count {
            let at = from + self.numbers.below(bytes);
            let word = self.numbers.any() >> self.numbers.below(64);
            self.memory.write(at, word);
        }
    }

    /// One bit of a record.
    fn flip(&mut self) {
        let at = self.ring + self.numbers.below(self.slots * SLOT);
        let bit = 1 << self.numbers.below(64);
        self.memory.write(at, self.memory.read(at) ^ bit);
    }

    /// Looks for what the driver has said of files: others share these, and their identity is all it takes to ask for them.
    fn steal(&mut self) {
        for slot in 0..self.slots {
            let first = self.memory.read(self.memory_slot(slot));
            let (kind, slots) = (first & 0xff, first >> 8 & 0xff);
            if kind == FILE && (3..=11).contains(&slots) && first >> 16 & 0xffff == 0 {
                let word = |index| self.memory_slot(slot + index / 4) + index % 4 * 8;
                let words = (0..slots * 4).map(|index| self.memory.read(word(index)));
                self.stolen.push(words.collect());
            }
        }
    }

    /// Announces one of these files, or one that nobody has.
    fn announce(&mut self, file: u64) {
        let stolen = self.numbers.below(2 * self.stolen.len().max(1) as u64);
        let Some(words) = self.stolen.get(stolen as usize) else {
            let uuid = self.numbers.any();
            let at = self.head;
            self.record(FILE, 3, file, [uuid, uuid, 1]);
            let size = self.memory_slot(at + 1);
            self.memory.write(size, FRAMES * 4096);
            return;
        };
        for (index, word) in (0..).zip(words) {
            let at = self.memory_slot(self.head + index / 4) + index % 4 * 8;
            self.memory.write(at, *word);
        }
        let slots = words.len() as u64 / 4;
        let at = self.memory_slot(self.head);
        self.memory.write(at, FILE | slots << 8 | file << 32);
        self.head += slots;
        self.records += 1;
    }

    /// Attaches as a driver does, and reports what may be true by chance only.
    fn report(&mut self) {
        let (area, host) = (self.area, self.host_area);
        let epoch = self.memory.read(area + EPOCH);
        let epoch = epoch.max(self.memory.read(host + HOST_EPOCH));
        let epoch = (epoch & (u64::MAX >> 1)) + 1;
        let instance = self.memory.read(host + HOST_INSTANCE);
        self.memory.write(area + STATE, 0);
        for word in 0..9 {
            self.memory.write(area + word * 8, 0);
        }
        self.memory.write(area + VERSION, 1);
        self.memory.write(area + INSTANCE, instance);
        self.memory.write(area + EPOCH, epoch);
        self.memory.write(area + STATE, 1);
        self.ring_host();
        let deadline = Instant::now() + ATTACH_LIMIT;
        while self.memory.read(host + HOST_EPOCH) != epoch {
            if Instant::now() > deadline {
                return;
            }
            std::thread::yield_now();
        }
        self.head = 0;
        self.record(1, 1, 0, [epoch, FRAMES, 1]);
        for file in 0..4 {
            self.announce(file);
        }
        for _ in 0..self.numbers.below(200) {
            let file = self.numbers.below(5);
            let page = self.numbers.below(FRAMES) >> self.numbers.below(17);
            let frame = self.numbers.below(FRAMES);
            let pages = 1 + (self.numbers.below(4096) >> self.numbers.below(12));
            match self.numbers.below(32) {
                0 => self.record(4, 1, file, [page, pages, 0]),
                1 => self.record(5, 1, 0, [page, pages, 0]),
                2 => {
                    let slots = self.numbers.below(12);
                    let kind = self.numbers.below(8);
                    self.record(kind, slots, file, [page, frame, pages]);
                }
                _ => self.record(3, 1, file, [page, frame, pages]),
            }
        }
        self.memory.write(area + HEAD, self.head);
    }

    fn record(&mut self, kind: u64, slots: u64, file: u64, words: [u64; 3]) {
        let at = self.memory_slot(self.head);
        self.memory.write(at, kind | slots << 8 | file << 32);
        for (index, word) in (1..).zip(words) {
            self.memory.write(at + index * 8, word);
        }
        for slot in 1..slots.min(11) {
            let at = self.memory_slot(self.head + slot);
            for word in 0..4 {
                self.memory.write(at + word * 8, 0);
            }
        }
        self.head += slots;
        self.records += 1;
    }

    fn memory_slot(&self, position: u64) -> u64 {
        self.ring + position % self.slots * SLOT
    }

    fn ring_host(&self) {
        let doorbell = (self.peer << 16) as u32;
        self.registers.write_register(DOORBELL, doorbell);
    }
}
