//! The memory that a guest shares with the engine in its QEMU.

use std::{fs::File, os::unix::fs::FileExt, path::PathBuf};

use anyhow::{Context, Result, bail};

use super::Guest;

/// Where the header says that host and guest write; `docs/abi.md` has their words.
const AREAS: [(&str, u64, usize); 2] = [("host", 0x20, 8), ("guest", 0x28, 9)];

impl Guest {
    /// The memory that a guest's engine looks at, which QEMU has from the daemon.
    pub fn device_memory(&self) -> Result<PathBuf> {
        let directory = format!("/proc/{}/fd", self.pid());
        for entry in std::fs::read_dir(&directory).context(directory)? {
            let path = entry?.path();
            let target = std::fs::read_link(&path).unwrap_or_default();
            if target.to_string_lossy().contains("memfd:pagefusion-device") {
                return Ok(path);
            }
        }
        bail!("QEMU has no memory of our device")
    }

    /// What host and guest have written there for each other, but for slots.
    pub fn device_words(&self) -> Result<String> {
        let memory = File::open(self.device_memory()?).context("open the device's memory")?;
        let word = |at: u64| -> Result<u64> {
            let mut bytes = [0; 8];
            memory.read_exact_at(&mut bytes, at)?;
            Ok(u64::from_le_bytes(bytes))
        };
        let mut line = String::new();
        for (name, at, words) in AREAS {
            let area = word(at)?;
            line.push_str(name);
            for index in 0..words as u64 {
                line.push_str(&format!(" {:#x}", word(area + index * 8)?));
            }
            line.push_str("; ");
        }
        Ok(line)
    }
}
