//! A guest's memory written from outside, past its own protections, through QEMU's stub for debuggers.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use super::Guest;

const LIMIT: Duration = Duration::from_secs(60);

impl Guest {
    /// Writes to memory at an address of the guest's kernel; `socket` is where the stub may listen.
    pub fn poke(&mut self, socket: &Path, address: u64, bytes: &[u8]) -> Result<()> {
        self.human_monitor(&format!(
            "gdbserver unix:{},server=on,wait=off",
            socket.display()
        ))?;
        let mut stub = Stub::connect(socket)?;
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        stub.ask(&format!("M{address:x},{:x}:{hex}", bytes.len()))
            .with_context(|| format!("{}: write at {address:#x}", self.name))?;
        // The CPUs, which a debugger's coming has stopped, go on.
        stub.ask("D")?;
        self.human_monitor("gdbserver none")?;
        Ok(())
    }
}

/// GDB's remote protocol, as far as it is needed.
struct Stub(UnixStream);

impl Stub {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("connect to QEMU's gdbserver")?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(Self(stream))
    }

    /// Sends a packet that is answered with OK.
    fn ask(&mut self, packet: &str) -> Result<()> {
        let sum = packet.bytes().fold(0_u8, u8::wrapping_add);
        write!(self.0, "${packet}#{sum:02x}")?;
        let answer = self.answer()?;
        // As the protocol wants it; QEMU would send it again.
        self.0.write_all(b"+")?;
        ensure!(answer == "OK", "QEMU answers {packet:?} with {answer:?}");
        Ok(())
    }

    fn answer(&mut self) -> Result<String> {
        while self.byte()? != b'$' {}
        let mut text = String::new();
        loop {
            match self.byte()? {
                b'#' => break,
                byte => text.push(char::from(byte)),
            }
        }
        for _ in 0..2 {
            self.byte()?;
        }
        Ok(text)
    }

    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.0
            .read_exact(&mut byte)
            .context("read from QEMU's gdbserver")?;
        Ok(byte[0])
    }
}
