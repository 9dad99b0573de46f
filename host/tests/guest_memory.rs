// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guest memory of `vm-memory`, which the engine keeps mapped as long as something lies over it.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use common::{Random, file, fill};
use pagefusion_host::engine::{
    Memory, Region, ReportedRun, Sharing, StoreView, Uffd, audit, serve_faults,
};
use pagefusion_host::store::{Group, LocalStore, PAGE};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestRegionMmap};

const PAGES: usize = 32;
/// Where the second region of a guest begins.
const HIGH: u64 = 1 << 32;

fn at(page: usize) -> GuestAddress {
    GuestAddress((page * PAGE) as u64)
}

fn guest_memory(ranges: &[(GuestAddress, usize)]) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(ranges).unwrap()
}

/// The region at `address`, for as long as somebody else has it.
fn watch(memory: &GuestMemoryMmap, address: GuestAddress) -> Weak<GuestRegionMmap> {
    let bytes = (PAGES * PAGE) as u64;
    let (_, region) = memory.remove_region(address, bytes).unwrap();
    Arc::downgrade(&region)
}

/// The engine of a VM whose pages a store has.
struct Scene {
    sharing: Arc<Sharing>,
    bytes: Vec<u8>,
    _others: [LocalStore; 2],
    stop: Option<OwnedFd>,
    faults: Option<JoinHandle<()>>,
}

impl Scene {
    fn new() -> Self {
        let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
        let bytes = Random(3).bytes(PAGES * PAGE);
        let others = fill(&group, file(1), &bytes);
        let uffd = Uffd::open(None).expect("userfaultfd (root, or vm.unprivileged_userfaultfd)");
        let events = uffd.try_clone().unwrap();
        let sharing = Arc::new(Sharing::new(Memory::new(uffd).unwrap()));
        let (until, stop) = rustix::pipe::pipe().unwrap();
        let faults = std::thread::spawn({
            let sharing = sharing.clone();
            move || serve_faults(&events, &sharing, until.as_fd()).unwrap()
        });
        let store = LocalStore::new(group, 1);
        let view = StoreView::new(store.read_only().unwrap()).unwrap();
        let seed = store.hash_seed();
        sharing.connect(Box::new(store), view, seed).unwrap();
        Self {
            sharing,
            bytes,
            _others: others,
            stop: Some(stop),
            faults: Some(faults),
        }
    }

    fn set(&self, memory: &GuestMemoryMmap) -> bool {
        self.sharing.memory().set_guest_memory(memory).unwrap()
    }

    /// Has the guest read the file into its memory at `address`, and report it.
    fn share_at(&self, memory: &GuestMemoryMmap, address: GuestAddress) {
        memory.write_slice(&self.bytes, address).unwrap();
        let run = ReportedRun {
            file: file(1),
            page: 0,
            gfn: address.raw_value() / PAGE as u64,
            pages: PAGES as u32,
        };
        assert_eq!(usize::from(self.sharing.share(&[run])[0].shared), PAGES);
    }

    fn shared(&self) -> u64 {
        audit(&self.sharing).unwrap().intact
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.sharing.undo_all();
        self.sharing.disconnect();
        drop(self.stop.take());
        if let Some(faults) = self.faults.take() {
            faults.join().unwrap();
        }
    }
}

#[test]
fn memory_is_kept_until_the_engine_does_not_know_it_any_more() {
    let scene = Scene::new();
    let memory = guest_memory(&[(at(0), PAGES * PAGE), (GuestAddress(HIGH), PAGES * PAGE)]);
    assert!(scene.set(&memory));
    assert!(!scene.set(&memory), "the same again");
    scene.share_at(&memory, at(0));
    scene.share_at(&memory, GuestAddress(HIGH));
    assert_eq!(scene.shared(), 2 * PAGES as u64);
    let (low, high) = (watch(&memory, at(0)), watch(&memory, GuestAddress(HIGH)));

    // The VMM lets go of all of it without a word.
    drop(memory);
    let mut found = vec![0; PAGES * PAGE];
    for region in [&low, &high] {
        let region = region.upgrade().expect("kept by the engine");
        region
            .read_slice(&mut found, vm_memory::MemoryRegionAddress(0))
            .unwrap();
        assert_eq!(found, scene.bytes);
    }

    let left = GuestMemoryMmap::from_arc_regions(vec![low.upgrade().unwrap()]).unwrap();
    assert!(!scene.set(&left), "nothing new");
    assert!(high.upgrade().is_none(), "nobody needs it");
    assert_eq!(scene.shared(), PAGES as u64);
    assert!(scene.set(&guest_memory(&[(at(0), PAGES * PAGE)])));
    drop(left);
    scene.sharing.memory().let_go();
    assert!(low.upgrade().is_none());
    assert_eq!(scene.shared(), 0);
}

#[test]
fn what_a_guest_has_written_can_be_discarded_after_its_region_has_gone() {
    let scene = Scene::new();
    let memory = guest_memory(&[(at(0), PAGES * PAGE), (GuestAddress(HIGH), PAGES * PAGE)]);
    scene.set(&memory);
    scene.share_at(&memory, GuestAddress(HIGH));
    memory
        .write_obj(!scene.bytes[0], GuestAddress(HIGH))
        .unwrap();
    let high = watch(&memory, GuestAddress(HIGH));
    let bytes = (PAGES * PAGE) as u64;
    let (less, region) = memory.remove_region(GuestAddress(HIGH), bytes).unwrap();
    drop(memory);
    scene.set(&less);

    // The VMM has it still, and its content is what the guest left there.
    let mut found = vec![0; PAGES * PAGE];
    let start = vm_memory::MemoryRegionAddress(0);
    region.read_slice(&mut found, start).unwrap();
    assert_eq!(found[0], !scene.bytes[0]);
    assert_eq!(found[1..], scene.bytes[1..]);
    let hva = region.as_ptr() as usize;
    let whole = hva..hva + PAGES * PAGE;
    scene
        .sharing
        .memory()
        .before_discard(&whole, false)
        .unwrap();
    region.read_slice(&mut found, start).unwrap();
    assert!(found[..PAGE].iter().all(|byte| *byte == 0));

    // Kept for the sake of what the guest has written, until nobody can ask for it.
    let again = GuestMemoryMmap::from_arc_regions(vec![region]).unwrap();
    scene.set(&again);
    scene.share_at(&again, GuestAddress(HIGH));
    again
        .write_obj(!scene.bytes[0], GuestAddress(HIGH))
        .unwrap();
    scene.set(&less);
    drop(again);
    assert!(high.upgrade().is_some());
    scene.sharing.memory().let_go();
    assert!(high.upgrade().is_none());
}

#[test]
fn regions_that_are_not_of_whole_pages_are_refused_all_together() {
    let scene = Scene::new();
    let memory = guest_memory(&[(at(0), PAGES * PAGE), (at(PAGES), PAGE / 2)]);
    let refused = scene.sharing.memory().set_guest_memory(&memory);
    assert_eq!(
        refused.unwrap_err().kind(),
        std::io::ErrorKind::InvalidInput
    );
    assert_eq!(scene.sharing.memory().bytes(), 0);
    let region = Region::all_of(&guest_memory(&[(at(3), 2 * PAGE)])).unwrap();
    assert_eq!((region[0].gfn, region[0].pages), (3, 2));
    assert_eq!(memory.num_regions(), 2);
}
