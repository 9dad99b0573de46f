// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Trust groups against a client that keeps to nothing: it learns nothing of another group,
//! and takes no more than its limits.

use crate::hostile::{become_vm_of, welcomed};
use crate::support::{Daemon, Host, Vmm, content, key};
use pagefusion_host::protocol::{
    Connection, EngineReply, EngineRequest, FileSpan, Holding, Sighting, StoreSpan, VmStatus,
};
use pagefusion_host::store::hash_page;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

fn ask(connection: &mut Connection, request: &EngineRequest, payload: &[u8]) -> EngineReply {
    connection.send_with_payload(request, payload).unwrap();
    connection.receive().unwrap()
}

fn span(inode: u64, page: u64, pages: u32) -> FileSpan {
    FileSpan {
        file: key(inode),
        page,
        pages,
    }
}

fn bytes(inode: u64, pages: std::ops::Range<u64>) -> Vec<u8> {
    pages.flat_map(|page| content(inode, page)).collect()
}

/// Everything that can be asked, about pages 0 to 9 of file 1.
fn ask_all(connection: &mut Connection, seed: u64) -> Vec<EngineReply> {
    let hashes = (0..9).map(|page| hash_page(seed, &content(1, page)));
    let sighting = Sighting {
        file: key(1),
        page: 0,
        hashes: hashes.collect(),
    };
    let holding = Holding {
        span: span(1, 0, 9),
        store: 0,
    };
    let all = StoreSpan {
        page: 0,
        pages: u32::MAX,
    };
    let requests = [
        EngineRequest::Announce {
            holdings: vec![holding],
            last: true,
        },
        EngineRequest::Lookup {
            spans: vec![span(1, 0, 9)],
        },
        EngineRequest::Publish {
            spans: vec![span(1, 0, 9)],
        },
        EngineRequest::Sight {
            sightings: vec![sighting],
        },
        EngineRequest::Lookup {
            spans: vec![span(1, 0, 9)],
        },
        EngineRequest::Release { spans: vec![all] },
        EngineRequest::Forget {
            span: span(1, 0, 0),
        },
    ];
    let payload = bytes(1, 0..9);
    requests
        .iter()
        .map(|request| {
            let payload: &[u8] = match request {
                EngineRequest::Publish { .. } => &payload,
                _ => &[],
            };
            ask(connection, request, payload)
        })
        .collect()
}

/// Bytes that a store descriptor can read.
fn size(descriptors: &[OwnedFd]) -> u64 {
    rustix::fs::fstat(descriptors[0].as_fd()).unwrap().st_size as u64
}

#[test]
fn a_vm_sees_the_same_whether_another_group_has_its_pages_or_not() {
    let mut seen = Vec::new();
    for others in [false, true] {
        let host = Host::new();
        let _daemon = Daemon::start(&host);
        let mut vms = Vec::new();
        if others {
            for name in ["one", "two"] {
                let mut vmm = Vmm::start(&host, name, "theirs");
                vmm.tell("connect");
                vmm.tell("share 1 0 9");
                vms.push(vmm);
            }
            assert_eq!(host.stored_pages(), 9);
        }
        let vm = become_vm_of(&host, "ours");
        let (mut connection, welcome) = welcomed(&vm);
        let descriptors = connection.take_descriptors();
        let replies = ask_all(&mut connection, welcome.hash_seed);
        seen.push((replies, size(&descriptors)));
        if let [_, two] = &mut vms[..] {
            // And it has harmed nobody.
            assert_eq!(two.tell("check"), "9 of 9");
            assert_eq!(host.stored_pages(), 9);
        }
    }
    assert_eq!(seen[0], seen[1]);
}

fn vm_status(host: &Host, name: &str) -> VmStatus {
    let mut vms = host.status().vms;
    vms.retain(|vm| vm.name == name);
    vms.remove(0)
}

#[test]
fn a_client_that_ignores_its_limits_is_held_to_them() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let (status, _, errors) = host.ctl("set --group g --each-vm --max-overlays 40K");
    assert_eq!(status, 0, "{errors}");
    host.ctl("set --group g --max-store 80K");
    let mut honest = Vmm::start(&host, "honest", "g");
    honest.tell("connect");
    honest.tell("share 1 0 60");
    let vm = become_vm_of(&host, "g");
    let (mut connection, welcome) = welcomed(&vm);
    for _ in 0..3 {
        for page in 0..60 {
            let hashes = vec![hash_page(welcome.hash_seed, &content(1, page))];
            let sighting = Sighting {
                file: key(1),
                page,
                hashes,
            };
            let request = EngineRequest::Sight {
                sightings: vec![sighting],
            };
            ask(&mut connection, &request, &[]);
        }
        let publish = EngineRequest::Publish {
            spans: vec![span(1, 0, 60)],
        };
        let EngineReply::Published(pages) = ask(&mut connection, &publish, &bytes(1, 0..60)) else {
            panic!("not published");
        };
        assert_eq!(pages.iter().flatten().count(), 10);
    }
    let hostile = vm_status(&host, &vm.name);
    assert_eq!(
        (hostile.pages_granted, hostile.limits.max_overlays),
        (10, Some(40 << 10))
    );
    assert!(hostile.pages_limited >= 50);
    assert_eq!(host.stored_pages(), 10);

    // One VM more that it may have, and then the group is full.
    assert_eq!(
        host.ctl(&format!("set --vm {} --max-overlays 200K", vm.name))
            .0,
        0
    );
    let publish = EngineRequest::Publish {
        spans: vec![span(1, 0, 60)],
    };
    ask(&mut connection, &publish, &bytes(1, 0..60));
    assert_eq!(vm_status(&host, &vm.name).pages_granted, 20);
    assert_eq!(host.stored_pages(), 20);
    let (_, text, _) = host.ctl("explain honest");
    assert!(!text.contains("limit ("), "{text}");

    // Limits outlive the daemon.
    drop(daemon);
    let _daemon = Daemon::start(&host);
    let group = &host.status().groups[0];
    assert_eq!(group.limits.max_store, Some(80 << 10));
    assert_eq!(
        vm_status(&host, &vm.name).limits.max_overlays,
        Some(200 << 10)
    );
}

#[test]
fn a_client_in_a_hurry_waits() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let (status, _, errors) = host.ctl("set --all --each-vm --publish-rate 1K");
    assert_eq!(status, 1);
    assert!(errors.contains("cannot be below"), "{errors}");
    assert_eq!(host.ctl("set --all --each-vm --publish-rate 256K").0, 0);
    let vm = become_vm_of(&host, "g");
    let mut connection = welcomed(&vm).0;
    let begin = Instant::now();
    let publish = EngineRequest::Publish {
        spans: vec![span(1, 0, 64)],
    };
    let payload = bytes(1, 0..64);
    for _ in 0..3 {
        connection.send_with_payload(&publish, &payload).unwrap();
    }
    for _ in 0..3 {
        let _: EngineReply = connection.receive().unwrap();
    }
    // The first second's worth was saved up.
    assert!(
        begin.elapsed() >= Duration::from_millis(1900),
        "{:?}",
        begin.elapsed()
    );
    // Others are not held up.
    let mut other = Vmm::start(&host, "other", "g");
    other.tell("connect");
    let begin = Instant::now();
    other.tell("share 2 0 5");
    assert!(
        begin.elapsed() < Duration::from_secs(1),
        "{:?}",
        begin.elapsed()
    );
}
