// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the daemon asks an engine: one thread for each connection, so that an engine that
//! does not answer keeps nobody else waiting.

use super::line::{Inbox, Line, Reports, Work};
use super::status;
use crate::protocol::{Connection, ControlReply, ControlRequest, FileSpan, HelloReply};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::Duration;

/// Longest wait for an answer that only needs a look.
pub(super) const QUICK: Duration = Duration::from_secs(2);
/// Longest wait for all overlays of a VM to be undone.
pub(super) const SLOW: Duration = Duration::from_secs(120);
pub(super) type Answer = Result<ControlReply, String>;

/// A request, and where its answer goes.
type Asked = (ControlRequest, SyncSender<Answer>);

/// The daemon's end of one VM's control connection, if there is one.
pub(super) struct Control {
    line: Line<Asked, FileSpan, End>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

/// Ends an exchange under way when it is dropped.
struct End(UnixStream);

impl Drop for End {
    fn drop(&mut self) {
        // That it is closed already is fine.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

impl Control {
    /// Nobody is connected.
    pub(super) fn new() -> Self {
        Self { line: Line::new() }
    }

    /// Takes a connection into use in place of the one before it, and greets the engine.
    pub(super) fn connect(&self, mut connection: Connection) -> std::io::Result<()> {
        let end = End(connection.stream().try_clone()?);
        let serving = self.line.connect(end, move |inbox| {
            match connection.send(&HelloReply::Ready) {
                Ok(()) => serve(connection, inbox),
                Err(error) => log::debug!("an engine has gone: {error}"),
            }
        });
        serving.map(drop)
    }

    /// Closes the connection.
    pub(super) fn disconnect(&self) {
        self.line.disconnect();
    }

    /// Asks, and returns where the answer will come; `None` when nobody is connected.
    pub(super) fn ask(&self, request: ControlRequest) -> Option<Receiver<Answer>> {
        let (sender, answer) = mpsc::sync_channel(1);
        self.line.ask((request, sender)).then_some(answer)
    }

    /// Notes whether sharing is paused, before the engine is told.
    pub(super) fn set_paused(&self, paused: bool) {
        self.line.set_paused(paused);
    }

    /// Has the guest report these pages again, as soon as the engine listens.
    pub(super) fn report(&self, spans: Vec<FileSpan>) {
        self.line.report(spans);
    }
}

/// Waits for an answer.
pub(super) fn wait(answer: &Receiver<Answer>, limit: Duration) -> Answer {
    answer
        .recv_timeout(limit)
        .unwrap_or_else(|_| Err("the engine does not answer".into()))
}

fn serve(mut connection: Connection, inbox: &Inbox<Asked, FileSpan>) {
    while let Some(work) = inbox.next() {
        let answer = match work {
            Work::Ask((request, answer_to)) => {
                let answer = exchange(&mut connection, &request);
                let failed = answer.is_err();
                // Whoever asked may have stopped waiting.
                let _ = answer_to.send(answer.map_err(|error| error.to_string()));
                if failed {
                    return;
                }
                continue;
            }
            Work::Report(reports) => {
                let request = match &reports {
                    Reports::Spans(spans) => ControlRequest::Report {
                        spans: spans.clone(),
                    },
                    // An engine that goes on has its guest report everything.
                    Reports::Everything => ControlRequest::Resume,
                };
                let answer = exchange(&mut connection, &request);
                if answer.is_err() {
                    inbox.put_back(reports);
                }
                answer
            }
        };
        match answer {
            Ok(ControlReply::Error(reason)) => log::debug!("a guest cannot be asked: {reason}"),
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

fn exchange(
    connection: &mut Connection,
    request: &ControlRequest,
) -> std::io::Result<ControlReply> {
    connection.set_limit(match request {
        ControlRequest::Undo(_)
        | ControlRequest::Tidy { .. }
        | ControlRequest::Pause
        | ControlRequest::SplitHugePages(_)
        | ControlRequest::Resume => SLOW,
        ControlRequest::Status | ControlRequest::Files { .. } | ControlRequest::Report { .. } => {
            QUICK * 2
        }
    })?;
    connection.send(request)?;
    Ok(tamed(connection.receive()?))
}

/// An engine may say anything. Here is where all of it comes in.
fn tamed(reply: ControlReply) -> ControlReply {
    match reply {
        ControlReply::Error(mut reason) => {
            status::tame_text(&mut reason);
            ControlReply::Error(reason)
        }
        ControlReply::Status(engine) => ControlReply::Status(Box::new(status::tamed(*engine))),
        ControlReply::Files(mut files) => {
            for file in &mut files {
                status::tame_name(&mut file.name);
                file.pages_shared = file.pages_shared.min(status::MOST_PAGES);
                file.pages_broken = file.pages_broken.min(status::MOST_PAGES);
            }
            ControlReply::Files(files)
        }
        ControlReply::Done => ControlReply::Done,
    }
}

#[cfg(test)]
mod tests {
    use super::super::line::MAX_REPORTS;
    use super::super::registry::Pause;
    use super::super::testing::{Place, caller};
    use super::super::vm::Vm;
    use super::*;
    use crate::protocol::{Encoding, EngineStatus, FileKey, Undo};

    fn connected(control: &Control) -> Connection {
        connected_by(|connection| control.connect(connection))
    }

    fn connected_by(connect: impl FnOnce(Connection) -> std::io::Result<()>) -> Connection {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let limit = Duration::from_secs(10);
        let connection = |stream| Connection::new(stream, Encoding::Postcard, limit).unwrap();
        connect(connection(ours)).unwrap();
        let mut engine = connection(theirs);
        assert!(matches!(engine.receive().unwrap(), HelloReply::Ready));
        engine
    }

    /// Ends the engine, and returns once what it did not answer is kept for the next one.
    fn leave(engine: Connection, control: &Control) {
        drop(engine);
        while let Some(answer) = control.ask(ControlRequest::Status) {
            wait(&answer, Duration::from_secs(10)).unwrap_err();
        }
    }

    /// So many spans.
    fn spans(count: usize) -> Vec<FileSpan> {
        let file = FileKey {
            fs_uuid: [0; 16],
            inode: 1,
            size: 0,
            mtime_ns: 0,
            generation: 0,
            kind: 0,
        };
        let span = |page| FileSpan {
            file,
            page,
            pages: 1,
        };
        (0..count as u64).map(span).collect()
    }

    #[test]
    fn more_than_is_kept_for_an_engine_is_asked_for_as_everything() {
        let control = Control::new();
        let all = spans(MAX_REPORTS);
        control.report(all.clone());
        let mut engine = connected(&control);
        let wanted = ControlRequest::Report { spans: all };
        assert_eq!(engine.receive::<ControlRequest>().unwrap(), wanted);
        // It answers nothing, and what comes then would be too much.
        control.report(spans(1));
        control.report(spans(MAX_REPORTS));
        leave(engine, &control);
        for _ in 0..2 {
            let mut engine = connected(&control);
            let request = engine.receive::<ControlRequest>().unwrap();
            assert_eq!(request, ControlRequest::Resume);
            // Not answered either at first.
            leave(engine, &control);
        }
        let mut engine = connected(&control);
        engine.receive::<ControlRequest>().unwrap();
        engine.send(&ControlReply::Done).unwrap();
        control.report(spans(1));
        let wanted = ControlRequest::Report { spans: spans(1) };
        assert_eq!(engine.receive::<ControlRequest>().unwrap(), wanted);
    }

    #[test]
    fn a_vm_that_is_paused_is_not_resumed_to_be_asked_for_everything() {
        let place = Place::new();
        let registry = place.registry();
        let caller = caller(std::process::id());
        let first = |vm: &Vm| {
            vm.control.report(spans(MAX_REPORTS + 1));
            let mut engine = connected(&vm.control);
            let _answer = vm.control.ask(ControlRequest::Status).unwrap();
            engine.receive::<ControlRequest>().unwrap()
        };
        let vm = registry.create(caller, None, Some("g".into())).unwrap();
        assert_eq!(first(&vm), ControlRequest::Resume);
        vm.set_pause(registry.runtime(), Pause::Paused).unwrap();
        assert_eq!(first(&vm), ControlRequest::Status);
        vm.set_pause(registry.runtime(), Pause::Running).unwrap();
        assert_eq!(first(&vm), ControlRequest::Resume);
        // One that was paused before this daemon.
        vm.set_pause(registry.runtime(), Pause::Paused).unwrap();
        drop((vm, registry));
        let registry = place.registry();
        assert_eq!(first(&registry.vms()[0]), ControlRequest::Status);
    }

    #[test]
    fn what_is_ordered_after_an_engine_was_welcomed_it_is_told_and_what_it_knows_it_is_not() {
        let place = Place::new();
        let registry = place.registry();
        let caller = caller(std::process::id());
        let vm = registry.create(caller, None, Some("g".into())).unwrap();
        let note = |pause| vm.set_pause(registry.runtime(), pause).unwrap();
        let undo = ControlRequest::Undo(Undo::All);
        for (welcome, order, told) in [
            (Pause::Running, Pause::Running, ControlRequest::Status),
            (Pause::Running, Pause::Paused, ControlRequest::Pause),
            (Pause::Paused, Pause::Paused, ControlRequest::Pause),
            (Pause::Paused, Pause::Running, ControlRequest::Resume),
            (Pause::Running, Pause::Undone, undo.clone()),
            (Pause::Undone, Pause::Undone, undo),
            (Pause::Undone, Pause::Running, ControlRequest::Resume),
        ] {
            note(welcome);
            assert_eq!(vm.welcome().0, welcome.is_paused());
            note(order);
            let mut engine = connected_by(|connection| vm.connect_control(connection));
            let _answer = vm.control.ask(ControlRequest::Status).unwrap();
            let request = engine.receive::<ControlRequest>().unwrap();
            assert_eq!(request, told, "{welcome:?}, then {order:?}");
        }
    }

    #[test]
    fn what_an_engine_did_not_answer_is_asked_of_the_next_connection() {
        let control = Control::new();
        let spans = spans(1);
        let wanted = ControlRequest::Report {
            spans: spans.clone(),
        };
        let mut engine = connected(&control);
        control.report(spans);
        assert_eq!(engine.receive::<ControlRequest>().unwrap(), wanted);
        drop(engine);
        let mut engine = connected(&control);
        assert_eq!(engine.receive::<ControlRequest>().unwrap(), wanted);
    }

    #[test]
    fn whatever_an_engine_answers_is_tamed() {
        let control = Control::new();
        let mut engine = connected(&control);
        let mut ask = |reply: ControlReply| {
            let answer = control.ask(ControlRequest::Pause).unwrap();
            engine.receive::<ControlRequest>().unwrap();
            engine.send(&reply).unwrap();
            wait(&answer, Duration::from_secs(10)).unwrap()
        };
        let error = ControlReply::Error(format!("a\u{1b}[2J\n{}", "x".repeat(1000)));
        let ControlReply::Error(reason) = ask(error) else {
            panic!("no error");
        };
        assert!(
            reason.starts_with("a[2Jx") && reason.len() < 300,
            "{reason}"
        );
        let hostile = EngineStatus {
            cpu_seconds: f64::NAN,
            ..EngineStatus::default()
        };
        let ControlReply::Status(engine) = ask(ControlReply::Status(Box::new(hostile))) else {
            panic!("no status");
        };
        assert_eq!(engine.cpu_seconds, 0.0);
    }

    #[test]
    fn an_engine_that_is_given_up_is_told_so() {
        let control = Control::new();
        let mut engine = connected(&control);
        let answer = control.ask(ControlRequest::Pause).unwrap();
        engine.receive::<ControlRequest>().unwrap();
        // No message, and as good as none within the time.
        std::io::Write::write_all(&mut engine.stream(), &[255; 8]).unwrap();
        wait(&answer, Duration::from_secs(10)).unwrap_err();
        let end = engine.receive::<ControlRequest>().unwrap_err();
        assert_eq!(end.kind(), std::io::ErrorKind::UnexpectedEof);
        assert!(control.ask(ControlRequest::Pause).is_none());
    }
}
