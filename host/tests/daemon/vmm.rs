// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a VMM process of these tests does: it shares pages the way an engine would, without
//! a guest, and checks that they stay what they were.

use pagefusion_host::protocol::{
    AdminClient, ControlConnection, ControlReply, ControlRequest, EngineStatus, FileSpan, FileUse,
    Holding, Sighting, StoreClient, StorePage, StoreSpan, Undo, Verdict, WelcomeWithFds,
};
use pagefusion_host::store::{PAGE, PageStore, hash_page};

use crate::support::{content, key};
use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

#[test]
#[ignore = "a process that other tests start"]
fn process() {
    let runtime = PathBuf::from(std::env::var_os("PF_RUNTIME").expect("started by a test"));
    let (name, group) = (
        std::env::var("PF_NAME").unwrap(),
        std::env::var("PF_GROUP").unwrap(),
    );
    let group = (!group.is_empty()).then_some(group);
    let created = AdminClient::connect(&runtime)
        .unwrap()
        .create_vm((!name.is_empty()).then_some(name), group)
        .unwrap();
    let mut vmm = Vmm::new(&created.directory);
    println!("> {}", created.directory.display());
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        let command = words.next().unwrap();
        let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
        println!("> {}", vmm.obey(command, &numbers));
    }
}

struct Vmm {
    socket: PathBuf,
    device_socket: PathBuf,
    device: Option<UnixStream>,
    store: Option<(StoreClient, WelcomeWithFds)>,
    /// Store page and content (file, page) by file and page.
    held: BTreeMap<(u64, u64), StorePage>,
    /// Pages held of each file, for the thread that answers the daemon.
    shared: Arc<Mutex<BTreeMap<u64, u64>>>,
    /// What the daemon has told this engine to do since it was last asked.
    told: Arc<(Mutex<Vec<String>>, Condvar)>,
    reports: (Sender<FileSpan>, Arc<Mutex<Receiver<FileSpan>>>),
}

impl Vmm {
    fn new(directory: &Path) -> Self {
        let (sender, receiver) = mpsc::channel();
        Self {
            socket: directory.join("engine.sock"),
            device_socket: directory.join("ivshmem.sock"),
            device: None,
            store: None,
            held: BTreeMap::new(),
            shared: Arc::default(),
            told: Arc::default(),
            reports: (sender, Arc::new(Mutex::new(receiver))),
        }
    }

    fn obey(&mut self, command: &str, numbers: &[u64]) -> String {
        match (command, numbers) {
            ("connect", []) => self.connect(),
            ("splits", []) => {
                let (_, welcome) = self.store.as_ref().unwrap();
                format!("{:?}", welcome.welcome.split_huge_pages)
            }
            ("announce", []) => self.announce(),
            ("share", &[file, page, pages]) => self.share(file, file, page, pages),
            // What another of its files holds, so that it shares with itself.
            ("copy", &[file, of, pages]) => self.share(file, of, 0, pages),
            ("release", &[file, page]) => self.release(file, page),
            ("check", []) => self.check(),
            ("report", []) => {
                let span = self
                    .reports
                    .1
                    .lock()
                    .unwrap()
                    .recv_timeout(Duration::from_secs(20));
                span.map_or("none".into(), |it| {
                    format!("{} {} {}", it.file.inode, it.page, it.pages)
                })
            }
            ("listen", []) => self.listen(),
            ("told", []) => std::mem::take(&mut *self.told.0.lock().unwrap()).join(", "),
            ("await", []) => {
                let (told, new) = &*self.told;
                let limit = Duration::from_secs(20);
                let told = told.lock().unwrap();
                let waited = new.wait_timeout_while(told, limit, |told| told.is_empty());
                std::mem::take(&mut *waited.unwrap().0).join(", ")
            }
            ("hang", []) => {
                // Connected, and never answers.
                std::mem::forget(ControlConnection::connect(&self.socket).unwrap());
                "hanging".into()
            }
            ("device", []) => self.connect_device(),
            _ => "what?".into(),
        }
    }

    fn connect(&mut self) -> String {
        match StoreClient::connect(&self.socket) {
            Ok((client, welcome)) => {
                let text = format!(
                    "device={} paused={}",
                    welcome.device.is_some(),
                    welcome.welcome.paused
                );
                self.store = Some((client, welcome));
                text
            }
            Err(error) => error.to_string(),
        }
    }

    fn announce(&mut self) -> String {
        let holdings = self
            .held
            .iter()
            .map(|(&(file, page), &store)| Holding {
                span: FileSpan {
                    file: key(file),
                    page,
                    pages: 1,
                },
                store,
            })
            .collect();
        let (client, _) = self.store.as_mut().unwrap();
        client
            .announce(holdings)
            .map_or_else(|error| error.to_string(), |()| "done".into())
    }

    /// Shares pages that hold what those of the file `of` do, in the order of a real engine. Answers
    /// with how many it holds then.
    fn share(&mut self, file: u64, of: u64, first: u64, pages: u64) -> String {
        match self.try_share(file, of, first, pages) {
            Ok(()) => {
                self.count();
                self.held.len().to_string()
            }
            Err(error) => error.to_string(),
        }
    }

    fn try_share(
        &mut self,
        file: u64,
        of: u64,
        first: u64,
        pages: u64,
    ) -> Result<(), pagefusion_host::store::StoreError> {
        let (client, welcome) = self.store.as_mut().unwrap();
        let (key, seed) = (key(file), welcome.welcome.hash_seed);
        let mut segments = Vec::new();
        client.lookup(
            &[FileSpan {
                file: key,
                page: first,
                pages: pages as u32,
            }],
            &mut segments,
        )?;
        let mut page = first;
        for segment in segments {
            for index in 0..segment.pages {
                let found = match segment.store {
                    Some(store) => Some(store + index),
                    None => {
                        let hashes = vec![hash_page(seed, &content(of, page))];
                        let mut verdicts = Vec::new();
                        client.sight(
                            vec![Sighting {
                                file: key,
                                page,
                                hashes,
                            }],
                            &mut verdicts,
                        )?;
                        match verdicts[0] {
                            Verdict::Found(store) => Some(store),
                            Verdict::Remembered => None,
                            Verdict::Publish => {
                                let span = FileSpan {
                                    file: key,
                                    page,
                                    pages: 1,
                                };
                                let mut published = Vec::new();
                                client.publish(&[span], &content(of, page), &mut published)?;
                                published[0]
                            }
                        }
                    }
                };
                if let Some(store) = found {
                    self.held.insert((file, page), store);
                }
                page += 1;
            }
        }
        Ok(())
    }

    fn count(&self) {
        let mut shared = self.shared.lock().unwrap();
        shared.clear();
        for (file, _) in self.held.keys() {
            *shared.entry(*file).or_default() += 1;
        }
    }

    fn release(&mut self, file: u64, page: u64) -> String {
        let Some(store) = self.held.remove(&(file, page)) else {
            return "not held".into();
        };
        self.count();
        let (client, _) = self.store.as_mut().unwrap();
        let released = client.release(vec![StoreSpan {
            page: store,
            pages: 1,
        }]);
        released.map_or_else(|error| error.to_string(), |()| "done".into())
    }

    /// Whether every page held has its content still.
    fn check(&self) -> String {
        let Some((_, welcome)) = &self.store else {
            return "0 of 0".into();
        };
        let good = self.held.iter().filter(|&(&(file, page), &store)| {
            let mut bytes = [0; PAGE];
            rustix::io::pread(&welcome.store, &mut bytes, u64::from(store) * PAGE as u64).unwrap();
            bytes == content(file, page)
        });
        format!("{} of {}", good.count(), self.held.len())
    }

    /// Answers the daemon from now on.
    fn listen(&mut self) -> String {
        let mut control = match ControlConnection::connect(&self.socket) {
            Ok(control) => control,
            Err(error) => return error.to_string(),
        };
        let (shared, reports) = (self.shared.clone(), self.reports.0.clone());
        let told = self.told.clone();
        let note = move |order: String| {
            told.0.lock().unwrap().push(order);
            told.1.notify_all();
        };
        std::thread::spawn(move || {
            while let Ok(request) = control.recv() {
                let reply = match request {
                    ControlRequest::Status => ControlReply::Status(Box::new(EngineStatus {
                        guest_attached: true,
                        pages_shared: shared.lock().unwrap().values().sum(),
                        ..EngineStatus::default()
                    })),
                    ControlRequest::Report { spans } => {
                        for span in spans {
                            reports.send(span).unwrap();
                        }
                        ControlReply::Done
                    }
                    ControlRequest::Files { after } => ControlReply::Files(
                        shared
                            .lock()
                            .unwrap()
                            .iter()
                            .filter(|(file, _)| after.is_none_or(|after| key(**file) > after))
                            .map(|(&file, &pages_shared)| FileUse {
                                file: key(file),
                                name: format!("/usr/lib/lib{file}.so"),
                                pages_shared,
                                pages_broken: 0,
                            })
                            .collect(),
                    ),
                    ControlRequest::Undo(what) => {
                        note(format!("undo {}", undo_text(&what)));
                        ControlReply::Done
                    }
                    ControlRequest::Tidy { alone } => {
                        let pages: u32 = alone.iter().map(|it| it.pages).sum();
                        note(format!("tidy {pages}"));
                        ControlReply::Done
                    }
                    ControlRequest::Pause => {
                        note("pause".into());
                        ControlReply::Done
                    }
                    ControlRequest::SplitHugePages(choice) => {
                        note(format!("split {choice:?}"));
                        ControlReply::Done
                    }
                    ControlRequest::Resume => {
                        note("resume".into());
                        ControlReply::Done
                    }
                };
                if control.reply(&reply).is_err() {
                    return;
                }
            }
        });
        "listening".into()
    }

    /// The VMM's part of the ivshmem handshake, without the descriptors.
    fn connect_device(&mut self) -> String {
        let mut stream = UnixStream::connect(&self.device_socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let mut numbers = Vec::new();
        for _ in 0..5 {
            let mut bytes = [0; 8];
            if let Err(error) = stream.read_exact(&mut bytes) {
                return error.to_string();
            }
            numbers.push(i64::from_le_bytes(bytes));
        }
        self.device = Some(stream);
        format!("{numbers:?}")
    }
}

fn undo_text(what: &Undo) -> String {
    match what {
        Undo::All => "all".into(),
        Undo::Files(files) => {
            let inodes: Vec<_> = files.iter().map(|it| it.inode.to_string()).collect();
            format!("files {}", inodes.join(" "))
        }
        Undo::Pages { gfn, pages } => format!("frames {gfn}+{pages}"),
    }
}
