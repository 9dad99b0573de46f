// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One connection of an operator, on a thread of its own.

use super::registry::{Caller, Registry};
use super::{EventLoop, files, orders, status};
use crate::protocol::{
    AdminReply, AdminRequest, Connection, Encoding, Selection, Undo, VERSION, peer,
};
use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Longest time for one message of an operator, once it has begun.
const LIMIT: Duration = Duration::from_secs(5);

/// Serves a connection until it ends.
pub(super) fn serve(registry: &Registry, events: &EventLoop, stream: UnixStream) {
    match serve_requests(registry, events, stream) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        Err(error) => log::warn!("operator: {error}"),
    }
}

fn serve_requests(registry: &Registry, events: &EventLoop, stream: UnixStream) -> io::Result<()> {
    let peer = peer(&stream)?;
    let mut connection = Connection::new(stream, Encoding::Json, LIMIT)?;
    let own = rustix::process::geteuid();
    if !peer.uid.is_root() && peer.uid != own {
        let reason = format!(
            "only root and user {} may control this daemon",
            own.as_raw()
        );
        return connection.send(&AdminReply::Error(reason));
    }
    let caller = Caller {
        pid: peer.pid.as_raw_nonzero().get(),
        uid: peer.uid.as_raw(),
    };
    loop {
        let request = connection.receive_when_it_comes()?;
        let reply = answer(registry, events, caller, request);
        connection.send(&reply.unwrap_or_else(AdminReply::Error))?;
    }
}

fn answer(
    registry: &Registry,
    events: &EventLoop,
    caller: Caller,
    request: AdminRequest,
) -> Result<AdminReply, String> {
    match request {
        AdminRequest::CreateVm { version, .. }
        | AdminRequest::Status { version }
        | AdminRequest::Files { version, .. }
            if version != VERSION =>
        {
            Err(format!(
                "pagefusionctl speaks version {version} of the protocol and the daemon \
                 version {VERSION}; use the two that belong together, or restart the daemon"
            ))
        }
        AdminRequest::CreateVm {
            name, group, user, ..
        } => {
            let uid = user.unwrap_or(caller.uid);
            if uid != caller.uid && caller.uid != 0 {
                return Err("only root may start a VM for another user".into());
            }
            create(registry, events, Caller { uid, ..caller }, name, group)
        }
        AdminRequest::Status { .. } => Ok(AdminReply::Status(Box::new(status::collect(registry)))),
        AdminRequest::Files { scope, limit, .. } => {
            Ok(AdminReply::Files(files::collect(registry, &scope, limit)?))
        }
        AdminRequest::Undo { scope, selection } => match selection {
            Selection::All => orders::undo_all(registry, &scope),
            Selection::File(name) => orders::undo_files(registry, &scope, &name),
            Selection::Pages { gfn, pages } => {
                orders::undo_pages(registry, &scope, Undo::Pages { gfn, pages })
            }
        }
        .map(AdminReply::Done),
        AdminRequest::Set {
            scope,
            each_vm,
            changes,
            policy,
        } => orders::set(registry, &scope, each_vm, changes, policy).map(AdminReply::Done),
        AdminRequest::Pause { scope } => orders::pause(registry, &scope).map(AdminReply::Done),
        AdminRequest::Resume { scope, file: None } => {
            orders::resume(registry, &scope).map(AdminReply::Done)
        }
        AdminRequest::Resume {
            scope,
            file: Some(name),
        } => orders::resume_files(registry, &scope, &name).map(AdminReply::Done),
    }
}

fn create(
    registry: &Registry,
    events: &EventLoop,
    caller: Caller,
    name: Option<String>,
    group: Option<String>,
) -> Result<AdminReply, String> {
    let vm = registry.create(caller, name, group)?;
    if let Err(error) = events.watch_vm(&vm) {
        registry.end(vm.number);
        return Err(format!("cannot watch the VM's process: {error}"));
    }
    Ok(AdminReply::Created {
        vm: vm.number,
        name: vm.name.clone(),
        directory: vm.directory.clone(),
    })
}
