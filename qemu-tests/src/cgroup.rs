//! A memory cgroup for everything whose memory counts.

use std::{
    fs::{self, File, OpenOptions},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// A memory cgroup of our own, removed when it is dropped.
#[derive(Debug)]
pub struct MemoryCgroup {
    path: PathBuf,
    version: Version,
}

impl MemoryCgroup {
    /// Makes one. Those of harnesses that were killed are removed on the way.
    pub fn create() -> Result<Self> {
        let (root, version) = Self::root()?;
        remove_stale(root)?;
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = root.join(format!("pagefusion-{}-{count}", std::process::id()));
        fs::create_dir(&path)
            .with_context(|| format!("create the memory cgroup {}", path.display()))?;
        Ok(Self { path, version })
    }

    fn root() -> Result<(&'static Path, Version)> {
        if Path::new(V1).join("memory.usage_in_bytes").exists() {
            return Ok((Path::new(V1), Version::V1));
        }
        let root = Path::new(V2);
        let Ok(controllers) = fs::read_to_string(root.join("cgroup.controllers")) else {
            bail!("no cgroup file system is mounted on {V2}");
        };
        if !controllers.split_whitespace().any(|name| name == "memory") {
            bail!("the kernel has no memory cgroups");
        }
        fs::write(root.join("cgroup.subtree_control"), "+memory")
            .context("switch on memory cgroups")?;
        Ok((root, Version::V2))
    }

    /// Opened for a process to enter by writing `0`.
    pub fn procs(&self) -> Result<File> {
        let path = self.path.join("cgroup.procs");
        OpenOptions::new()
            .write(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))
    }

    /// The bytes charged now.
    ///
    /// Each CPU keeps up to 64 charged pages in stock for its next allocation. A limit just below the charge makes the
    /// kernel give the stock back; only if there was none, it reclaims a few clean pages. The limit is lifted at once.
    pub fn charge(&self) -> Result<u64> {
        let (usage, limit, none) = match self.version {
            Version::V1 => ("memory.usage_in_bytes", "memory.limit_in_bytes", "-1"),
            Version::V2 => ("memory.current", "memory.high", "max"),
        };
        let before = self.number(usage)?;
        let write = |value: &str| fs::write(self.path.join(limit), value);
        let drained = write(&before.saturating_sub(4096).to_string());
        write(none).with_context(|| format!("lift {limit}"))?;
        match drained {
            Ok(()) => {}
            // Nothing could be given back: the charge is exact already.
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {}
            Err(error) => return Err(error).with_context(|| format!("set {limit}")),
        }
        self.number(usage)
    }

    fn number(&self, name: &str) -> Result<u64> {
        let text =
            fs::read_to_string(self.path.join(name)).with_context(|| format!("read {name}"))?;
        text.trim()
            .parse()
            .with_context(|| format!("{name} holds {text:?}"))
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            eprintln!("remove {}: {error}", self.path.display());
        }
    }
}

/// Removes the cgroups of processes that are no more.
fn remove_stale(root: &Path) -> Result<()> {
    for entry in fs::read_dir(root).context("list cgroups")? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(owner) = name.to_str().and_then(crate::workdir::owner) else {
            continue;
        };
        if !crate::workdir::alive(owner) {
            // A leftover that cannot be removed yet is left to the next run.
            let _ = fs::remove_dir(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Process;
    use std::{io::BufRead, process::Command, time::Duration};

    /// A process in the cgroup is charged for what it touches.
    #[test]
    fn memory_is_charged_and_given_back() {
        let cgroup = match MemoryCgroup::create() {
            Ok(cgroup) => cgroup,
            Err(error) => {
                eprintln!("skipped: {error:#}");
                return;
            }
        };
        let script = "import sys; b = bytearray(b'x') * (64 << 20); print('up', flush=True); sys.stdin.read()";
        let mut command = Command::new("python3");
        command
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped());
        let Ok(mut process) =
            Process::spawn(&mut command, Some(cgroup.procs().unwrap()), Vec::new())
        else {
            eprintln!("skipped: no python3");
            return;
        };
        let mut line = String::new();
        std::io::BufReader::new(process.child().stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let high = cgroup.charge().unwrap();
        assert!(high > 64 << 20, "{high}");
        let frames = crate::frames::distinct(&[process.pid()]).unwrap();
        assert!(frames > (64 << 20) / 4096, "{frames}");
        drop(process.child().stdin.take());
        assert!(process.wait(Duration::from_secs(10)).unwrap().is_some());
        assert!(cgroup.charge().unwrap() < high - (60 << 20));
    }
}
