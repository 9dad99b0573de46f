// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Messages between VMM, daemon and operator, and what the daemon answers.

use crate::input::Input;
use pagefusion_host::daemon::serve_requests_alone;
use pagefusion_host::protocol::{
    AdminReply, AdminRequest, Connection, ControlReply, ControlRequest, Encoding, EngineReply,
    EngineRequest, FileKey, FileSpan, Hello, HelloReply, Holding, Sighting, StorePage, StoreSpan,
    Verdict,
};
use pagefusion_host::store::{Group, PAGE, hash_page};
use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const VMS: u32 = 3;
/// Only reached on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(10);

/// A VMM that says anything, one that keeps to the form and not to the sense, and the other
/// ends of all connections.
pub fn protocol(data: &[u8]) {
    let mut input = Input(data);
    match input.below(4) {
        0 => serve_anything(&mut input),
        1 | 2 => serve_nonsense(&mut input),
        _ => read_anything(&mut input),
    }
}

struct Store {
    group: Arc<Mutex<Group>>,
    undone: Arc<HashSet<FileKey>>,
    seed: u64,
}

impl Store {
    fn new() -> Self {
        let mut group = Group::anonymous().expect("memory");
        (1..=VMS).for_each(|vm| group.add_vm(vm));
        Self {
            seed: group.hash_seed(),
            group: Arc::new(Mutex::new(group)),
            undone: Arc::new(HashSet::from([key(3)])),
        }
    }

    fn group(&self) -> std::sync::MutexGuard<'_, Group> {
        self.group.lock().expect("no request makes it panic")
    }

    /// Serves what was said, and returns the other end.
    fn serve(&self, vm: u32, said: &[u8]) -> UnixStream {
        let (mut theirs, ours) = UnixStream::pair().expect("descriptors");
        theirs.set_nonblocking(true).expect("a socket");
        // What does not fit is lost, as from a VMM that died.
        let _ = theirs.write(said);
        theirs.shutdown(Shutdown::Write).expect("a socket");
        // It ends with the connection: an error as a rule.
        let _ = serve_requests_alone(ours, PATIENCE, vm, &self.undone, &self.group);
        theirs.set_nonblocking(false).expect("a socket");
        theirs
    }

    /// When all have ended nothing is left.
    fn end(self) {
        let mut group = self.group();
        (1..=VMS).for_each(|vm| group.end_vm(vm));
        let left = group.statistics();
        assert_eq!(
            (left.store_pages, left.remembered, left.files, left.adopting),
            (0, 0, 0, false)
        );
        assert_eq!(group.allocated_bytes().expect("a file"), 0);
    }
}

fn serve_anything(input: &mut Input<'_>) {
    let store = Store::new();
    while !input.is_empty() {
        let vm = u32::from(input.below(VMS as u8 + 1));
        // As many answers as the socket takes unread.
        let length = usize::from(input.u8()) * 4;
        store.serve(vm, input.bytes(length));
    }
    store.end();
}

fn key(inode: u64) -> FileKey {
    FileKey {
        fs_uuid: [1; 16],
        inode,
        size: 20 * PAGE as u64,
        mtime_ns: 0,
        generation: 0,
        kind: 0,
    }
}

/// Few contents, so that the same comes up under many names.
fn content(number: u8) -> [u8; PAGE] {
    [number % 16; PAGE]
}

fn span(input: &mut Input<'_>) -> FileSpan {
    FileSpan {
        file: key(u64::from(input.below(4))),
        page: match input.below(8) {
            0 => input.number(),
            _ => u64::from(input.below(20)),
        },
        pages: match input.below(8) {
            0 => input.number() as u32,
            _ => u32::from(input.below(6)),
        },
    }
}

/// What a request says that its pages hold, for those requests that do.
type Said = Vec<u8>;

fn request(input: &mut Input<'_>, seed: u64) -> (EngineRequest, Vec<u8>, Said) {
    let contents = |input: &mut Input<'_>, most| -> Said {
        let count = input.below(most);
        (0..count).map(|_| input.below(16)).collect()
    };
    let request = match input.below(6) {
        0 => {
            let holdings = (0..input.below(3))
                .map(|_| Holding {
                    span: span(input),
                    store: input.number() as StorePage,
                })
                .collect();
            let last = input.below(2) == 0;
            EngineRequest::Announce { holdings, last }
        }
        1 => {
            let spans = (0..input.below(4)).map(|_| span(input)).collect();
            EngineRequest::Lookup { spans }
        }
        2 => {
            let contents = contents(input, 8);
            let at = span(input);
            let hash = |it: &u8| hash_page(seed, &content(*it));
            let sighting = Sighting {
                file: at.file,
                page: at.page,
                hashes: contents.iter().map(hash).collect(),
            };
            let sightings = vec![sighting];
            return (EngineRequest::Sight { sightings }, Vec::new(), contents);
        }
        3 => {
            let contents = contents(input, 5);
            let payload = contents.iter().flat_map(|it| content(*it)).collect();
            let first = u32::from(input.below(contents.len() as u8 + 1));
            let mut part = |pages| FileSpan {
                pages,
                ..span(input)
            };
            let spans = vec![part(first), part(contents.len() as u32 - first)];
            return (EngineRequest::Publish { spans }, payload, contents);
        }
        4 => {
            let spans = (0..input.below(4))
                .map(|_| StoreSpan {
                    page: u32::from(input.u8()),
                    pages: input.number() as u32,
                })
                .collect();
            EngineRequest::Release { spans }
        }
        _ => EngineRequest::Forget { span: span(input) },
    };
    (request, Vec::new(), Vec::new())
}

fn serve_nonsense(input: &mut Input<'_>) {
    let store = Store::new();
    let pages = store.group().read_only().expect("a file");
    let stored = |page: StorePage| {
        let mut bytes = [0; PAGE];
        let read = rustix::io::pread(&pages, &mut bytes, u64::from(page) * PAGE as u64);
        assert_eq!(read, Ok(PAGE), "a page that is granted is there");
        bytes
    };
    while !input.is_empty() {
        let vm = 1 + u32::from(input.below(VMS as u8));
        let requests: Vec<_> = (0..1 + input.below(6))
            .map(|_| request(input, store.seed))
            .collect();
        let theirs = store.serve(vm, &written(&requests));
        let mut replies = Connection::new(theirs, Encoding::Postcard, PATIENCE).expect("a socket");
        // What a page that has been given up again holds now is not known.
        let given_up = requests
            .iter()
            .any(|(request, ..)| matches!(request, EngineRequest::Release { .. }));
        for (request, _, said) in &requests {
            let reply: EngineReply = replies.receive().expect("an answer to each request");
            let granted: Vec<Option<StorePage>> = match (request, reply) {
                (_, EngineReply::Error(_)) => continue,
                (EngineRequest::Sight { .. }, EngineReply::Verdicts(verdicts)) => {
                    let found = |it: Verdict| match it {
                        Verdict::Found(page) => Some(page),
                        Verdict::Remembered | Verdict::Publish => None,
                    };
                    verdicts.into_iter().map(found).collect()
                }
                (EngineRequest::Publish { .. }, EngineReply::Published(pages)) => pages,
                (EngineRequest::Lookup { spans }, EngineReply::Segments(segments)) => {
                    let asked: u64 = spans.iter().map(|it| u64::from(it.pages)).sum();
                    let told: u64 = segments.iter().map(|it| u64::from(it.pages)).sum();
                    assert_eq!(asked, told);
                    continue;
                }
                (
                    EngineRequest::Announce { .. }
                    | EngineRequest::Release { .. }
                    | EngineRequest::Forget { .. },
                    EngineReply::Done,
                ) => continue,
                (request, reply) => panic!("{reply:?} to {request:?}"),
            };
            assert_eq!(granted.len(), said.len());
            for (page, said) in granted.iter().zip(said) {
                if let (Some(page), false) = (page, given_up) {
                    assert!(stored(*page) == content(*said), "another page was granted");
                }
            }
        }
    }
    check_no_content_twice(&store, stored);
    drop(pages);
    store.end();
}

/// The requests as they travel.
fn written(requests: &[(EngineRequest, Vec<u8>, Said)]) -> Vec<u8> {
    let (ours, theirs) = UnixStream::pair().expect("descriptors");
    let mut connection = Connection::new(ours, Encoding::Postcard, PATIENCE).expect("a socket");
    for (request, payload, _) in requests {
        connection
            .send_with_payload(request, payload)
            .expect("room for a few requests");
    }
    drop(connection);
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut &theirs, &mut bytes).expect("a socket");
    bytes
}

fn check_no_content_twice(store: &Store, stored: impl Fn(StorePage) -> [u8; PAGE]) {
    let mut group = store.group();
    let mut at = HashMap::new();
    for file in 0..4 {
        let mut segments = Vec::new();
        let span = FileSpan {
            file: key(file),
            page: 0,
            pages: 20,
        };
        group.lookup(1, &[span], &mut segments).expect("a lookup");
        for segment in segments {
            let Some(first) = segment.store else { continue };
            for page in first..first + segment.pages {
                let other = at.insert(stored(page), page);
                assert!(other.is_none_or(|other| other == page), "stored twice");
            }
        }
    }
}

/// A message is refused, or is what its encoding says.
fn read_anything(input: &mut Input<'_>) {
    let kind = input.below(8);
    let said = input.0;
    match kind {
        0 => check::<Hello>(said, Encoding::Postcard),
        1 => check::<HelloReply>(said, Encoding::Postcard),
        2 => check::<EngineRequest>(said, Encoding::Postcard),
        3 => check::<EngineReply>(said, Encoding::Postcard),
        4 => check::<ControlRequest>(said, Encoding::Postcard),
        5 => check::<ControlReply>(said, Encoding::Postcard),
        6 => check::<AdminRequest>(said, Encoding::Json),
        _ => check::<AdminReply>(said, Encoding::Json),
    }
}

fn check<T>(said: &[u8], encoding: Encoding)
where
    T: serde::Serialize + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let (mut theirs, ours) = UnixStream::pair().expect("descriptors");
    theirs.set_nonblocking(true).expect("a socket");
    let _ = theirs.write(said);
    theirs.shutdown(Shutdown::Write).expect("a socket");
    let mut ours = Connection::new(ours, encoding, PATIENCE).expect("a socket");
    while let Ok(message) = ours.receive::<T>() {
        let (one, other) = UnixStream::pair().expect("descriptors");
        let mut one = Connection::new(one, encoding, PATIENCE).expect("a socket");
        let mut other = Connection::new(other, encoding, PATIENCE).expect("a socket");
        if one.send(&message).is_ok() {
            let again: T = other.receive().expect("what was sent");
            assert_eq!(format!("{again:?}"), format!("{message:?}"));
        }
    }
}
