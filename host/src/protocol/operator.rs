// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What an operator and the daemon say to each other.

#[cfg(doc)]
use super::VERSION;
use super::{FileStatus, LimitChanges, PolicyChanges, Status};
use serde::{Deserialize, Serialize};

/// Scope of an operator's request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scope {
    /// Every VM of this host.
    All,
    /// VMs of a trust group.
    Group(String),
    /// One VM by name or number.
    Vm(String),
}

/// What of the VMs in a scope an undo is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Selection {
    /// Everything; sharing stays off until resumed.
    All,
    /// Files, by name or by the id that [`FileStatus`] has; they stay unshared until resumed.
    File(String),
    /// Guest frames. They are shared again when the guest reports them again.
    Pages {
        /// First guest frame.
        gfn: u64,
        /// How many.
        pages: u64,
    },
}

/// What became of a request to several VMs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// VMs in the scope.
    pub vms: usize,
    /// VMs that failed, by name, with the reason.
    pub failed: Vec<(String, String)>,
}

/// Operator to daemon, on `admin.sock`. Every request has its version, and has it in the same place
/// in every version: the daemon looks at it before it makes sense of the rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminRequest {
    /// Registers the calling process (by the socket's peer credentials) as a VM.
    CreateVm {
        /// [`VERSION`].
        version: u32,
        /// Name for the operator; unique among living VMs, made up when `None`.
        name: Option<String>,
        /// Trust group.
        group: Option<String>,
        /// Whose sockets and device it will be, if another user's than the caller's. Only root
        /// may ask for that.
        user: Option<u32>,
    },
    /// Everything [`Status`] has.
    Status {
        /// [`VERSION`].
        version: u32,
    },
    /// The files that save most. Answered by [`AdminReply::Files`].
    Files {
        /// [`VERSION`].
        version: u32,
        /// Whose.
        scope: Scope,
        /// How many; 0 is all.
        limit: usize,
    },
    /// Changes how VMs share. Answered by [`AdminReply::Done`].
    Order {
        /// [`VERSION`].
        version: u32,
        /// Whose.
        scope: Scope,
        /// What is to be done.
        order: Order,
    },
}

/// What VMs are to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Ordinary memory again: this of it.
    Undo(Selection),
    /// Nothing more is shared until resumed; what is shared stays.
    Pause,
    /// Shares again.
    Resume {
        /// Only this file, by name or id.
        file: Option<String>,
    },
    /// Changes limits, and when groups share. Those of all VMs or of a group may be set before there
    /// is one.
    Set {
        /// For each VM of the scope instead of for each group as a whole.
        each_vm: bool,
        /// Limits that change.
        changes: LimitChanges,
        /// Mode, policy and the like that change; not those of a single VM.
        policy: PolicyChanges,
    },
}

/// Daemon to operator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum AdminReply {
    /// What became of it.
    Done(Outcome),
    /// To [`AdminRequest::CreateVm`].
    Created {
        /// Number of the VM.
        vm: u32,
        /// Its name.
        name: String,
        /// Directory with `ivshmem.sock`, `engine.sock` and room for `qmp.sock`.
        directory: std::path::PathBuf,
    },
    /// To [`AdminRequest::Status`].
    Status(Box<Status>),
    /// To [`AdminRequest::Files`].
    Files(Vec<FileStatus>),
    /// Refused, with cause and cure.
    Error(String),
}
