// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Clients that mean harm: they harm only themselves.

use crate::support::key;
use crate::support::{Daemon, Host, Vmm};
use pagefusion_host::protocol::{
    AdminClient, Connection, CreatedVm, Encoding, EngineReply, EngineRequest, FileSpan, Hello,
    HelloReply, Role, StoreSpan, VERSION, Welcome,
};
use pagefusion_host::store::PAGE;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(10);

/// This process is the hostile VM, so only one test can have it at a time: each gets a
/// daemon of its own.
fn become_vm(host: &Host) -> CreatedVm {
    become_vm_of(host, "g")
}

pub(crate) fn become_vm_of(host: &Host, group: &str) -> CreatedVm {
    AdminClient::connect(&host.runtime())
        .unwrap()
        .create_vm(None, Some(group.into()))
        .unwrap()
}

fn raw(vm: &CreatedVm) -> UnixStream {
    let stream = UnixStream::connect(vm.directory.join("engine.sock")).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

fn greeted(vm: &CreatedVm) -> Connection {
    welcomed(vm).0
}

pub(crate) fn welcomed(vm: &CreatedVm) -> (Connection, Welcome) {
    let mut connection = Connection::new(raw(vm), Encoding::Postcard, LIMIT)
        .unwrap()
        .accepting_descriptors();
    connection
        .send(&Hello {
            version: VERSION,
            role: Role::Requests,
        })
        .unwrap();
    let HelloReply::Welcome(welcome) = connection.receive().unwrap() else {
        panic!("not welcome");
    };
    (connection, *welcome)
}

fn is_closed(mut stream: &UnixStream) -> bool {
    match stream.read(&mut [0; 1]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn bad_lengths_and_rubbish_end_the_connection_and_nothing_else() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let vm = become_vm(&host);
    for bytes in [&[0xff; 64][..], &[0, 0, 0, 0], &[3, 0, 0, 0, 1, 2, 3]] {
        let mut stream = raw(&vm);
        stream.write_all(bytes).unwrap();
        assert!(is_closed(&stream));
    }
    let mut connection = greeted(&vm);
    connection
        .send(&EngineRequest::Lookup { spans: vec![] })
        .unwrap();
    assert_eq!(
        connection.receive::<EngineReply>().unwrap(),
        EngineReply::Segments(vec![])
    );
}

#[test]
fn another_version_is_told_what_to_do() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let vm = become_vm(&host);
    for _ in 0..5 {
        let mut connection = Connection::new(raw(&vm), Encoding::Postcard, LIMIT).unwrap();
        connection
            .send(&Hello {
                version: VERSION + 1,
                role: Role::Requests,
            })
            .unwrap();
        let HelloReply::Refused(reason) = connection.receive().unwrap() else {
            panic!("accepted another version");
        };
        assert!(reason.contains("start the VM again"), "{reason}");
        assert!(is_closed(connection.stream()));
    }
    // However long it goes on trying, the log stays short.
    for times in [1, 2, 4] {
        let line = daemon.line("speaks version");
        assert!(line.contains(&format!("({times} times so far)")), "{line}");
    }
}

#[test]
fn requests_beyond_the_limits_are_refused() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let vm = become_vm(&host);
    let mut connection = greeted(&vm);
    let span = FileSpan {
        file: key(1),
        page: 0,
        pages: u32::MAX,
    };
    let refused = [
        EngineRequest::Lookup {
            spans: vec![span; 1000],
        },
        EngineRequest::Publish {
            spans: vec![FileSpan {
                page: u64::MAX,
                pages: 0,
                ..span
            }],
        },
        EngineRequest::Publish {
            spans: vec![span; 2],
        },
    ];
    for request in refused {
        connection.send(&request).unwrap();
        let reply = connection.receive::<EngineReply>().unwrap();
        let is_refused = matches!(reply, EngineReply::Error(_) | EngineReply::Published(_));
        assert!(is_refused, "{reply:?}");
    }
    // After the last one nobody knows what would be payload.
    assert!(is_closed(connection.stream()));
}

#[test]
fn pages_that_were_not_granted_cannot_be_taken_from_others() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let mut one = Vmm::start(&host, "one", "g");
    let mut two = Vmm::start(&host, "two", "g");
    for vmm in [&mut one, &mut two] {
        vmm.tell("connect");
        vmm.tell("share 1 0 9");
    }
    let vm = become_vm(&host);
    let mut connection = greeted(&vm);
    let spans = vec![
        StoreSpan {
            page: 0,
            pages: u32::MAX
        };
        10
    ];
    connection.send(&EngineRequest::Release { spans }).unwrap();
    assert_eq!(
        connection.receive::<EngineReply>().unwrap(),
        EngineReply::Done
    );
    let forget = EngineRequest::Forget {
        span: FileSpan {
            file: key(1),
            page: 0,
            pages: 0,
        },
    };
    connection.send(&forget).unwrap();
    assert_eq!(
        connection.receive::<EngineReply>().unwrap(),
        EngineReply::Done
    );
    assert_eq!(host.stored_pages(), 9);
    assert_eq!(two.tell("check"), "9 of 9");
}

#[test]
fn no_process_can_speak_for_another_vm() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let vmm = Vmm::start(&host, "one", "g");
    for socket in ["engine.sock", "ivshmem.sock"] {
        let stream = UnixStream::connect(vmm.directory.join(socket)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        assert!(is_closed(&stream), "{socket}");
        daemon.expect("tried to connect as VM");
    }
    assert_ne!(vmm.pid(), std::process::id() as i32);
}

#[test]
fn connections_are_limited() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let vm = become_vm(&host);
    let mut held: Vec<_> = (0..4).map(|_| greeted(&vm)).collect();
    assert!(is_closed(&raw(&vm)));
    held.pop();
    // The place is free as soon as the daemon can see that the connection is closed.
    held.push(greeted(&vm));
}

#[test]
fn memory_between_pages_is_given_back_without_tidying_up() {
    const STRAYS: u64 = 1000;
    let host = Host::new();
    let _daemon = Daemon::start_with(&host, &["--tidy-interval", "0"]);
    let mut vmms = ["one", "two"].map(|name| Vmm::start(&host, name, "g"));
    for vmm in &mut vmms {
        vmm.tell("connect");
        vmm.tell("share 1 0 20");
    }
    assert_eq!(host.stored_pages(), 20);
    // What reading a hole in a mapping does: the page takes memory.
    let store = std::fs::File::options()
        .write(true)
        .open(&host.store_files()[0])
        .unwrap();
    for page in 5000..5000 + STRAYS {
        store.write_all_at(&[0; PAGE], page * PAGE as u64).unwrap();
    }
    let begin = Instant::now();
    while host.stored_pages() != 20 {
        assert!(begin.elapsed() < 3 * LIMIT, "{}", host.stored_pages());
        std::thread::sleep(Duration::from_millis(100));
    }
}
