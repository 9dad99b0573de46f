// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A store so simple that it is right by looking at it, and random sequences on both.
//!
//! The model knows nothing of hashes, layout or indexes: which bytes a store page must have
//! as long as somebody is granted it, and who is granted what.

use super::*;
use crate::protocol::FileKey;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashSet};

const VMS: u32 = 4;
const FILES: u64 = 3;
const FILE_PAGES: u64 = 20;
/// So few contents that the same one comes up under many names.
const CONTENTS: u8 = 12;

#[derive(Clone, Debug)]
enum Step {
    Sight {
        vm: u32,
        file: u64,
        page: u64,
        contents: Vec<u8>,
    },
    Publish {
        vm: u32,
        file: u64,
        page: u64,
        contents: Vec<u8>,
    },
    Lookup {
        vm: u32,
        file: u64,
        page: u64,
        pages: u32,
    },
    Release {
        vm: u32,
        page: StorePage,
        pages: u32,
    },
    Forget {
        vm: u32,
        file: u64,
        page: u64,
        pages: u32,
    },
    End {
        vm: u32,
    },
    /// The daemon dies; of the VMs, those in the mask announce first and then the others.
    Restart {
        early: u8,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let vm = 1..=VMS;
    let place = (0..FILES, 0..FILE_PAGES);
    let contents = prop::collection::vec(0..CONTENTS, 1..6);
    let span = (0..80u32, 1..8u32);
    let step = prop_oneof![
        8 => (vm.clone(), place.clone(), contents.clone())
            .prop_map(|(vm, (file, page), contents)| Step::Sight { vm, file, page, contents }),
        8 => (vm.clone(), place.clone(), contents)
            .prop_map(|(vm, (file, page), contents)| Step::Publish { vm, file, page, contents }),
        6 => (vm.clone(), place.clone(), 1..10u32)
            .prop_map(|(vm, (file, page), pages)| Step::Lookup { vm, file, page, pages }),
        4 => (vm.clone(), span)
            .prop_map(|(vm, (page, pages))| Step::Release { vm, page, pages }),
        1 => (vm.clone(), place, 0..10u32)
            .prop_map(|(vm, (file, page), pages)| Step::Forget { vm, file, page, pages }),
        1 => vm.prop_map(|vm| Step::End { vm }),
        1 => any::<u8>().prop_map(|early| Step::Restart { early }),
    ];
    prop::collection::vec(step, 1..120)
}

fn key(file: u64) -> FileKey {
    let size = FILE_PAGES * PAGE as u64;
    FileKey {
        fs_uuid: [1; 16],
        inode: file,
        size,
        mtime_ns: 0,
        generation: 0,
        kind: 1,
    }
}

fn bytes(content: u8) -> [u8; PAGE] {
    let mut bytes = [content; PAGE];
    bytes[PAGE - 1] = !content;
    bytes
}

/// Both stores and what ties them together.
struct Pair {
    directory: tempfile::TempDir,
    group: Group,
    /// Model: content of every store page that somebody is granted.
    contents: BTreeMap<StorePage, u8>,
    /// Model: who is granted what, and under which name they last saw it.
    granted: BTreeMap<u32, BTreeMap<StorePage, (u64, u64)>>,
    /// Model: contents that each name (VM, file, page) was last said to have.
    sighted: BTreeMap<(u32, u64, u64), u8>,
}

impl Pair {
    fn new() -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let group = Self::open(&directory, HashSet::new());
        let mut pair = Self {
            directory,
            group,
            contents: BTreeMap::new(),
            granted: BTreeMap::new(),
            sighted: BTreeMap::new(),
        };
        (1..=VMS).for_each(|vm| pair.begin(vm));
        pair
    }

    fn open(directory: &tempfile::TempDir, waiting: HashSet<u32>) -> Group {
        let file = StoreFile::open(&directory.path().join("pages")).unwrap();
        Group::new(file, Limits::default(), waiting).unwrap()
    }

    fn begin(&mut self, vm: u32) {
        self.group.add_vm(vm);
        self.granted.insert(vm, BTreeMap::new());
    }

    fn stored(&self, page: StorePage) -> [u8; PAGE] {
        let mut stored = [0; PAGE];
        let fd = self.group.read_only().unwrap();
        rustix::io::pread(&fd, &mut stored, u64::from(page) * PAGE as u64).unwrap();
        stored
    }

    fn grant(&mut self, vm: u32, store: StorePage, name: (u64, u64)) {
        self.granted.get_mut(&vm).unwrap().insert(store, name);
    }

    /// Everything ends, nothing is left, and it begins anew.
    fn empty(&mut self) {
        for vm in 1..=VMS {
            self.group.end_vm(vm);
            self.begin(vm);
        }
        self.sighted.clear();
        self.sweep();
        self.check();
        let left = self.group.statistics();
        assert_eq!((left.store_pages, left.remembered, left.files), (0, 0, 0));
    }

    /// Drops from the model what nobody is granted.
    fn sweep(&mut self) {
        let granted: BTreeSet<_> = self.granted.values().flat_map(BTreeMap::keys).collect();
        self.contents.retain(|page, _| granted.contains(page));
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Sight {
                vm,
                file,
                page,
                contents,
            } => self.sight(vm, file, page, &contents),
            Step::Publish {
                vm,
                file,
                page,
                contents,
            } => self.publish(vm, file, page, &contents),
            Step::Lookup {
                vm,
                file,
                page,
                pages,
            } => self.lookup(vm, file, page, pages),
            Step::Release { vm, page, pages } => {
                self.group
                    .release(vm, &[StoreSpan { page, pages }])
                    .unwrap();
                let end = page + pages;
                self.granted
                    .get_mut(&vm)
                    .unwrap()
                    .retain(|at, _| !(page..end).contains(at));
            }
            Step::Forget {
                vm,
                file,
                page,
                pages,
            } => {
                self.group
                    .forget(
                        vm,
                        FileSpan {
                            file: key(file),
                            page,
                            pages,
                        },
                    )
                    .unwrap();
                let end = if pages == 0 {
                    u64::MAX
                } else {
                    page + u64::from(pages)
                };
                self.sighted
                    .retain(|&(v, f, p), _| !(v == vm && f == file && (page..end).contains(&p)));
            }
            Step::End { vm } => {
                self.group.end_vm(vm);
                self.sighted.retain(|&(of, ..), _| of != vm);
                self.begin(vm);
            }
            Step::Restart { early } => self.restart(early),
        }
        self.sweep();
        self.check();
    }

    fn sight(&mut self, vm: u32, file: u64, first: u64, contents: &[u8]) {
        let seed = self.group.hash_seed();
        let hashes = contents
            .iter()
            .map(|&it| hash_page(seed, &bytes(it)))
            .collect();
        let mut verdicts = Vec::new();
        let sighting = Sighting {
            file: key(file),
            page: first,
            hashes,
        };
        self.group.sight(vm, &[sighting], &mut verdicts).unwrap();
        for ((verdict, &content), page) in verdicts.iter().zip(contents).zip(first..) {
            match *verdict {
                Verdict::Found(store) => {
                    assert_eq!(self.contents.get(&store), Some(&content), "found elsewhere");
                    self.grant(vm, store, (file, page));
                }
                Verdict::Publish => {
                    let mut others = self.sighted.iter();
                    let known =
                        others.any(|(&name, &it)| it == content && name != (vm, file, page));
                    assert!(known, "nobody else has it");
                }
                Verdict::Remembered => {
                    self.sighted.insert((vm, file, page), content);
                }
            }
        }
    }

    fn publish(&mut self, vm: u32, file: u64, first: u64, contents: &[u8]) {
        let data: Vec<u8> = contents.iter().flat_map(|&it| bytes(it)).collect();
        let span = FileSpan {
            file: key(file),
            page: first,
            pages: contents.len() as u32,
        };
        let mut pages = Vec::new();
        self.group.publish(vm, &[span], &data, &mut pages).unwrap();
        for ((store, &content), page) in pages.iter().zip(contents).zip(first..) {
            let Some(store) = *store else {
                assert!(
                    !self.contents.values().any(|&it| it == content),
                    "it is in the store"
                );
                self.sighted.insert((vm, file, page), content);
                continue;
            };
            let before = self.contents.insert(store, content);
            assert!(
                before.is_none_or(|before| before == content),
                "overwritten while granted"
            );
            self.grant(vm, store, (file, page));
        }
    }

    fn lookup(&mut self, vm: u32, file: u64, first: u64, pages: u32) {
        let mut segments = Vec::new();
        let span = FileSpan {
            file: key(file),
            page: first,
            pages,
        };
        self.group.lookup(vm, &[span], &mut segments).unwrap();
        assert_eq!(segments.iter().map(|it| it.pages).sum::<u32>(), pages);
        let mut page = first;
        for Segment { pages, store } in segments {
            for index in 0..pages {
                if let Some(store) = store.map(|store| store + index) {
                    assert!(
                        self.contents.contains_key(&store),
                        "a page that is not there"
                    );
                    self.grant(vm, store, (file, page));
                }
                page += 1;
            }
        }
    }

    fn restart(&mut self, early: u8) {
        let waiting: HashSet<_> = self.granted.keys().copied().collect();
        self.group = Self::open(&self.directory, waiting);
        self.sighted.clear();
        let (first, then): (Vec<u32>, Vec<u32>) = (1..=VMS).partition(|vm| early >> vm & 1 == 1);
        for vm in first.into_iter().chain(then) {
            self.check_contents();
            let holdings: Vec<_> = self.granted[&vm]
                .iter()
                .map(|(&store, &(file, page))| Holding {
                    span: FileSpan {
                        file: key(file),
                        page,
                        pages: 1,
                    },
                    store,
                })
                .collect();
            self.group.announce(vm, &holdings, true).unwrap();
        }
    }

    fn check_contents(&self) {
        for (&page, &content) in &self.contents {
            assert!(
                self.stored(page) == bytes(content),
                "page {page} has changed"
            );
        }
    }

    fn check(&self) {
        self.check_contents();
        let memory = self.group.allocated_bytes().unwrap() / PAGE as u64;
        assert_eq!(
            memory,
            self.contents.len() as u64,
            "memory that nobody is granted"
        );
        assert_eq!(self.group.statistics().store_pages, memory);
        let distinct: BTreeSet<_> = self.contents.values().collect();
        assert_eq!(distinct.len(), self.contents.len(), "stored twice");
        for (&vm, pages) in &self.granted {
            assert_eq!(self.group.vm_statistics(vm).granted, pages.len() as u64);
        }
        let has = |store| move |pages: &&BTreeMap<_, _>| pages.contains_key(store);
        let sharers = |store| self.granted.values().filter(has(store)).count();
        let several = self.contents.keys().filter(|store| sharers(store) > 1);
        assert!(self.group.several().iter().eq(several.copied()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_store_does_what_the_model_does(steps in steps()) {
        let mut pair = Pair::new();
        for step in steps {
            pair.apply(step);
        }
        pair.empty();
    }
}

/// Everything that two VMs can do with two pages of a file, of two contents.
fn alphabet() -> Vec<Step> {
    let mut steps = vec![Step::Restart { early: 2 }, Step::Restart { early: 4 }];
    let (file, pages) = (0, 2);
    for vm in 1..=2 {
        for page in 0..2 {
            for content in 0..2 {
                let contents = vec![content];
                steps.push(Step::Publish {
                    vm,
                    file,
                    page,
                    contents: contents.clone(),
                });
                steps.push(Step::Sight {
                    vm,
                    file,
                    page,
                    contents,
                });
            }
            let store = page as StorePage;
            steps.push(Step::Release {
                vm,
                page: store,
                pages: 1,
            });
        }
        steps.extend([
            Step::Lookup {
                vm,
                file,
                page: 0,
                pages,
            },
            Step::Forget {
                vm,
                file,
                page: 0,
                pages: 1,
            },
            Step::End { vm },
        ]);
    }
    steps
}

/// Every sequence of three steps, and of four where there is time.
#[test]
fn the_store_does_what_the_model_does_in_every_short_sequence() {
    let length = if std::env::var_os("PAGEFUSION_DEEP_TESTS").is_some() {
        4
    } else {
        3
    };
    let alphabet = alphabet();
    let mut sequence = vec![0; length];
    let mut pair = Pair::new();
    loop {
        for &step in &sequence {
            pair.apply(alphabet[step].clone());
        }
        pair.empty();
        let next = sequence.iter().rposition(|step| step + 1 < alphabet.len());
        let Some(at) = next else { return };
        sequence[at] += 1;
        sequence[at + 1..].fill(0);
    }
}
