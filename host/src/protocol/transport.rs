// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Messages over a UNIX stream: length (`u32`, little-endian), then that many bytes.
//!
//! Descriptors travel with the first byte of a message. Nothing is allocated for a length
//! that was not checked, and no peer can keep us waiting within a message.

use super::MAX_MESSAGE;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Most descriptors in one message.
const MAX_DESCRIPTORS: usize = 8;
const HEADER: usize = 4;
/// Read at once; most messages fit.
const READ_AHEAD: usize = 16 * 1024;

/// How messages are written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Between engine and daemon.
    Postcard,
    /// Between operator and daemon.
    Json,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    encoding: Encoding,
    limit: Duration,
    max_message: usize,
    /// Bytes received and not yet taken.
    received: Vec<u8>,
    taken: usize,
    descriptors: Option<Vec<OwnedFd>>,
    outgoing: Vec<u8>,
}

impl Connection {
    /// Connects to the socket at `path`. Sending or receiving a message takes at most
    /// `limit`, the wait in [`Self::receive_when_it_comes`] excepted.
    pub fn connect(path: &Path, encoding: Encoding, limit: Duration) -> io::Result<Self> {
        Self::new(UnixStream::connect(path)?, encoding, limit)
    }

    /// The same for a stream that is connected already.
    pub fn new(stream: UnixStream, encoding: Encoding, limit: Duration) -> io::Result<Self> {
        let mut connection = Self {
            stream,
            encoding,
            limit: Duration::ZERO,
            max_message: MAX_MESSAGE,
            received: Vec::new(),
            taken: 0,
            descriptors: None,
            outgoing: Vec::new(),
        };
        connection.set_limit(limit)?;
        Ok(connection)
    }

    /// Accepts descriptors from the other end; without this they are closed unseen.
    #[must_use]
    pub fn accepting_descriptors(mut self) -> Self {
        self.descriptors = Some(Vec::new());
        self
    }

    /// Accepts messages of up to `bytes`; unless said otherwise [`MAX_MESSAGE`].
    #[must_use]
    pub fn accepting_messages_of(mut self, bytes: usize) -> Self {
        self.max_message = bytes;
        self
    }

    /// Changes the limit for one message.
    pub fn set_limit(&mut self, limit: Duration) -> io::Result<()> {
        if limit != self.limit {
            self.stream.set_read_timeout(Some(limit))?;
            self.stream.set_write_timeout(Some(limit))?;
            self.limit = limit;
        }
        Ok(())
    }

    /// The stream beneath.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a message.
    pub fn send<T: Serialize>(&mut self, message: &T) -> io::Result<()> {
        self.send_all(message, &[], &[])
    }

    /// Sends a message and `payload` right behind it.
    pub fn send_with_payload<T: Serialize>(
        &mut self,
        message: &T,
        payload: &[u8],
    ) -> io::Result<()> {
        self.send_all(message, payload, &[])
    }

    /// Sends a message and copies of descriptors.
    pub fn send_with_descriptors<T: Serialize>(
        &mut self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        self.send_all(message, &[], descriptors)
    }

    /// Receives a message that is due now.
    pub fn receive<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        self.receive_message(Instant::now() + self.limit, false)
    }

    /// Receives a message that may take any time to begin. The limit counts from its first
    /// byte.
    pub fn receive_when_it_comes<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        self.receive_message(Instant::now() + self.limit, true)
    }

    /// Receives `bytes.len()` bytes that follow a message.
    pub fn receive_payload(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let deadline = Instant::now() + self.limit;
        let buffered = bytes.len().min(self.received.len() - self.taken);
        bytes[..buffered].copy_from_slice(&self.received[self.taken..self.taken + buffered]);
        self.taken += buffered;
        let mut done = buffered;
        while done < bytes.len() {
            match rustix::net::recv(&self.stream, &mut bytes[done..], RecvFlags::empty()) {
                Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, count)) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error_of(error)),
            }
            check(deadline)?;
        }
        Ok(())
    }

    /// Descriptors that came since this was last called.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        self.descriptors
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    fn send_all<T: Serialize>(
        &mut self,
        message: &T,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut frame = std::mem::take(&mut self.outgoing);
        frame.clear();
        frame.extend([0; HEADER]);
        let frame = match self.encoding {
            Encoding::Postcard => postcard::to_extend(message, frame).map_err(io::Error::other)?,
            Encoding::Json => {
                serde_json::to_writer(&mut frame, message)?;
                frame
            }
        };
        let result = self.send_frame(frame, payload, descriptors)?;
        self.outgoing = result;
        Ok(())
    }

    fn send_frame(
        &self,
        mut frame: Vec<u8>,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<Vec<u8>> {
        let length = u32::try_from(frame.len() - HEADER)
            .map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        frame[..HEADER].copy_from_slice(&length.to_le_bytes());
        let deadline = Instant::now() + self.limit;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let total = frame.len() + payload.len();
        let mut sent = 0;
        while sent < total {
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if sent == 0
                && !descriptors.is_empty()
                && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
            {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let head = &frame[sent.min(frame.len())..];
            let tail = &payload[sent.saturating_sub(frame.len())..];
            let parts = [IoSlice::new(head), IoSlice::new(tail)];
            match rustix::net::sendmsg(&self.stream, &parts, &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error_of(error)),
            }
            if sent < total {
                check(deadline)?;
            }
        }
        Ok(frame)
    }

    fn receive_message<T: DeserializeOwned>(
        &mut self,
        mut deadline: Instant,
        may_wait: bool,
    ) -> io::Result<T> {
        let mut needed = HEADER;
        loop {
            let available = self.received.len() - self.taken;
            if available >= HEADER && needed == HEADER {
                let mut length = [0; HEADER];
                length.copy_from_slice(&self.received[self.taken..self.taken + HEADER]);
                let length = u32::from_le_bytes(length) as usize;
                if length > self.max_message {
                    return Err(invalid(format!(
                        "a message of {length} bytes; the most is {}",
                        self.max_message
                    )));
                }
                needed = HEADER + length;
            }
            if available >= needed && available >= HEADER {
                break;
            }
            match self.fill(needed - available) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if available == 0 && may_wait => deadline = Instant::now() + self.limit,
                Ok(_) => check(deadline)?,
                Err(error)
                    if available == 0 && may_wait && error.kind() == io::ErrorKind::TimedOut => {}
                Err(error) => return Err(error),
            }
        }
        let body = &self.received[self.taken + HEADER..self.taken + needed];
        let message = match self.encoding {
            Encoding::Postcard => match postcard::take_from_bytes(body) {
                Ok((message, [])) => Ok(message),
                Ok(_) => Err(invalid("a message with something behind its end")),
                Err(error) => Err(invalid(format!("not a message: {error}"))),
            },
            Encoding::Json => serde_json::from_slice(body).map_err(io::Error::from),
        };
        self.taken += needed;
        message
    }

    /// Receives at least one byte, `wanted` if they are there.
    fn fill(&mut self, wanted: usize) -> io::Result<usize> {
        self.received.drain(..self.taken);
        self.taken = 0;
        let held = self.received.len();
        // Grows with what has really come, not with what a length claims.
        let room = wanted.clamp(READ_AHEAD, READ_AHEAD.max(held * 2));
        self.received.resize(held + room, 0);
        let result = self.receive_some(held);
        self.received
            .truncate(held + *result.as_ref().unwrap_or(&0));
        result
    }

    fn receive_some(&mut self, from: usize) -> io::Result<usize> {
        loop {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = match self.descriptors {
                Some(_) => RecvAncillaryBuffer::new(&mut space),
                None => RecvAncillaryBuffer::new(&mut []),
            };
            let mut parts = [IoSliceMut::new(&mut self.received[from..])];
            let flags = RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(&self.stream, &mut parts, &mut ancillary, flags) {
                Ok(message) => {
                    for received in ancillary.drain() {
                        if let (RecvAncillaryMessage::ScmRights(descriptors), Some(accepted)) =
                            (received, &mut self.descriptors)
                        {
                            accepted.extend(descriptors);
                        }
                    }
                    return Ok(message.bytes);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error_of(error)),
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Process and user at the other end, as they were when it connected.
#[cfg(feature = "cli")]
pub(crate) fn peer(stream: &UnixStream) -> io::Result<rustix::net::UCred> {
    Ok(rustix::net::sockopt::socket_peercred(stream)?)
}

fn check(deadline: Instant) -> io::Result<()> {
    if Instant::now() < deadline {
        Ok(())
    } else {
        Err(timed_out())
    }
}

fn error_of(error: rustix::io::Errno) -> io::Error {
    // What a socket with a time limit says when it has passed.
    if error == rustix::io::Errno::AGAIN {
        timed_out()
    } else {
        error.into()
    }
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the other side does not answer")
}

fn invalid(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{EngineReply, EngineRequest};
    use std::io::Write;

    /// What ends by itself only when a test fails.
    const LIMIT: Duration = Duration::from_secs(10);

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (
            Connection::new(ours, Encoding::Postcard, LIMIT).unwrap(),
            theirs,
        )
    }

    #[test]
    fn messages_payload_and_descriptors_arrive() {
        let (mut ours, theirs) = pair();
        let mut theirs = Connection::new(theirs, Encoding::Postcard, LIMIT)
            .unwrap()
            .accepting_descriptors();
        let file = tempfile::tempfile().unwrap();
        ours.send_with_descriptors(&EngineReply::Done, &[file.as_fd(), file.as_fd()])
            .unwrap();
        ours.send_with_payload(&EngineReply::Error("x".into()), &[7; 100_000])
            .unwrap();
        ours.send(&EngineReply::Done).unwrap();
        assert_eq!(theirs.receive::<EngineReply>().unwrap(), EngineReply::Done);
        assert_eq!(theirs.take_descriptors().len(), 2);
        assert_eq!(
            theirs.receive::<EngineReply>().unwrap(),
            EngineReply::Error("x".into())
        );
        let mut payload = vec![0; 100_000];
        theirs.receive_payload(&mut payload).unwrap();
        assert_eq!(payload, [7; 100_000]);
        assert_eq!(theirs.receive::<EngineReply>().unwrap(), EngineReply::Done);
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_unread() {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(&u32::MAX.to_le_bytes()).unwrap();
        let error = ours.receive::<EngineRequest>().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(ours.received.capacity() <= 2 * READ_AHEAD);
    }

    #[test]
    fn rubbish_is_refused() {
        for bytes in [
            &[0u8, 0, 0, 0][..],
            &[1, 0, 0, 0, 0xff],
            &[2, 0, 0, 0, 0, 0],
        ] {
            let (mut ours, mut theirs) = pair();
            theirs.write_all(bytes).unwrap();
            let error = ours.receive::<EngineReply>().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bytes:?}");
        }
    }

    #[test]
    fn a_message_that_does_not_end_is_not_waited_for() {
        let (mut ours, mut theirs) = pair();
        ours.set_limit(Duration::from_millis(50)).unwrap();
        theirs.write_all(&[9, 0]).unwrap();
        let error = ours.receive_when_it_comes::<EngineRequest>().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_closed_end_is_an_end() {
        let (mut ours, theirs) = pair();
        drop(theirs);
        let error = ours.receive_when_it_comes::<EngineRequest>().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn descriptors_nobody_asked_for_are_closed() {
        let (mut ours, theirs) = pair();
        let mut theirs = Connection::new(theirs, Encoding::Postcard, LIMIT).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        theirs
            .send_with_descriptors(&EngineReply::Done, &[writer.as_fd()])
            .unwrap();
        drop(writer);
        assert_eq!(ours.receive::<EngineReply>().unwrap(), EngineReply::Done);
        // The copy in the message was the last writer.
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0));
    }
}
