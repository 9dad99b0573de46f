//! A QMP session of the harness's own, beside whatever else talks to the same QEMU.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// QEMU answers QMP from its main loop, which a busy TCG machine may keep waiting.
const LIMIT: Duration = Duration::from_secs(60);

/// An open session.
#[derive(Debug)]
pub(super) struct Qmp {
    reader: BufReader<UnixStream>,
    negotiated: bool,
    /// Those nobody has waited for yet, oldest first.
    events: Vec<Value>,
}

impl Qmp {
    /// The harness's end of the socket; QEMU may not have started yet.
    pub(super) fn new(stream: UnixStream) -> Result<Self> {
        stream
            .set_read_timeout(Some(LIMIT))
            .context("limit QMP reads")?;
        stream
            .set_write_timeout(Some(LIMIT))
            .context("limit QMP writes")?;
        Ok(Self {
            reader: BufReader::new(stream),
            negotiated: false,
            events: Vec::new(),
        })
    }

    /// Runs one command to its answer.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.negotiate()?;
        self.send(command, arguments)
    }

    /// Waits for an event of this name; those that came before it are forgotten.
    pub(super) fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        self.negotiate()?;
        let deadline = Instant::now() + limit;
        loop {
            let found = self.events.iter().position(|event| event["event"] == name);
            if let Some(index) = found {
                return Ok(self.events.drain(..=index).next_back().unwrap_or_default());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("QEMU told of no {name} within {limit:?}");
            }
            let stream = self.reader.get_ref();
            stream.set_read_timeout(Some(left))?;
            let message = self.message().with_context(|| format!("wait for {name}"));
            self.reader.get_ref().set_read_timeout(Some(LIMIT))?;
            self.events.push(message?);
        }
    }

    fn negotiate(&mut self) -> Result<()> {
        if !self.negotiated {
            self.message().context("read QEMU's greeting")?;
            self.negotiated = true;
            self.send("qmp_capabilities", json!({}))?;
        }
        Ok(())
    }

    fn send(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let text = json!({ "execute": command, "arguments": arguments }).to_string();
        self.reader
            .get_mut()
            .write_all(text.as_bytes())
            .context("write to QMP")?;
        loop {
            let mut message = self.message()?;
            if let Some(error) = message.get("error") {
                bail!("QMP {command}: {error}");
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            self.events.push(message);
        }
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).context("read from QMP")? == 0 {
            bail!("QEMU closed QMP");
        }
        serde_json::from_str(&line).with_context(|| format!("parse {line:?} from QMP"))
    }
}
