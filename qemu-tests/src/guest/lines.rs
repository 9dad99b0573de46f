//! The threads that read a machine's two serial ports.

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, Mutex, PoisonError, mpsc::Sender},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{console, protocol::Message};

/// How many console lines an error shows.
const TAIL: usize = 60;
/// How long a trace may take that follows what is fatal.
const TRACE: Duration = Duration::from_secs(2);
/// Between two looks for its end.
const SLICE: Duration = Duration::from_millis(50);

/// Something a machine did.
#[derive(Debug)]
pub(super) enum Event {
    /// The console shows what it must not.
    Fatal(String),
    /// The agent sent a message.
    Agent(Message),
    /// QEMU closed its end: it has ended.
    Closed,
}

/// The last lines of a console.
#[derive(Clone, Debug, Default)]
pub(super) struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    fn push(&self, line: String) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == TAIL {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// Waits until a trace has come to its end, but not long: not all that is fatal has one.
    pub(super) fn wait_for_trace(&self) {
        let deadline = Instant::now() + TRACE;
        while Instant::now() < deadline && !self.text().contains("---[ end ") {
            thread::sleep(SLICE);
        }
    }

    pub(super) fn text(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|line| format!("    | {line}\n")).collect()
    }
}

/// Logs the console and reports what is fatal.
pub(super) fn watch_console(stream: UnixStream, log: &Path, events: Sender<Event>) -> Result<Tail> {
    let mut log = File::create(log).with_context(|| format!("create {}", log.display()))?;
    let tail = Tail::default();
    let lines = tail.clone();
    thread::spawn(move || {
        each_line(stream, |line| {
            // A full disk costs the log, not the watch.
            let _ = writeln!(log, "{line}");
            lines.push(line.to_owned());
            console::fatal(line).is_none() || events.send(Event::Fatal(line.to_owned())).is_ok()
        });
        let _ = events.send(Event::Closed);
    });
    Ok(tail)
}

/// Passes the agent's messages on.
pub(super) fn read_agent(stream: UnixStream, events: Sender<Event>) {
    thread::spawn(move || {
        each_line(stream, |line| match serde_json::from_str(line) {
            Ok(message) => events.send(Event::Agent(message)).is_ok(),
            Err(_) => true,
        });
    });
}

/// Calls `take` for every line until it returns false or the stream ends.
fn each_line(stream: UnixStream, mut take: impl FnMut(&str) -> bool) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while matches!(reader.read_until(b'\n', &mut line), Ok(read) if read > 0) {
        let text = String::from_utf8_lossy(&line);
        if !take(text.trim_end()) {
            return;
        }
        line.clear();
    }
}
