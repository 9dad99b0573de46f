// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One connection of an operator, on a thread of its own.

use super::registry::{Caller, Registry};
use super::{EventLoop, files, orders, status};
use crate::protocol::{
    AdminReply, AdminRequest, Connection, Encoding, Order, Outcome, Scope, Selection, Undo,
    VERSION, peer,
};
use serde_json::Value;
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
        let said = connection.receive_when_it_comes()?;
        let reply = understood(said).and_then(|it| answer(registry, events, caller, it));
        connection.send(&reply.unwrap_or_else(AdminReply::Error))?;
    }
}

/// A request of this version. Another's may look like one of ours and mean something else.
fn understood(said: Value) -> Result<AdminRequest, String> {
    let request = said.as_object().and_then(|it| it.values().next());
    let version = request.and_then(|it| it.get("version")?.as_u64());
    if version == Some(VERSION.into()) {
        return serde_json::from_value(said)
            .map_err(|error| format!("the request makes no sense: {error}"));
    }
    let version = version.map_or_else(
        // What came without was undo, pause, resume or set of those.
        || "6 or earlier".to_owned(),
        |version| version.to_string(),
    );
    Err(format!(
        "pagefusionctl speaks version {version} of the protocol and the daemon version {VERSION}; \
         use the two that belong together, or restart the daemon"
    ))
}

fn answer(
    registry: &Registry,
    events: &EventLoop,
    caller: Caller,
    request: AdminRequest,
) -> Result<AdminReply, String> {
    match request {
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
        AdminRequest::Order { scope, order, .. } => {
            obey(registry, &scope, order).map(AdminReply::Done)
        }
    }
}

fn obey(registry: &Registry, scope: &Scope, order: Order) -> Result<Outcome, String> {
    match order {
        Order::Undo(Selection::All) => orders::undo_all(registry, scope),
        Order::Undo(Selection::File(name)) => orders::undo_files(registry, scope, &name),
        Order::Undo(Selection::Pages { gfn, pages }) => {
            orders::undo_pages(registry, scope, Undo::Pages { gfn, pages })
        }
        Order::Pause => orders::pause(registry, scope),
        Order::Resume { file: None } => orders::resume(registry, scope),
        Order::Resume { file: Some(name) } => orders::resume_files(registry, scope, &name),
        Order::Set {
            each_vm,
            changes,
            policy,
        } => orders::set(registry, scope, each_vm, changes, policy),
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
        if let Some(vm) = registry.begin_end(vm.number) {
            registry.finish_end(&vm);
        }
        return Err(format!("cannot watch the VM's process: {error}"));
    }
    Ok(AdminReply::Created {
        vm: vm.number,
        name: vm.name.clone(),
        directory: vm.directory.clone(),
    })
}
