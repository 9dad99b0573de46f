// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The operator's connection to the daemon.

use super::transport::{Connection, Encoding};
use super::{
    AdminReply, AdminRequest, FileStatus, LimitChanges, Order, Outcome, PolicyChanges, Scope,
    Selection, Status, VERSION,
};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest wait for an answer. The daemon gives up on slow engines before.
const LIMIT: Duration = Duration::from_secs(150);
/// Largest answer: about a kilobyte for each VM.
const MAX_ANSWER: usize = 64 << 20;

/// Why an operator's request failed.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Nobody listens.
    #[error(
        "pagefusiond does not run with the runtime directory {}; start it with: \
         systemctl start pagefusiond, or: pagefusiond --runtime-dir {}", .0.display(), .0.display()
    )]
    NotRunning(PathBuf),
    /// The socket is there and not for us.
    #[error(
        "may not talk to the pagefusiond of {}; run this as root or as the daemon's user",
        .0.display()
    )]
    NotAllowed(PathBuf),
    /// The connection failed.
    #[error("the connection to pagefusiond failed: {0}")]
    Connection(#[from] io::Error),
    /// The daemon refused.
    #[error("{0}")]
    Refused(String),
    /// The daemon's answer does not fit the question.
    #[error(
        "pagefusiond gives an answer that does not fit the question; restart it, so that it has the version of this program"
    )]
    Unexpected,
}

/// A VM that this process has become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreatedVm {
    /// Its number.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// Directory with `ivshmem.sock`, `engine.sock` and room for `qmp.sock`.
    pub directory: PathBuf,
}

/// A connection to the daemon's `admin.sock`.
#[derive(Debug)]
pub struct AdminClient {
    connection: Connection,
    runtime_dir: PathBuf,
}

impl AdminClient {
    /// Connects to the daemon that works in `runtime_dir`.
    pub fn connect(runtime_dir: &Path) -> Result<Self, AdminError> {
        let path = runtime_dir.join("admin.sock");
        let connection = match Connection::connect(&path, Encoding::Json, LIMIT) {
            Ok(connection) => connection.accepting_messages_of(MAX_ANSWER),
            Err(error) => {
                return Err(match error.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                        AdminError::NotRunning(runtime_dir.into())
                    }
                    io::ErrorKind::PermissionDenied => AdminError::NotAllowed(runtime_dir.into()),
                    _ => AdminError::Connection(error),
                });
            }
        };
        Ok(Self {
            connection,
            runtime_dir: runtime_dir.into(),
        })
    }

    /// Makes this process a VM. It stays one through `exec`, until it ends.
    pub fn create_vm(
        &mut self,
        name: Option<String>,
        group: Option<String>,
    ) -> Result<CreatedVm, AdminError> {
        self.create_vm_for(name, group, None)
    }

    /// As [`AdminClient::create_vm`], of a process that is about to become one of `user`.
    pub fn create_vm_for(
        &mut self,
        name: Option<String>,
        group: Option<String>,
        user: Option<u32>,
    ) -> Result<CreatedVm, AdminError> {
        match self.ask(&AdminRequest::CreateVm {
            version: VERSION,
            name,
            group,
            user,
        })? {
            AdminReply::Created {
                vm,
                name,
                directory,
            } => Ok(CreatedVm {
                number: vm,
                name,
                directory,
            }),
            _ => Err(AdminError::Unexpected),
        }
    }

    /// Figures of the whole host.
    pub fn status(&mut self) -> Result<Status, AdminError> {
        match self.ask(&AdminRequest::Status { version: VERSION })? {
            AdminReply::Status(status) => Ok(*status),
            _ => Err(AdminError::Unexpected),
        }
    }

    /// The `limit` files that save most; 0 is all.
    pub fn files(&mut self, scope: Scope, limit: usize) -> Result<Vec<FileStatus>, AdminError> {
        match self.ask(&AdminRequest::Files {
            version: VERSION,
            scope,
            limit,
        })? {
            AdminReply::Files(files) => Ok(files),
            _ => Err(AdminError::Unexpected),
        }
    }

    /// Turns what is shared back into ordinary memory.
    pub fn undo(&mut self, scope: Scope, selection: Selection) -> Result<Outcome, AdminError> {
        self.order(scope, Order::Undo(selection))
    }

    /// Shares nothing more; what is shared stays.
    pub fn pause(&mut self, scope: Scope) -> Result<Outcome, AdminError> {
        self.order(scope, Order::Pause)
    }

    /// Shares (again), everything or one file.
    pub fn resume(&mut self, scope: Scope, file: Option<String>) -> Result<Outcome, AdminError> {
        self.order(scope, Order::Resume { file })
    }

    /// Changes limits, of each VM or of each group as a whole, and when groups share.
    pub fn set(
        &mut self,
        scope: Scope,
        each_vm: bool,
        changes: LimitChanges,
        policy: PolicyChanges,
    ) -> Result<Outcome, AdminError> {
        let order = Order::Set {
            each_vm,
            changes,
            policy,
        };
        self.order(scope, order)
    }

    fn order(&mut self, scope: Scope, order: Order) -> Result<Outcome, AdminError> {
        match self.ask(&AdminRequest::Order {
            version: VERSION,
            scope,
            order,
        })? {
            AdminReply::Done(outcome) => Ok(outcome),
            _ => Err(AdminError::Unexpected),
        }
    }

    fn ask(&mut self, request: &AdminRequest) -> Result<AdminReply, AdminError> {
        self.connection.send(request)?;
        match self.connection.receive() {
            Ok(AdminReply::Error(reason)) => Err(AdminError::Refused(reason)),
            Ok(reply) => Ok(reply),
            // So ends a daemon of version 6 or earlier a request that it does not know.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.refusal().unwrap_or(AdminError::Connection(error)))
            }
            Err(error) => Err(AdminError::Connection(error)),
        }
    }

    /// Why the daemon refuses even what every version knows: it names both versions.
    fn refusal(&self) -> Option<AdminError> {
        let mut again = Self::connect(&self.runtime_dir).ok()?;
        let status = AdminRequest::Status { version: VERSION };
        again.connection.send(&status).ok()?;
        match again.connection.receive() {
            Ok(AdminReply::Error(reason)) => Some(AdminError::Refused(reason)),
            _ => None,
        }
    }
}
