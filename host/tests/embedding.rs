// SPDX-License-Identifier: Apache-2.0 OR MIT

//! [`Engine`] as a VMM has it: guest memory of `vm-memory`, a device, threads of its own.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::Random;
use common::guest_side::Shared;
use pagefusion_abi::wire::{FileIdentity, Outcome, Record, Request, Run, host_area};
use pagefusion_host::device::PagefusionDevice;
use pagefusion_host::engine::{Engine, Progressed, ReportedRun, SharedMemory, Uffd};
use pagefusion_host::protocol::{ControlReply, ControlRequest, Undo};
use pagefusion_host::store::{Group, PAGE, StoreError};
use vm_device::DeviceMmio;
use vm_device::bus::MmioAddress;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

const PAGES: usize = 64;
/// Where the file lies in guest memory, in pages.
const FILE: usize = 16;
const ALL_PAGES: usize = FILE + 2 * PAGES;

/// A virtual machine without a processor.
struct Vmm {
    engine: Arc<Engine>,
    memory: GuestMemoryMmap,
    module: Shared<SharedMemory>,
    threads: Vec<JoinHandle<()>>,
}

fn group() -> Arc<Mutex<Group>> {
    Arc::new(Mutex::new(Group::anonymous().unwrap()))
}

fn content() -> Vec<u8> {
    Random(11).bytes(PAGES * PAGE)
}

fn identity() -> FileIdentity {
    FileIdentity {
        inode: 5,
        size: (PAGES * PAGE) as u64,
        ..FileIdentity::default()
    }
}

fn at(page: usize) -> GuestAddress {
    GuestAddress((page * PAGE) as u64)
}

fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(30);
    while !happened() {
        assert!(Instant::now() < limit, "waited for: {what}");
        std::thread::yield_now();
    }
}

impl Vmm {
    /// One whose threads have not been started.
    fn idle(group: &Arc<Mutex<Group>>, vm: u32) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(at(0), ALL_PAGES * PAGE)]).unwrap();
        memory.write_slice(&content(), at(FILE)).unwrap();
        let device = Arc::new(PagefusionDevice::new().unwrap());
        let uffd = Uffd::open(None).expect("userfaultfd (root, or vm.unprivileged_userfaultfd)");
        let engine = Engine::new(uffd, &memory, device.clone()).unwrap();
        engine.join(group, vm).unwrap();
        Self {
            engine: Arc::new(engine),
            memory,
            module: Shared::of(&device),
            threads: Vec::new(),
        }
    }

    fn new(group: &Arc<Mutex<Group>>, vm: u32) -> Self {
        let mut vmm = Self::idle(group, vm);
        vmm.serve(|engine| engine.serve_faults().unwrap());
        vmm.serve(|engine| engine.serve_ring().unwrap());
        vmm.module.attach(1);
        vmm.ring();
        vmm.until_host_word("the host to see the guest", host_area::EPOCH, 1);
        vmm.module.produce(&Record::File {
            file: 1,
            identity: identity(),
            name: b"libc.so.6",
        });
        vmm
    }

    fn serve(&mut self, serve: impl FnOnce(&Engine) + Send + 'static) {
        let engine = self.engine.clone();
        self.threads
            .push(std::thread::spawn(move || serve(&engine)));
    }

    /// As the guest's driver does.
    fn ring(&self) {
        let (base, doorbell) = (MmioAddress(0xfe00_0000), 12);
        let peer = 1_u32 << 16;
        let device = self.engine.device();
        device.mmio_write(base, doorbell, &peer.to_le_bytes());
    }

    fn until_host_word(&self, what: &str, field: usize, value: u64) {
        until(what, || self.module.host_word(field) == value);
    }

    /// Reports the file, and waits for the answer.
    fn report(&self) -> Outcome {
        let position = self.module.produce(&Record::Run(Run {
            file: 1,
            pages: PAGES as u32,
            page: 0,
            gfn: FILE as u64,
        }));
        self.ring();
        let head = self.module.head();
        self.until_host_word("an answer", host_area::ACK, head);
        self.module.outcome(position).unwrap()
    }

    fn shared(&self) -> u64 {
        self.engine.status().unwrap().pages_shared
    }

    fn read(&self, page: usize, pages: usize) -> Vec<u8> {
        let mut bytes = vec![0; pages * PAGE];
        self.memory.read_slice(&mut bytes, at(page)).unwrap();
        bytes
    }

    /// Ends the engine's work, and its threads with it.
    fn stop(&mut self) {
        self.engine.stop().unwrap();
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }

    /// Discards guest memory.
    fn discard(&self, page: usize, pages: usize) {
        let address = self.memory.get_host_address(at(page)).unwrap();
        let bytes = pages * PAGE;
        let discard = || common::discard(address as usize, bytes);
        self.engine
            .discard(at(page), bytes as u64, discard)
            .unwrap();
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if !std::thread::panicking() && !self.threads.is_empty() {
            self.stop();
        }
    }
}

/// Two of one group, whose guests have reported the same file and share it.
fn two() -> [Vmm; 2] {
    let group = group();
    let [one, two] = [Vmm::new(&group, 1), Vmm::new(&group, 2)];
    assert_eq!(usize::from(one.report().remembered), PAGES);
    assert_eq!(usize::from(two.report().shared), PAGES);
    // What the first has told of has become worth sharing.
    one.engine.look().unwrap();
    let asked = Request::Report {
        file: 1,
        page: 0,
        pages: PAGES as u64,
    };
    assert_eq!(one.module.take_request(), Some(asked));
    assert_eq!(usize::from(one.report().shared), PAGES);
    [one, two]
}

#[test]
fn engines_of_a_group_share_until_they_are_stopped() {
    let [mut one, mut two] = two();
    for vmm in [&one, &two] {
        let status = vmm.engine.status().unwrap();
        assert_eq!(status.memory_source, "vm-memory");
        assert_eq!(status.memory_bytes, (ALL_PAGES * PAGE) as u64);
        assert_eq!((status.pages_shared, status.pages_broken), (64, 0));
        assert!(status.guest_attached && status.disabled.is_none());
        assert_eq!(vmm.read(FILE, PAGES), content());
    }
    two.memory.write_obj(!content()[0], at(FILE)).unwrap();
    let status = two.engine.status().unwrap();
    assert_eq!((status.pages_shared, status.pages_broken), (63, 1));

    two.stop();
    assert_eq!(two.shared(), 0);
    let mut expected = content();
    expected[0] = !expected[0];
    assert_eq!(two.read(FILE, PAGES), expected);
    assert_eq!(one.read(FILE, PAGES), content());
    assert_eq!(one.shared(), PAGES as u64);
    // A guest that goes on is not listened to any more.
    assert_eq!(two.engine.progress().unwrap(), Progressed::default());
    one.stop();
    assert_eq!(one.read(FILE, PAGES), content());
}

#[test]
fn nothing_is_shared_before_faults_are_served() {
    let mut vmm = Vmm::idle(&group(), 1);
    vmm.module.attach(1);
    let retry = Progressed {
        retry: true,
        ..Progressed::default()
    };
    assert_eq!(vmm.engine.progress().unwrap(), retry);
    assert_eq!(vmm.module.host_word(host_area::EPOCH), 0);
    vmm.serve(|engine| engine.serve_faults().unwrap());
    until("somebody to serve faults", || {
        vmm.engine.progress().unwrap().ring
    });
    assert_eq!(vmm.module.host_word(host_area::EPOCH), 1);
}

#[test]
fn what_is_undone_without_a_thread_for_faults_is_refused_and_does_not_wait() {
    let group = group();
    let [one, two] = [Vmm::idle(&group, 1), Vmm::idle(&group, 2)];
    share_past_the_engine(&one, &two);
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(at(0), PAGE)]).unwrap();
    assert!(two.engine.stop().is_err());
    assert!(two.engine.undo(&Undo::All).is_err());
    assert!(two.engine.disable("a test").is_err());
    assert!(two.engine.set_guest_memory(&memory).is_err());
    assert!(two.engine.change(at(0), 1, || ()).is_err());
    let tidy = ControlRequest::Tidy { alone: Vec::new() };
    assert!(matches!(two.engine.answer(tidy), ControlReply::Error(_)));
    assert_eq!(two.shared(), PAGES as u64);
}

/// By [`Engine::sharing`], which asks nobody to serve faults.
fn share_past_the_engine(one: &Vmm, two: &Vmm) {
    let run = ReportedRun {
        file: identity().into(),
        page: 0,
        gfn: FILE as u64,
        pages: PAGES as u32,
    };
    one.engine.sharing().share(&[run]);
    let outcome = two.engine.sharing().share(&[run])[0];
    assert_eq!(usize::from(outcome.shared), PAGES);
}

#[test]
fn a_guest_sees_nothing_of_an_engine_that_is_dropped_without_an_end() {
    let group = group();
    let [one, two] = [Vmm::idle(&group, 1), Vmm::idle(&group, 2)];
    share_past_the_engine(&one, &two);
    let memory = two.memory.clone();
    drop([one, two]);
    let mut bytes = vec![0; PAGES * PAGE];
    memory.read_slice(&mut bytes, at(FILE)).unwrap();
    assert_eq!(bytes, content());
}

#[test]
fn discarded_memory_is_zeros_before_and_after_the_end() {
    let [_one, mut two] = two();
    two.memory.write_obj(!content()[0], at(FILE)).unwrap();
    two.memory.write_obj(!content()[0], at(FILE + 4)).unwrap();
    two.discard(FILE, 2);
    assert!(two.read(FILE, 2).iter().all(|byte| *byte == 0));
    assert_eq!(two.shared(), PAGES as u64 - 3);
    assert_eq!(two.read(FILE + 5, 59), content()[5 * PAGE..]);
    two.stop();
    two.discard(FILE + 4, 1);
    assert!(two.read(FILE + 4, 1).iter().all(|byte| *byte == 0));
    assert_eq!(two.read(FILE + 5, 59), content()[5 * PAGE..]);
}

#[test]
fn less_than_a_page_is_not_discarded() {
    let [_one, two] = two();
    let (from, bytes) = (GuestAddress((FILE * PAGE) as u64 + 8), PAGE as u64);
    two.engine.discard(from, bytes, || ()).unwrap();
    assert_eq!(two.read(FILE, PAGES), content());
    assert_eq!(two.shared(), PAGES as u64);
}

#[test]
fn memory_is_ordinary_while_the_vmm_changes_it_and_shared_again_afterwards() {
    let [_one, two] = two();
    let bytes = (PAGES * PAGE) as u64;
    let while_changed = two.engine.change(at(FILE), bytes, || two.shared()).unwrap();
    assert_eq!(while_changed, 0);
    assert_eq!(two.read(FILE, PAGES), content());
    two.engine.look().unwrap();
    assert_eq!(two.module.take_request(), Some(Request::Rescan));
    assert_eq!(usize::from(two.report().shared), PAGES);
}

#[test]
fn plugged_memory_is_asked_for_and_unplugged_memory_is_ordinary() {
    let [_one, two] = two();
    let end = GuestAddress((ALL_PAGES * PAGE) as u64);
    let plugged = GuestMemoryMmap::from_ranges(&[(end, PAGE)]).unwrap();
    let region = plugged.remove_region(end, PAGE as u64).unwrap().1;
    let more = two.memory.insert_region(region).unwrap();
    two.engine.set_guest_memory(&more).unwrap();
    assert_eq!(two.module.take_request(), Some(Request::Rescan));
    assert_eq!(two.shared(), PAGES as u64);
    two.engine.set_guest_memory(&plugged).unwrap();
    assert_eq!(two.shared(), 0);
    assert_eq!(two.read(FILE, PAGES), content());
}

#[test]
fn the_daemon_is_answered() {
    let [_one, two] = two();
    let files = two.engine.answer(ControlRequest::Files { after: None });
    let ControlReply::Files(files) = files else {
        panic!("{files:?}");
    };
    assert_eq!((&*files[0].name, files[0].pages_shared), ("libc.so.6", 64));
    let ControlReply::Status(status) = two.engine.answer(ControlRequest::Status) else {
        panic!("no status");
    };
    assert_eq!(status.pages_shared, PAGES as u64);
    let undo = ControlRequest::Undo(Undo::Files(vec![files[0].file]));
    assert_eq!(two.engine.answer(undo), ControlReply::Done);
    assert_eq!(two.module.host_word(host_area::PAGES_SHARED), 0);
    assert_eq!(usize::from(two.report().shared), PAGES);
    let all = ControlRequest::Undo(Undo::All);
    assert_eq!(two.engine.answer(all), ControlReply::Done);
    assert_eq!(two.report().shared, 0, "paused");
    assert_eq!(
        two.engine.answer(ControlRequest::Resume),
        ControlReply::Done
    );
    assert_eq!(usize::from(two.report().shared), PAGES);
}

#[test]
fn a_guest_is_told_at_once_when_a_look_finds_that_it_shares_less() {
    let [_one, mut two] = two();
    let told = |vmm: &Vmm| vmm.module.host_word(host_area::PAGES_SHARED);
    let rung = |vmm: &Vmm| {
        let mut counter = [0; 8];
        rustix::io::read(vmm.engine.device().interrupt(), &mut counter).is_ok()
    };
    // A hole, which stays in the overlay.
    two.memory.write_obj(!content()[0], at(FILE + 9)).unwrap();
    rung(&two);
    let tidy = || {
        let alone = Vec::new();
        let answer = two.engine.answer(ControlRequest::Tidy { alone });
        assert_eq!(answer, ControlReply::Done);
    };
    assert_eq!(told(&two), PAGES as u64);
    tidy();
    assert_eq!((told(&two), rung(&two)), (PAGES as u64 - 1, true));
    assert_eq!(two.shared(), told(&two));
    tidy();
    assert_eq!((told(&two), rung(&two)), (PAGES as u64 - 1, false));

    let pages = Undo::Pages {
        gfn: FILE as u64,
        pages: 4,
    };
    two.engine.undo(&pages).unwrap();
    assert_eq!((told(&two), rung(&two)), (PAGES as u64 - 5, true));
    two.stop();
    assert_eq!(told(&two), 0);
}

#[test]
fn a_second_store_is_refused() {
    let vmm = Vmm::idle(&group(), 1);
    let again = vmm.engine.join(&group(), 1);
    assert!(matches!(again, Err(StoreError::Refused(_))));
    assert!(vmm.engine.is_connected());
}

#[test]
fn what_is_written_while_it_is_shared_and_undone_is_never_lost() {
    let [_one, two] = two();
    let (stop, content) = (AtomicU64::new(0), content());
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut count = 0_u64;
            while stop.load(Ordering::Relaxed) == 0 {
                for page in 0..PAGES {
                    let place = at(FILE + page);
                    two.memory.write_obj(count, place).unwrap();
                    assert_eq!(two.memory.read_obj::<u64>(place).unwrap(), count);
                    let original = &content[page * PAGE..][..8];
                    two.memory.write_slice(original, place).unwrap();
                }
                count += 1;
            }
        });
        for _ in 0..50 {
            two.report();
            two.engine.undo(&Undo::Pages { gfn: 0, pages: 99 }).unwrap();
        }
        stop.store(1, Ordering::Relaxed);
        writer.join().unwrap();
    });
    assert_eq!(two.read(FILE, PAGES), content);
}
