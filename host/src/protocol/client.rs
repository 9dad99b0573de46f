// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The engine's two connections to the daemon.

use super::transport::{Connection, Encoding};
use super::{
    ControlReply, ControlRequest, EngineReply, EngineRequest, FileSpan, Hello, HelloReply, Holding,
    Role, Segment, Sighting, StorePage, StoreSpan, VERSION, Verdict, Welcome,
};
use crate::store::batches::{batches, publications};
use crate::store::{PAGE, PageStore, StoreError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// Longest an engine waits for the daemon.
const LIMIT: Duration = Duration::from_secs(5);
/// Most spans in one release: two numbers of at most five bytes each.
const MAX_RELEASE_SPANS: usize = 1 << 16;

/// Descriptors of the device of a VM.
#[derive(Debug)]
pub struct DeviceDescriptors {
    /// Shared memory.
    pub memory: OwnedFd,
    /// Eventfd that the guest rings.
    pub from_guest: OwnedFd,
    /// Eventfd that rings the guest.
    pub to_guest: OwnedFd,
}

/// [`Welcome`] and the descriptors that came with it.
#[derive(Debug)]
pub struct WelcomeWithFds {
    /// The message.
    pub welcome: Welcome,
    /// The store, read-only.
    pub store: OwnedFd,
    /// The device, unless the daemon was started after the VM.
    pub device: Option<DeviceDescriptors>,
    /// `/dev/userfaultfd`, if the host has it.
    pub uffd_device: Option<OwnedFd>,
}

/// The connection on which the engine asks. After an error other than
/// [`StoreError::Refused`] it is of no use any more: connect again and announce.
#[derive(Debug)]
pub struct StoreClient {
    connection: Connection,
    broken: bool,
}

impl StoreClient {
    /// Connects to a VM's `engine.sock`, as that VM's process.
    pub fn connect(path: &Path) -> Result<(Self, WelcomeWithFds), StoreError> {
        let (mut connection, reply) =
            greet(path, Role::Requests).map_err(StoreError::Unreachable)?;
        let welcome = match reply {
            HelloReply::Welcome(welcome) => *welcome,
            HelloReply::Refused(reason) => return Err(StoreError::Refused(reason)),
            HelloReply::Ready => return Err(StoreError::Unreachable(unexpected())),
        };
        let mut descriptors = connection.take_descriptors().into_iter();
        let mut next = || {
            descriptors
                .next()
                .ok_or_else(|| StoreError::Unreachable(unexpected()))
        };
        let store = next()?;
        let device = if welcome.has_device {
            Some(DeviceDescriptors {
                memory: next()?,
                from_guest: next()?,
                to_guest: next()?,
            })
        } else {
            None
        };
        let uffd_device = if welcome.has_uffd_device {
            Some(next()?)
        } else {
            None
        };
        let client = Self {
            connection,
            broken: false,
        };
        Ok((
            client,
            WelcomeWithFds {
                welcome,
                store,
                device,
                uffd_device,
            },
        ))
    }

    fn ask(&mut self, request: &EngineRequest, payload: &[u8]) -> Result<EngineReply, StoreError> {
        if self.broken {
            return Err(StoreError::Unreachable(io::ErrorKind::NotConnected.into()));
        }
        let sent = self.connection.send_with_payload(request, payload);
        match sent.and_then(|()| self.connection.receive()) {
            Ok(EngineReply::Error(reason)) => Err(StoreError::Refused(reason)),
            Ok(reply) => Ok(reply),
            Err(error) => {
                // A late answer would be taken for that to the next request.
                self.broken = true;
                Err(StoreError::Unreachable(error))
            }
        }
    }

    fn ask_for_done(&mut self, request: &EngineRequest) -> Result<(), StoreError> {
        match self.ask(request, &[])? {
            EngineReply::Done => Ok(()),
            _ => Err(self.out_of_step()),
        }
    }

    fn out_of_step(&mut self) -> StoreError {
        self.broken = true;
        StoreError::Unreachable(unexpected())
    }
}

impl AsFd for StoreClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

impl PageStore for StoreClient {
    fn lookup(&mut self, spans: &[FileSpan], out: &mut Vec<Segment>) -> Result<(), StoreError> {
        for spans in batches(spans.iter().copied()) {
            let asked: u64 = spans.iter().map(|span| u64::from(span.pages)).sum();
            match self.ask(&EngineRequest::Lookup { spans }, &[])? {
                EngineReply::Segments(segments)
                    if segments.iter().map(|it| u64::from(it.pages)).sum::<u64>() == asked =>
                {
                    out.extend(segments);
                }
                _ => return Err(self.out_of_step()),
            }
        }
        Ok(())
    }

    fn sight(
        &mut self,
        sightings: Vec<Sighting>,
        out: &mut Vec<Verdict>,
    ) -> Result<(), StoreError> {
        for sightings in batches(sightings) {
            let asked: usize = sightings.iter().map(|sighting| sighting.hashes.len()).sum();
            match self.ask(&EngineRequest::Sight { sightings }, &[])? {
                EngineReply::Verdicts(verdicts) if verdicts.len() == asked => out.extend(verdicts),
                _ => return Err(self.out_of_step()),
            }
        }
        Ok(())
    }

    fn publish(
        &mut self,
        spans: &[FileSpan],
        bytes: &[u8],
        out: &mut Vec<Option<StorePage>>,
    ) -> Result<(), StoreError> {
        for (spans, bytes) in publications(spans, bytes)? {
            match self.ask(&EngineRequest::Publish { spans }, bytes)? {
                EngineReply::Published(pages) if pages.len() == bytes.len() / PAGE => {
                    out.extend(pages);
                }
                _ => return Err(self.out_of_step()),
            }
        }
        Ok(())
    }

    fn release(&mut self, spans: Vec<StoreSpan>) -> Result<(), StoreError> {
        for spans in spans.chunks(MAX_RELEASE_SPANS) {
            self.ask_for_done(&EngineRequest::Release {
                spans: spans.to_vec(),
            })?;
        }
        Ok(())
    }

    fn announce(&mut self, holdings: Vec<Holding>) -> Result<(), StoreError> {
        for holdings in batches(holdings) {
            self.ask_for_done(&EngineRequest::Announce {
                holdings,
                last: false,
            })?;
        }
        self.ask_for_done(&EngineRequest::Announce {
            holdings: Vec::new(),
            last: true,
        })
    }

    fn forget(&mut self, span: FileSpan) -> Result<(), StoreError> {
        self.ask_for_done(&EngineRequest::Forget { span })
    }
}

/// The connection on which the engine is asked. After any error, connect again.
#[derive(Debug)]
pub struct ControlConnection {
    connection: Connection,
}

impl ControlConnection {
    /// Connects to a VM's `engine.sock`, as that VM's process.
    pub fn connect(path: &Path) -> io::Result<Self> {
        match greet(path, Role::Control)? {
            (connection, HelloReply::Ready) => Ok(Self { connection }),
            (_, HelloReply::Refused(reason)) => Err(io::Error::other(reason)),
            (_, HelloReply::Welcome(_)) => Err(unexpected()),
        }
    }

    /// Waits for the daemon to ask something, which may take any time.
    pub fn recv(&mut self) -> io::Result<ControlRequest> {
        self.connection.receive_when_it_comes()
    }

    /// Answers what [`Self::recv`] returned last.
    pub fn reply(&mut self, reply: &ControlReply) -> io::Result<()> {
        self.connection.send(reply)
    }

    /// Another handle of the socket, with which another thread can shut the connection down
    /// and so end [`Self::recv`].
    pub fn try_clone_stream(&self) -> io::Result<std::os::unix::net::UnixStream> {
        self.connection.stream().try_clone()
    }
}

impl AsFd for ControlConnection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

fn greet(path: &Path, role: Role) -> io::Result<(Connection, HelloReply)> {
    let mut connection =
        Connection::connect(path, Encoding::Postcard, LIMIT)?.accepting_descriptors();
    connection.send(&Hello {
        version: VERSION,
        role,
    })?;
    let reply = connection.receive()?;
    Ok((connection, reply))
}

fn unexpected() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the daemon's answer does not fit the question",
    )
}
