// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An engine that connects again while requests of its old connection are still to be done.

use crate::hostile::{become_vm_of, welcomed};
use crate::support::{Daemon, Host, content, key};
use pagefusion_host::protocol::{
    Connection, Encoding, EngineReply, EngineRequest, FileSpan, Hello, HelloReply, Holding, Role,
    Segment, Sighting, StorePage, StoreSpan, VERSION, Verdict, Welcome,
};
use pagefusion_host::store::{PAGE, hash_page};
use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(10);

fn ask(connection: &mut Connection, request: &EngineRequest) -> EngineReply {
    connection.send(request).unwrap();
    connection.receive().unwrap()
}

fn span(page: u64, pages: u32) -> FileSpan {
    FileSpan {
        file: key(1),
        page,
        pages,
    }
}

/// Puts a page into the store by reporting it twice.
fn publish(connection: &mut Connection, welcome: &Welcome, page: u64) -> StorePage {
    let bytes = content(1, page);
    let hash = hash_page(welcome.hash_seed, &bytes);
    for (at, verdict) in [(page + 500, Verdict::Remembered), (page, Verdict::Publish)] {
        let sightings = vec![Sighting {
            file: key(1),
            page: at,
            hashes: vec![hash],
        }];
        let reply = ask(connection, &EngineRequest::Sight { sightings });
        assert_eq!(reply, EngineReply::Verdicts(vec![verdict]));
    }
    let spans = vec![span(page, 1)];
    let request = EngineRequest::Publish { spans };
    connection.send_with_payload(&request, &bytes).unwrap();
    match connection.receive().unwrap() {
        EngineReply::Published(pages) => pages[0].unwrap(),
        reply => panic!("{reply:?}"),
    }
}

#[test]
fn what_an_engine_gave_up_waiting_for_is_not_done_after_it_has_connected_again() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let vm = become_vm_of(&host, "g");
    let (mut old, welcome) = welcomed(&vm);
    let page = publish(&mut old, &welcome, 0);
    let release = EngineRequest::Release {
        spans: vec![StoreSpan { page, pages: 1 }],
    };
    // The old connection is held up by a publication. That and the release come too late.
    assert_eq!(host.ctl("set --all --each-vm --publish-rate 256K").0, 0);
    let slow = EngineRequest::Publish {
        spans: vec![span(100, 64)],
    };
    let payload = vec![1; 64 * PAGE];
    old.send_with_payload(&slow, &payload).unwrap();
    old.send_with_payload(&slow, &payload).unwrap();
    old.send(&release).unwrap();
    let _: EngineReply = old.receive().unwrap();

    let (mut new, _) = welcomed(&vm);
    let store = new.take_descriptors().remove(0);
    let holding = Holding {
        span: span(0, 1),
        store: page,
    };
    let announce = EngineRequest::Announce {
        holdings: vec![holding],
        last: true,
    };
    assert_eq!(ask(&mut new, &announce), EngineReply::Done);
    daemon.expect("a request came late");
    // Its end has come without an answer.
    assert_eq!(old.stream().read(&mut [0; 1]).unwrap(), 0);
    let mut bytes = [0; PAGE];
    rustix::io::pread(&store, &mut bytes, u64::from(page) * PAGE as u64).unwrap();
    assert_eq!(bytes, content(1, 0));
    let lookup = EngineRequest::Lookup {
        spans: vec![span(0, 1)],
    };
    let found = Segment {
        pages: 1,
        store: Some(page),
    };
    assert_eq!(ask(&mut new, &lookup), EngineReply::Segments(vec![found]));
}

#[test]
fn a_connection_that_never_asks_ends_no_other() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let vm = become_vm_of(&host, "g");
    let (mut first, _) = welcomed(&vm);
    let lookup = EngineRequest::Lookup { spans: vec![] };
    let nothing = EngineReply::Segments(vec![]);
    assert_eq!(ask(&mut first, &lookup), nothing);
    let (mut second, _) = welcomed(&vm);
    assert_eq!(ask(&mut first, &lookup), nothing);
    assert_eq!(ask(&mut second, &lookup), nothing);
    assert_eq!(first.stream().read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn what_was_granted_in_an_answer_that_was_lost_is_given_back() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let vm = become_vm_of(&host, "g");
    let (mut old, welcome) = welcomed(&vm);
    let pages = [0, 1, 2].map(|page| publish(&mut old, &welcome, page));
    assert_eq!(host.stored_pages(), 3);
    let (mut new, _) = welcomed(&vm);
    for (holding, last) in [(0, false), (2, true)] {
        let holding = Holding {
            span: span(holding, 1),
            store: pages[holding as usize],
        };
        let announce = EngineRequest::Announce {
            holdings: vec![holding],
            last,
        };
        assert_eq!(host.stored_pages(), 3);
        assert_eq!(ask(&mut new, &announce), EngineReply::Done);
    }
    assert_eq!(host.stored_pages(), 2);
}

/// Has the rate be used up by publications that are answered, or waited for by the last.
fn use_rate_up(connection: &mut Connection) {
    let spans = vec![span(100, 64)];
    let slow = EngineRequest::Publish { spans };
    let payload = vec![1; 64 * PAGE];
    for _ in 0..2 {
        connection.send_with_payload(&slow, &payload).unwrap();
    }
}

#[test]
fn connections_that_are_closed_at_one_end_keep_few_threads_busy() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    assert_eq!(host.ctl("set --all --each-vm --publish-rate 256K").0, 0);
    let vm = become_vm_of(&host, "g");
    let before = daemon.niceness().len();
    let (mut busy, _) = welcomed(&vm);
    use_rate_up(&mut busy);
    let mut held = Vec::new();
    for page in 0..40 {
        let stream = UnixStream::connect(vm.directory.join("engine.sock")).unwrap();
        let mut connection = Connection::new(stream, Encoding::Postcard, LIMIT).unwrap();
        let hello = Hello {
            version: VERSION,
            role: Role::Requests,
        };
        // Those beyond the limit are closed at once.
        let welcome = connection.send(&hello).and_then(|()| connection.receive());
        if !matches!(welcome, Ok(HelloReply::Welcome(_))) {
            continue;
        }
        let spans = vec![span(page, 1)];
        let publish = EngineRequest::Publish { spans };
        let sent = connection.send_with_payload(&publish, &[0; PAGE]);
        let half = connection.stream().shutdown(Shutdown::Write);
        if sent.and(half).is_ok() {
            held.push(connection);
        }
    }
    daemon.expect("keeps too many threads busy");
    // One that has made room may not have ended yet.
    let deadline = Instant::now() + LIMIT;
    loop {
        let threads = daemon.niceness().len();
        if threads <= before + 16 {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{threads} threads, {before} before"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
