// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One connection of an operator, on a thread of its own.

use super::control::{self, SLOW};
use super::registry::{Caller, Registry};
use super::{EventLoop, status};
use crate::protocol::{
    AdminReply, AdminRequest, Connection, ControlReply, ControlRequest, Encoding, Scope, VERSION,
    peer,
};
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

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
        let reply = match request {
            AdminRequest::CreateVm {
                version: VERSION,
                name,
                group,
            } => create(registry, events, caller, name, group),
            AdminRequest::Status { version: VERSION } => {
                Ok(AdminReply::Status(Box::new(status::collect(registry))))
            }
            AdminRequest::CreateVm { version, .. } | AdminRequest::Status { version } => {
                Err(format!(
                    "pagefusionctl speaks version {version} of the protocol and the daemon \
                     version {VERSION}; use the two that belong together, or restart the daemon"
                ))
            }
            AdminRequest::Undo(scope) => set_paused(registry, &scope, true),
            AdminRequest::Resume(scope) => set_paused(registry, &scope, false),
        };
        connection.send(&reply.unwrap_or_else(AdminReply::Error))?;
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

fn set_paused(registry: &Registry, scope: &Scope, paused: bool) -> Result<AdminReply, String> {
    let vms = registry.in_scope(scope)?;
    registry
        .set_paused(scope, &vms, paused)
        .map_err(|error| format!("cannot note in the runtime directory what is paused: {error}"))?;
    let request = if paused {
        ControlRequest::Undo
    } else {
        ControlRequest::Resume
    };
    let asked: Vec<_> = vms
        .iter()
        .map(|vm| vm.control.ask(request.clone()))
        .collect();
    let deadline = Instant::now() + SLOW;
    let mut failed = Vec::new();
    for (vm, answer) in vms.iter().zip(asked) {
        let left = deadline.saturating_duration_since(Instant::now());
        let result = match answer.map(|answer| control::wait(&answer, left)) {
            Some(Ok(ControlReply::Done)) => Ok(()),
            Some(Ok(ControlReply::Error(reason)) | Err(reason)) => Err(reason),
            Some(Ok(ControlReply::Status(_))) => Err("the engine answers nonsense".into()),
            // Without an engine nothing is shared, unless it has lost its connection.
            None if paused && may_share(registry, vm.number) => {
                Err("its engine is not connected; it will be told when it is".into())
            }
            None => Ok(()),
        };
        if let Err(reason) = result {
            // A VM that has ended meanwhile shares nothing.
            if !vm.process.has_ended() {
                failed.push((vm.name.clone(), reason));
            }
        }
    }
    Ok(AdminReply::Done {
        vms: vms.len(),
        failed,
    })
}

fn may_share(registry: &Registry, number: u32) -> bool {
    let Some(vm) = registry.vm(number) else {
        return false;
    };
    let store = vm.store();
    store.vm_statistics(number).granted > 0 || store.is_waiting_for(number)
}
