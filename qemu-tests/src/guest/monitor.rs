//! What QEMU's monitor does and knows of a machine.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Guest;
use crate::protocol::Op;

/// A frame of guest memory, which below 3 GiB is all in one piece.
const LOW: u64 = 0x100;
/// The first frame of memory that has no place below 4 GiB.
pub const HIGH: u64 = 1 << 20;
/// With this much memory and more, QEMU's default machine has only so much of it there.
const LOW_LIMIT_MIB: u32 = 3584;
const LOW_MIB: u32 = 3072;

impl Guest {
    /// Runs a QMP command to its answer.
    pub fn monitor(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp
            .execute(command, arguments)
            .with_context(|| self.name.clone())
    }

    /// Runs a command of the human monitor, which has what QMP has not, and returns what it printed.
    pub fn human_monitor(&mut self, line: &str) -> Result<String> {
        let arguments = json!({ "command-line": line });
        let answer = self.monitor("human-monitor-command", arguments)?;
        let text = answer.as_str().context("the monitor printed no text")?;
        Ok(text.trim().to_owned())
    }

    /// Waits for an event that has come since the last wait for one of its name, or is to come.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        self.qmp
            .wait_event(name, limit)
            .with_context(|| self.name.clone())
    }

    /// Stops its CPUs.
    pub fn pause(&mut self) -> Result<()> {
        self.monitor("stop", json!({})).map(drop)
    }

    /// Lets them run again.
    pub fn resume(&mut self) -> Result<()> {
        self.monitor("cont", json!({})).map(drop)
    }

    /// The host's frame behind every page of a file the guest holds mapped; 0 where the host has
    /// not looked yet.
    pub fn host_frames(&mut self, path: &str) -> Result<Vec<u64>> {
        let frames: Vec<u64> = self.request(Op::HeldFrames { path: path.into() })?;
        self.host_frames_at(&frames)
    }

    /// The host's frame behind each of these frames of the guest; 0 where there is none.
    pub fn host_frames_at(&mut self, frames: &[u64]) -> Result<Vec<u64>> {
        let low = self.address_of(LOW)? - LOW * 4096;
        // All that is there is in one piece as well.
        let high = match frames.iter().any(|frame| *frame >= HIGH) {
            true => self.address_of(HIGH)?,
            false => 0,
        };
        let pid = self.pid();
        let host = |frame: u64| {
            let address = match frame.checked_sub(HIGH) {
                Some(above) => high + above * 4096,
                None => low + frame * 4096,
            };
            let found = crate::frames::of_range(pid, address, 1)?;
            Ok(found.first().copied().unwrap_or_default())
        };
        frames.iter().copied().map(host).collect()
    }

    /// The host's frame behind each of `pages` frames of the guest from `first` on, all of which QEMU has read just
    /// now: memory that was shared is in its page tables only then.
    pub fn host_frames_of(&mut self, first: u64, pages: usize) -> Result<Vec<u64>> {
        let bytes = pages * 4096;
        let all = json!({ "val": first * 4096, "size": bytes, "filename": "/dev/null" });
        self.monitor("pmemsave", all)?;
        let address = self.address_of(LOW)? - LOW * 4096 + first * 4096;
        crate::frames::of_range(self.pid(), address, pages)
    }

    /// The guest's memory of so many MiB in pieces that are contiguous in QEMU: first frame, address, frames.
    pub fn memory(&mut self, mib: u32) -> Result<Vec<(u64, u64, u64)>> {
        let low = if mib < LOW_LIMIT_MIB { mib } else { LOW_MIB };
        let frames = |mib: u32| u64::from(mib) * 256;
        let address = self.address_of(LOW)? - LOW * 4096;
        let mut pieces = vec![(0, address, frames(low))];
        if low < mib {
            let address = self.address_of(HIGH)?;
            pieces.push((HIGH, address, frames(mib - low)));
        }
        Ok(pieces)
    }

    /// Where QEMU has a frame of the guest.
    fn address_of(&mut self, frame: u64) -> Result<u64> {
        let answer = self.human_monitor(&format!("gpa2hva {:#x}", frame * 4096))?;
        answer
            .rsplit_once("is 0x")
            .and_then(|(_, address)| u64::from_str_radix(address, 16).ok())
            .with_context(|| format!("{}: gpa2hva answered {answer}", self.name))
    }
}
