// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One connection of an engine, on a thread of its own.

use super::gate::Gate;
use super::registry::Registry;
use super::vm::{Asker, Vm};
use crate::protocol::{
    Connection, Encoding, EngineReply, EngineRequest, Hello, HelloReply, MAX_PUBLISH_PAGES, Role,
    VERSION, Welcome,
};
use crate::store::batches::pages_of;
use crate::store::{PAGE, StoreError};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// Longest time for one message of an engine, once it has begun.
const LIMIT: Duration = Duration::from_secs(5);

/// Serves a connection until it ends.
pub(super) fn serve(registry: &Registry, vm: &Arc<Vm>, stream: UnixStream) {
    let Some(_serving) = vm.enter() else {
        log::warn!("VM {} ({}) keeps too many threads busy", vm.number, vm.name);
        let _ = stream.shutdown(Shutdown::Both);
        return;
    };
    let result = stream.try_clone().and_then(|stream| {
        let mut connection = Connection::new(stream, Encoding::Postcard, LIMIT)?;
        match greet(vm, &mut connection)? {
            None => Ok(false),
            Some(Role::Requests) => serve_requests(registry, vm, connection),
            Some(Role::Control) => {
                vm.connect_control(connection)?;
                Ok(true)
            }
        }
    });
    match result {
        // The thread of the control connection has it.
        Ok(true) => return,
        Ok(false) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        Err(error) => log::warn!("engine of VM {} ({}): {error}", vm.number, vm.name),
    }
    // Others hold the stream as well. That the engine has closed it already is fine.
    let _ = stream.shutdown(Shutdown::Both);
}

/// What the connection is for; `None` if it was refused.
fn greet(vm: &Vm, connection: &mut Connection) -> io::Result<Option<Role>> {
    let hello: Hello = connection.receive()?;
    if hello.version != VERSION {
        let reason = format!(
            "the engine speaks version {} of the protocol and the daemon version {VERSION}; \
             start the VM again with the library that belongs to the daemon",
            hello.version
        );
        let times = vm.count_refusal();
        // It tries again as long as it lives.
        if times.is_power_of_two() {
            log::warn!(
                "engine of VM {} ({}): {reason} ({times} times so far)",
                vm.number,
                vm.name
            );
        }
        connection.send(&HelloReply::Refused(reason))?;
        return Ok(None);
    }
    Ok(Some(hello.role))
}

fn serve_requests(registry: &Registry, vm: &Vm, mut connection: Connection) -> io::Result<bool> {
    // Before it can map anything: the next daemon must wait for what it maps.
    vm.engine_seen(registry.runtime())?;
    let asker = vm.new_asker(connection.stream())?;
    welcome(vm, &mut connection)?;
    answer_all(&mut connection, |request, payload, first| {
        answer(registry, (vm, &asker), request, payload, first)
    })
}

/// Answers requests until the connection ends. `answer` is told which is the first, and ends
/// the connection with [`StoreError::Unreachable`].
pub(super) fn answer_all(
    connection: &mut Connection,
    mut answer: impl FnMut(&EngineRequest, &[u8], bool) -> Result<EngineReply, StoreError>,
) -> io::Result<bool> {
    let mut payload = Vec::new();
    let mut first = true;
    loop {
        let request = connection.receive_when_it_comes()?;
        if let EngineRequest::Publish { spans } = &request {
            let pages = pages_of(spans);
            if pages > MAX_PUBLISH_PAGES as u64 {
                let reason = format!("{pages} pages at once; the most is {MAX_PUBLISH_PAGES}");
                connection.send(&EngineReply::Error(reason.clone()))?;
                // What follows is payload and no message.
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
            payload.resize(pages as usize * PAGE, 0);
            connection.receive_payload(&mut payload)?;
        }
        let reply = match answer(&request, &payload, first) {
            Ok(reply) => reply,
            Err(StoreError::Unreachable(error)) => return Err(error),
            Err(error) => EngineReply::Error(error.to_string()),
        };
        connection.send(&reply)?;
        first = false;
    }
}

fn answer(
    registry: &Registry,
    (vm, asker): (&Vm, &Arc<Asker>),
    request: &EngineRequest,
    payload: &[u8],
    first: bool,
) -> Result<EngineReply, StoreError> {
    let is_too_fast =
        matches!(request, EngineRequest::Publish { .. }) && !wait_for_pace(vm, payload.len());
    let mut gate = Gate::of(vm, asker)?;
    if is_too_fast {
        let pages = payload.len() / PAGE;
        gate.store().refuse_for_pace(vm.number, pages as u32);
        return Ok(EngineReply::Published(vec![None; pages]));
    }
    let reply = gate.answer(request, payload, first)?;
    let reports = match request {
        EngineRequest::Publish { .. } => gate.store().take_reports(),
        _ => return Ok(reply),
    };
    drop(gate);
    for (number, spans) in reports {
        if let Some(first) = registry.vm(number) {
            first.control.report(spans);
        }
    }
    Ok(reply)
}

/// Holds a VM to its rate and to its group's, before it gets hold of the store; whether what
/// it has to publish can be taken within a reasonable time.
fn wait_for_pace(vm: &Vm, bytes: usize) -> bool {
    if bytes == 0 {
        // It would wait for what others have taken.
        return true;
    }
    for pace in [&vm.pace, &*vm.group_store.pace] {
        match pace.take(bytes) {
            Some(wait) => std::thread::sleep(wait),
            None => return false,
        }
    }
    true
}

fn welcome(vm: &Vm, connection: &mut Connection) -> io::Result<()> {
    let (store, hash_seed) = {
        let store = vm.store();
        (store.read_only()?, store.hash_seed())
    };
    let uffd = open_uffd();
    let (paused, split_huge_pages) = vm.welcome();
    let mut descriptors = vec![store.as_fd()];
    if let Some(device) = &vm.device {
        descriptors.extend([device.memory(), device.doorbell(), device.interrupt()]);
    }
    descriptors.extend(uffd.as_ref().map(AsFd::as_fd));
    let welcome = Welcome {
        vm: vm.number,
        name: vm.name.clone(),
        group: vm.group.clone(),
        hash_seed,
        has_device: vm.device.is_some(),
        has_uffd_device: uffd.is_some(),
        paused,
        split_huge_pages,
    };
    connection.send_with_descriptors(&HelloReply::Welcome(Box::new(welcome)), &descriptors)
}

/// Lets a VMM without privileges handle faults that KVM takes in the kernel.
fn open_uffd() -> Option<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open("/dev/userfaultfd", flags, Mode::empty()) {
        Ok(uffd) => Some(uffd),
        Err(error) => {
            log::debug!("cannot open /dev/userfaultfd: {error}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pace::SLOWEST;
    use super::super::testing::{Place, caller};
    use super::super::{metrics, status};
    use super::*;
    use crate::protocol::{FileKey, FileSpan, Limit, LimitChanges, PolicyChanges, Scope};
    use std::time::Instant;

    #[test]
    fn pages_that_come_too_fast_are_refused_and_counted_for_whom_sent_them() {
        let place = Place::new();
        let registry = place.registry();
        let caller = caller(std::process::id());
        let create = registry.create(caller, Some("fast".into()), Some("g".into()));
        let vm = create.unwrap();
        let (stream, _engine) = UnixStream::pair().unwrap();
        let asker = vm.new_asker(&stream).unwrap();
        let file = FileKey {
            fs_uuid: [0; 16],
            inode: 1,
            size: 1 << 20,
            mtime_ns: 0,
            generation: 0,
            kind: 1,
        };
        let span = FileSpan {
            file,
            page: 0,
            pages: MAX_PUBLISH_PAGES as u32,
        };
        let publish = EngineRequest::Publish { spans: vec![span] };
        let payload = vec![7; MAX_PUBLISH_PAGES * PAGE];
        let ask = || answer(&registry, (&vm, &asker), &publish, &payload, false).unwrap();
        let nothing = EngineReply::Published(vec![None; MAX_PUBLISH_PAGES]);
        let counted = || {
            let status = status::collect(&registry);
            let text = metrics::text(&status).unwrap();
            let [of_vm, of_group] = [
                "pagefusion_vm_limited_pages_total{vm=\"fast\",group=\"g\"} ",
                "pagefusion_group_store_full_pages_total{group=\"g\"} ",
            ]
            .map(|name| text.lines().find_map(|line| line.strip_prefix(name)));
            assert_eq!(of_vm, of_group, "{text}");
            assert_eq!(of_vm, Some(&*format!("{}.0", status.vms[0].pages_limited)));
            assert_eq!(
                status.groups[0].pages_store_full,
                status.vms[0].pages_limited
            );
            status.vms[0].pages_limited
        };

        assert_ne!(ask(), nothing, "it may be as fast as it likes");
        assert_eq!(counted(), 0);

        vm.pace.set_rate(Some(SLOWEST));
        let deadline = Instant::now() + Duration::from_secs(60);
        // Where a second passes in between, there is room for it again.
        let refused = loop {
            assert!(Instant::now() < deadline, "it is never too fast");
            while vm.pace.take(PAGE).is_some() {}
            let reply = ask();
            if counted() > 0 {
                break reply;
            }
        };
        assert_eq!(refused, nothing);
        assert_eq!(counted(), MAX_PUBLISH_PAGES as u64);
    }

    /// A process that is there as long as this.
    struct Somebody(std::process::Child);

    impl Somebody {
        fn new() -> Self {
            let waits = std::process::Command::new("cat")
                .stdin(std::process::Stdio::piped())
                .spawn();
            Self(waits.unwrap())
        }
    }

    impl Drop for Somebody {
        fn drop(&mut self) {
            drop(self.0.stdin.take());
            let _ = self.0.wait();
        }
    }

    #[test]
    fn the_rate_of_a_group_is_that_of_all_its_vms_and_of_no_other_group() {
        let place = Place::new();
        let registry = place.registry();
        let processes = [Somebody::new(), Somebody::new(), Somebody::new()];
        let names = [("one", "g"), ("two", "g"), ("other", "h")];
        let create = |(process, (name, group)): (&Somebody, (&str, &str))| {
            let caller = caller(process.0.id());
            let created = registry.create(caller, Some(name.into()), Some(group.into()));
            created.unwrap()
        };
        let vms: Vec<_> = processes.iter().zip(names).map(create).collect();
        let slow = LimitChanges {
            publish_rate: Some(Limit::Bytes(SLOWEST)),
            ..LimitChanges::default()
        };
        let scope = Scope::Group("g".into());
        let set = registry.set_limits(&scope, &[], false, slow, PolicyChanges::default());
        set.unwrap();

        let mut pages = 0;
        let mut publish = |vm: &Arc<Vm>| {
            let (stream, _engine) = UnixStream::pair().unwrap();
            let asker = vm.new_asker(&stream).unwrap();
            let span = FileSpan {
                file: FileKey {
                    fs_uuid: [0; 16],
                    inode: 1,
                    size: u64::MAX,
                    mtime_ns: 0,
                    generation: 0,
                    kind: 1,
                },
                page: pages,
                pages: MAX_PUBLISH_PAGES as u32,
            };
            pages += MAX_PUBLISH_PAGES as u64;
            let publish = EngineRequest::Publish { spans: vec![span] };
            let payload = vec![7; MAX_PUBLISH_PAGES * PAGE];
            answer(&registry, (vm, &asker), &publish, &payload, false).unwrap()
        };
        let limited = || {
            let status = status::collect(&registry);
            let of = |name| status.vms.iter().find(|vm| vm.name == name).unwrap();
            names.map(|(name, _)| of(name).pages_limited)
        };
        let nothing = EngineReply::Published(vec![None; MAX_PUBLISH_PAGES]);
        // A second's worth was saved up.
        assert_ne!(publish(&vms[0]), nothing);
        assert_eq!(limited(), [0; 3]);
        // Where a second passes in between, there is room for it again.
        let refused = (0..20).find_map(|_| {
            // The one takes all that there is.
            let taken = (0..1000).take_while(|_| vms[0].group_store.pace.take(PAGE).is_some());
            assert!(taken.count() < 1000, "the group has no rate");
            let reply = publish(&vms[1]);
            (limited()[1] > 0).then_some(reply)
        });
        assert_eq!(
            refused,
            Some(nothing.clone()),
            "the group is never too fast"
        );
        assert_eq!(limited(), [0, MAX_PUBLISH_PAGES as u64, 0]);
        assert_ne!(publish(&vms[2]), nothing);
        assert_eq!(limited()[2], 0);
    }
}
