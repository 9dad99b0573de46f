// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What engines, the daemon and its operators say to each other.
//!
//! An engine keeps two connections to the daemon, both to its own VM's `engine.sock`: one on
//! which it asks ([`EngineRequest`]) and one on which it is asked ([`ControlRequest`]). The
//! first message of a connection says which it is. Operators use `admin.sock`
//! ([`AdminRequest`]). The VM, and with it the trust group, follows from the socket and is
//! never what a message says.

mod admin;
mod client;
mod limits;
mod operator;
mod policy;
mod status;
mod transport;

pub use admin::{AdminClient, AdminError, CreatedVm};
pub use client::{ControlConnection, DeviceDescriptors, StoreClient, WelcomeWithFds};
pub use limits::{Limit, LimitChanges, Limits};
pub use operator::{AdminReply, AdminRequest, Order, Outcome, Scope, Selection};
pub use policy::{Choice, Mode, Policies, Policy, PolicyChanges, SplitHugePages};
pub use status::{FileStatus, GroupStatus, Status, VmStatus};
#[cfg(feature = "cli")]
pub(crate) use transport::peer;
pub use transport::{Connection, Encoding};

use pagefusion_abi::wire;
use serde::{Deserialize, Serialize};
use std::fmt::Display;

/// Both sides must speak the same version.
pub const VERSION: u32 = 7;
/// Largest encoded message, bytes, payload excluded.
pub const MAX_MESSAGE: usize = 1 << 20;
/// Most pages in one [`EngineRequest::Publish`].
pub const MAX_PUBLISH_PAGES: usize = 64;
/// Most files in one [`ControlReply::Files`].
pub const MAX_FILES: usize = 2048;

/// Index of a page in the group's store file, in 4 KiB.
pub type StorePage = u32;

/// [`wire::FileIdentity`], serializable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileKey {
    /// UUID of the file system.
    pub fs_uuid: [u8; 16],
    /// Inode number.
    pub inode: u64,
    /// Size, bytes.
    pub size: u64,
    /// Modification time, nanoseconds.
    pub mtime_ns: u64,
    /// Inode generation.
    pub generation: u32,
    /// [`wire::file_kind`].
    pub kind: u32,
}

impl From<wire::FileIdentity> for FileKey {
    fn from(id: wire::FileIdentity) -> Self {
        let wire::FileIdentity {
            fs_uuid,
            inode,
            size,
            mtime_ns,
            generation,
            kind,
        } = id;
        Self {
            fs_uuid,
            inode,
            size,
            mtime_ns,
            generation,
            kind,
        }
    }
}

/// Pages `page .. page + pages` of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSpan {
    /// The file.
    pub file: FileKey,
    /// First page.
    pub page: u64,
    /// Number of pages; in [`ControlRequest::Report`] 0 means the whole file.
    pub pages: u32,
}

impl FileSpan {
    /// The page behind the last one, where 0 pages are the whole file.
    pub(crate) const fn end(&self) -> u64 {
        match self.pages {
            0 => u64::MAX,
            pages => self.page.saturating_add(pages as u64),
        }
    }
}

/// Pages `page .. page + pages` of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSpan {
    /// First page.
    pub page: StorePage,
    /// Number of pages.
    pub pages: u32,
}

/// A set of store pages as spans.
pub(crate) fn spans(pages: &roaring::RoaringBitmap) -> Vec<StoreSpan> {
    let mut spans: Vec<StoreSpan> = Vec::new();
    for page in pages {
        match spans.last_mut() {
            Some(last) if last.page + last.pages == page => last.pages += 1,
            _ => spans.push(StoreSpan { page, pages: 1 }),
        }
    }
    spans
}

/// Part of a looked-up span.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Length, pages.
    pub pages: u32,
    /// Where in the store it begins, if it is there.
    pub store: Option<StorePage>,
}

/// What to do with a page nobody has looked up successfully.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// Noted; nobody else has it.
    Remembered,
    /// The same content may be here; compare.
    Found(StorePage),
    /// Somebody else has it: send the bytes.
    Publish,
}

/// Hashes of consecutive pages of a file, as [`crate::store::hash_page`] makes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sighting {
    /// The file.
    pub file: FileKey,
    /// First page.
    pub page: u64,
    /// One hash per page.
    pub hashes: Vec<u64>,
}

/// Store pages that an engine has mapped, told to a new daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// The file pages they hold.
    pub span: FileSpan,
    /// Where in the store.
    pub store: StorePage,
}

/// Role of a connection, its first message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// The engine asks: [`EngineRequest`], answered by [`EngineReply`].
    Requests,
    /// The daemon asks: [`ControlRequest`], answered by [`ControlReply`].
    Control,
}

/// First message on an `engine.sock` connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// What this connection is for.
    pub role: Role,
}

/// Answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HelloReply {
    /// In the role [`Role::Requests`].
    Welcome(Box<Welcome>),
    /// In the role [`Role::Control`].
    Ready,
    /// In neither, with cause and cure.
    Refused(String),
}

/// Part of [`HelloReply`]. Descriptors come with it, in this order: store (read-only); if
/// `has_device`, shared memory of the device, eventfd that the guest rings and eventfd that
/// rings the guest; if `has_uffd_device`, `/dev/userfaultfd`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Number of the VM, never used twice in the life of the runtime directory.
    pub vm: u32,
    /// Its name.
    pub name: String,
    /// Its trust group; `None` shares with nobody.
    pub group: Option<String>,
    /// Seed for [`crate::store::hash_page`].
    pub hash_seed: u64,
    /// Whether the device's three descriptors came along. A daemon that was started after
    /// the VM has none: the engine goes on with those it has.
    pub has_device: bool,
    /// Whether `/dev/userfaultfd` came along.
    pub has_uffd_device: bool,
    /// Whether sharing is paused for this VM.
    pub paused: bool,
    /// Whether its huge pages are split.
    pub split_huge_pages: SplitHugePages,
}

/// Engine to daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EngineRequest {
    /// What this process has mapped from the store; first request after connecting again.
    /// Answered by [`EngineReply::Done`]. The last part has `last` set; what was granted on earlier
    /// connections and is in no part counts as mapped no more. So a process has one engine that
    /// asks: the connection that began to ask last is heard, and no other.
    Announce {
        /// Mapped store pages.
        holdings: Vec<Holding>,
        /// Nothing follows.
        last: bool,
    },
    /// Are these pages in the store? Answered by [`EngineReply::Segments`], which cover the
    /// spans in order; what is found counts as mapped by this process from now on.
    Lookup {
        /// What to look up.
        spans: Vec<FileSpan>,
    },
    /// Notes pages the lookup did not find. Answered by [`EngineReply::Verdicts`], one per
    /// page in order; what is found counts as mapped.
    Sight {
        /// What was seen.
        sightings: Vec<Sighting>,
    },
    /// Puts pages into the store: at most [`MAX_PUBLISH_PAGES`], whose bytes follow the message.
    /// Answered by [`EngineReply::Published`], one per page in order; they count as mapped.
    Publish {
        /// Which pages these are.
        spans: Vec<FileSpan>,
    },
    /// This process does not map these any more. Answered by [`EngineReply::Done`].
    Release {
        /// Store pages, each of them granted before.
        spans: Vec<StoreSpan>,
    },
    /// The guest does not have these file pages any more. Answered by [`EngineReply::Done`].
    Forget {
        /// File pages; `pages == 0` is the whole file.
        span: FileSpan,
    },
}

/// Daemon to engine, in answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EngineReply {
    /// Nothing to say.
    Done,
    /// To [`EngineRequest::Lookup`].
    Segments(Vec<Segment>),
    /// To [`EngineRequest::Sight`].
    Verdicts(Vec<Verdict>),
    /// To [`EngineRequest::Publish`]: where each page is, or `None` when the store is full.
    Published(Vec<Option<StorePage>>),
    /// The request was refused.
    Error(String),
}

/// Daemon to engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlRequest {
    /// Answered by [`ControlReply::Status`].
    Status,
    /// Ask the guest to report these pages again. Answered by [`ControlReply::Done`].
    Report {
        /// File pages that have become worth sharing.
        spans: Vec<FileSpan>,
    },
    /// Which files lie on overlays? Answered by [`ControlReply::Files`].
    Files {
        /// Only files behind this one, in the order of [`FileKey`].
        after: Option<FileKey>,
    },
    /// Turn overlays back into ordinary memory. Answered by [`ControlReply::Done`] when it is
    /// done and the store pages are released.
    Undo(Undo),
    /// Make ordinary memory of overlays that are worth nothing any more: mostly broken by the
    /// guest, or on store pages that nobody else has. Answered by [`ControlReply::Done`].
    Tidy {
        /// Store pages that no other process has been granted.
        alone: Vec<StoreSpan>,
    },
    /// Share nothing more until [`ControlRequest::Resume`]; overlays stay. Answered by
    /// [`ControlReply::Done`].
    Pause,
    /// From now on, split huge pages or not; what is shared stays. The guest is asked to report
    /// everything if that is new. Answered by [`ControlReply::Done`].
    SplitHugePages(SplitHugePages),
    /// Share (again). The guest is asked to report everything. Answered by
    /// [`ControlReply::Done`].
    Resume,
}

/// Which overlays of a VM become ordinary memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Undo {
    /// All, and none is made until [`ControlRequest::Resume`].
    All,
    /// Those of certain files. What the store grants afterwards is shared again.
    Files(Vec<FileKey>),
    /// Those of certain guest frames. They are shared again when the guest reports them again.
    Pages {
        /// First guest frame.
        gfn: u64,
        /// How many.
        pages: u64,
    },
}

/// Engine to daemon, in answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ControlReply {
    /// Done.
    Done,
    /// To [`ControlRequest::Status`].
    Status(Box<EngineStatus>),
    /// To [`ControlRequest::Files`]: files in order, [`MAX_FILES`] of them unless they are the
    /// last.
    Files(Vec<FileUse>),
    /// It could not be done.
    Error(String),
}

impl ControlReply {
    /// How `what` has ended.
    pub fn done(what: &str, result: Result<(), impl Display>) -> Self {
        match result {
            Ok(()) => Self::Done,
            Err(e) => Self::Error(format!("{what}: {e}")),
        }
    }
}

/// A file of which pages lie on overlays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileUse {
    /// The file.
    pub file: FileKey,
    /// What the guest calls it, which proves nothing; empty when the guest has dropped it.
    pub name: String,
    /// Pages on overlays that are intact.
    pub pages_shared: u64,
    /// Pages on overlays that the guest has written since.
    pub pages_broken: u64,
}

/// Counters of one engine. Pages are 4 KiB. Sums, unless said otherwise, are since the
/// engine started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineStatus {
    /// Whether a guest module is attached now.
    pub guest_attached: bool,
    /// Where guest memory was found: `kvm`, `qmp`, `vm-memory` or `none`.
    pub memory_source: String,
    /// Guest memory that the engine knows, bytes, now.
    pub memory_bytes: u64,
    /// Pages reported by the guest.
    pub pages_reported: u64,
    /// Pages on overlays that are intact, now.
    pub pages_shared: u64,
    /// Pages on overlays that the guest has written since, now.
    pub pages_broken: u64,
    /// Pages noted because nobody else had them.
    pub pages_remembered: u64,
    /// Pages not shared for the sake of huge pages, which are not to be split.
    pub pages_spared: u64,
    /// Pages refused.
    pub pages_refused: u64,
    /// Pages refused by [`wire::reason::name`], or [`Unsuitable::name`](crate::engine::Unsuitable::name)
    /// where guest memory is known not to be fit.
    pub refusals: std::collections::BTreeMap<String, u64>,
    /// Runs on overlays, now.
    pub overlays: u64,
    /// Mappings of the whole process, now, and how many the engine may cause.
    pub mappings: u64,
    /// Limit of the kernel on mappings of a process.
    pub mappings_limit: u64,
    /// Mappings that overlays added, now.
    pub overlay_mappings: u64,
    /// Seconds from the guest's attaching to its last newly shared page.
    pub seconds_sharing: f64,
    /// CPU seconds of the engine's threads.
    pub cpu_seconds: f64,
    /// Malformed records and other violations of the protocol by the guest.
    pub guest_errors: u64,
    /// Passes that the guest has told of.
    pub guest_passes: u64,
    /// Why this VM shares nothing at all, if so.
    pub disabled: Option<String>,
}
