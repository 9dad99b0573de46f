//! The threads that read a machine's two serial ports.

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc::Sender},
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
pub(super) struct Tail(Arc<(Mutex<Lines>, Condvar)>);

#[derive(Debug, Default)]
struct Lines {
    last: VecDeque<String>,
    /// How many there were.
    all: usize,
}

impl Tail {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        let (lines, _) = &*self.0;
        lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: String) {
        let mut lines = self.lines();
        if lines.last.len() == TAIL {
            lines.last.pop_front();
        }
        lines.last.push_back(line);
        lines.all += 1;
        let (_, came) = &*self.0;
        came.notify_all();
    }

    /// How many lines there were.
    pub(super) fn count(&self) -> usize {
        self.lines().all
    }

    /// Waits for a line after the first so many. Returns whether it has come.
    pub(super) fn wait_for(&self, text: &str, after: usize, limit: Duration) -> bool {
        let (_, came) = &*self.0;
        let is_missing = |lines: &mut Lines| {
            let passed = (after + lines.last.len()).saturating_sub(lines.all);
            let mut rest = lines.last.iter().skip(passed);
            !rest.any(|line| line.contains(text))
        };
        let waited = came.wait_timeout_while(self.lines(), limit, is_missing);
        let (_lines, result) = waited.unwrap_or_else(PoisonError::into_inner);
        !result.timed_out()
    }

    /// Waits until a trace has come to its end, but not long: not all that is fatal has one.
    pub(super) fn wait_for_trace(&self) {
        let deadline = Instant::now() + TRACE;
        while Instant::now() < deadline && !self.text().contains("---[ end ") {
            thread::sleep(SLICE);
        }
    }

    pub(super) fn text(&self) -> String {
        let lines = self.lines();
        lines
            .last
            .iter()
            .map(|line| format!("    | {line}\n"))
            .collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_after_those_that_are_known_count() {
        let tail = Tail::default();
        let has = |after| tail.wait_for("wanted", after, Duration::ZERO);
        tail.push("wanted".to_owned());
        assert!(has(0) && !has(1));
        for _ in 0..TAIL {
            tail.push("other".to_owned());
        }
        assert!(!has(0), "it is not among the last ones");
        let known = tail.count();
        tail.push("[    1.0] what is wanted".to_owned());
        assert!(has(known) && has(0) && !has(known + 1));
    }
}
