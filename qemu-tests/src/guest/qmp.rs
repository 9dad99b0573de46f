//! A QMP session of the harness's own, beside whatever else talks to the same QEMU.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    time::Duration,
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
        })
    }

    /// Runs one command to its answer.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        if !self.negotiated {
            self.message().context("read QEMU's greeting")?;
            self.negotiated = true;
            self.send("qmp_capabilities", json!({}))?;
        }
        self.send(command, arguments)
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
