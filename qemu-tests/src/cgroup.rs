//! A memory cgroup for everything whose memory counts.

use std::{
    fs::{self, File, OpenOptions},
    num::NonZero,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// The kernel adds up each CPU's statistics every two seconds.
const STATISTICS: Duration = Duration::from_millis(2500);
/// What may still change when the charge stands still: who looks takes memory, too.
const STILL: u64 = 64 << 10;
/// The longest wait for that.
const STILL_LIMIT: Duration = Duration::from_secs(60);

/// What is charged to a cgroup.
#[derive(Clone, Copy, Debug)]
struct Charge {
    /// All of it, and what CPUs keep in stock.
    sum: u64,
    anonymous: u64,
    files: u64,
    kernel: u64,
}

impl Charge {
    fn parts(&self) -> u64 {
        self.anonymous + self.files + self.kernel
    }

    /// Fails when the parts are not the whole.
    fn check(&self) -> Result<()> {
        let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
        let stock = cpus as u64 * 64 * 4096;
        let rest = self.sum.abs_diff(self.parts());
        ensure!(
            rest <= stock + (1 << 20),
            "the charge has parts that are not known: {self:?}"
        );
        Ok(())
    }
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

    /// The bytes charged, once that stands still: what processes, files and the kernel have taken.
    ///
    /// The kernel's own sum also has what each CPU keeps in stock for its next allocation, up to 64 pages, so the parts
    /// are added up. To have the stock given back takes a limit below the charge, for which the kernel may also drop
    /// megabytes of clean files.
    pub fn charge(&self) -> Result<u64> {
        let deadline = Instant::now() + STILL_LIMIT;
        let mut before = self.look()?;
        loop {
            crate::interrupt::check()?;
            std::thread::sleep(STATISTICS);
            let now = self.look()?;
            if now.parts().abs_diff(before.parts()) <= STILL {
                now.check()?;
                return Ok(now.parts());
            }
            ensure!(
                Instant::now() < deadline,
                "the charge does not stand still: {before:?}, then {now:?}"
            );
            before = now;
        }
    }

    fn look(&self) -> Result<Charge> {
        let text = fs::read_to_string(self.path.join("memory.stat")).context("read memory.stat")?;
        let part = |name: &str| -> Result<u64> {
            let mut lines = text.lines().filter_map(|line| line.split_once(' '));
            let value = lines
                .find(|(part, _)| *part == name)
                .map(|(_, value)| value);
            let value = value.with_context(|| format!("memory.stat has no {name}"))?;
            value
                .parse()
                .with_context(|| format!("{name} is {value:?}"))
        };
        Ok(match self.version {
            Version::V1 => Charge {
                sum: self.number("memory.usage_in_bytes")?,
                anonymous: part("rss")?,
                files: part("cache")?,
                kernel: self.number("memory.kmem.usage_in_bytes")?,
            },
            Version::V2 => Charge {
                sum: self.number("memory.current")?,
                anonymous: part("anon")?,
                files: part("file")?,
                kernel: part("kernel")? + part("sock")?,
            },
        })
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
    use std::{io::BufRead, process::Command};

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
