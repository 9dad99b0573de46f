//! A memory cgroup for everything whose memory counts.

use std::{
    fs::{self, File, OpenOptions},
    num::NonZero,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

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

/// Every charged page of a process or a file is on one of these.
const LISTS: [&str; 3] = ["inactive_anon", "active_anon", "unevictable"];
/// The same of files on disks.
const DISK_LISTS: [&str; 2] = ["inactive_file", "active_file"];

/// What is charged to a cgroup, but for files on disks.
#[derive(Clone, Copy, Debug)]
struct Charge {
    /// All of it, and what CPUs keep in stock.
    sum: u64,
    /// Anonymous memory and files on tmpfs.
    pages: u64,
    kernel: u64,
}

impl Charge {
    fn parts(&self) -> u64 {
        self.pages + self.kernel
    }

    /// What is really taken. The parts know it to the page, unless some pages are on no list just now: on their way to
    /// one, or taken off by whoever moves them, megabytes where they are huge. Then the sum is nearer.
    fn bytes(&self) -> u64 {
        if self.sum.abs_diff(self.parts()) <= uncertainty() {
            self.parts()
        } else {
            self.sum
        }
    }
}

/// How far a reading may be off, in bytes: each CPU may keep a stock of `MEMCG_CHARGE_BATCH` pages, and `memory.stat`
/// is brought up to date when as many changes have come together.
pub fn uncertainty() -> u64 {
    let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
    cpus as u64 * 64 * 4096
}

/// Parts of what is charged, in bytes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Parts {
    /// Anonymous memory and files.
    pub pages: u64,
    /// Of these, anonymous memory.
    pub anonymous: u64,
    /// Of these, files on tmpfs, as the store is.
    pub shared: u64,
    /// Of these, files on disks; older results do not have it.
    #[serde(default)]
    pub disks: u64,
    /// The kernel's own.
    pub kernel: u64,
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

    /// The bytes charged, once that stands still, without files on disks: what the kernel keeps of
    /// those is nobody's memory, and goes whenever a host takes what was not used for a while.
    ///
    /// The kernel's own sum also has what each CPU keeps in stock for its next allocation, up to 64 pages, so the parts
    /// are added up. To have the stock given back takes a limit below the charge, for which the kernel may also drop
    /// megabytes of clean files. Pages are counted by the lists they are on, where a huge page that is mapped in part
    /// is whole; what is mapped or resident leaves out the rest of it, which takes memory all the same.
    pub fn charge(&self) -> Result<u64> {
        let deadline = Instant::now() + STILL_LIMIT;
        let mut before = self.look()?;
        loop {
            crate::interrupt::check()?;
            std::thread::sleep(STATISTICS);
            let now = self.look()?;
            if now.bytes().abs_diff(before.bytes()) <= STILL {
                return Ok(now.bytes());
            }
            ensure!(
                Instant::now() < deadline,
                "the charge does not stand still: {before:?}, then {now:?}"
            );
            before = now;
        }
    }

    /// What reads the charge without waiting, for as long as the cgroup is there.
    pub fn gauge(&self) -> Gauge {
        let file = match self.version {
            Version::V1 => "memory.usage_in_bytes",
            Version::V2 => "memory.current",
        };
        Gauge(self.path.join(file))
    }

    fn look(&self) -> Result<Charge> {
        let (sum, parts) = self.sums()?;
        Ok(Charge {
            sum: sum.saturating_sub(parts.disks),
            pages: parts.pages - parts.disks,
            kernel: parts.kernel,
        })
    }

    /// What the charge consists of, as of a moment up to two seconds ago.
    pub fn parts(&self) -> Result<Parts> {
        Ok(self.sums()?.1)
    }

    /// The kernel's own sum, and its parts.
    fn sums(&self) -> Result<(u64, Parts)> {
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
        let on = |lists: &[&str]| lists.iter().map(|list| part(list)).sum::<Result<u64>>();
        let disks = on(&DISK_LISTS)?;
        let mut parts = Parts {
            pages: on(&LISTS)? + disks,
            disks,
            shared: part("shmem")?,
            ..Parts::default()
        };
        let sum = match self.version {
            Version::V1 => {
                parts.anonymous = part("rss")?;
                parts.kernel = self.number("memory.kmem.usage_in_bytes")?;
                self.number("memory.usage_in_bytes")?
            }
            Version::V2 => {
                parts.anonymous = part("anon")?;
                parts.kernel = part("kernel")? + part("sock")?;
                self.number("memory.current")?
            }
        };
        Ok((sum, parts))
    }

    fn number(&self, name: &str) -> Result<u64> {
        let text =
            fs::read_to_string(self.path.join(name)).with_context(|| format!("read {name}"))?;
        text.trim()
            .parse()
            .with_context(|| format!("{name} holds {text:?}"))
    }
}

/// The kernel's sum of a cgroup's charge, which also has what each CPU keeps in stock: up to 64 pages.
#[derive(Clone, Debug)]
pub struct Gauge(PathBuf);

impl Gauge {
    /// The bytes charged now.
    pub fn now(&self) -> Result<u64> {
        let path = self.0.display();
        let text = fs::read_to_string(&self.0).with_context(|| format!("read {path}"))?;
        text.trim()
            .parse()
            .with_context(|| format!("{path} holds {text:?}"))
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
    use std::{
        io::{BufRead, Write},
        process::Command,
    };

    /// A Python program in a cgroup of its own, that says a line and waits for one between its steps.
    struct Program {
        process: Process,
        said: std::io::BufReader<std::process::ChildStdout>,
        cgroup: MemoryCgroup,
    }

    impl Program {
        /// `None` where that cannot be tried.
        fn start(script: &str) -> Option<Self> {
            let cgroup = MemoryCgroup::create()
                .inspect_err(|error| eprintln!("skipped: {error:#}"))
                .ok()?;
            let mut command = Command::new("python3");
            command
                .args(["-c", script])
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::piped());
            let process = Process::spawn(&mut command, Some(cgroup.procs().unwrap()), Vec::new());
            let Ok(mut process) = process else {
                eprintln!("skipped: no python3");
                return None;
            };
            let said = std::io::BufReader::new(process.child().stdout.take().unwrap());
            Some(Self {
                process,
                said,
                cgroup,
            })
        }

        fn hears(&mut self) -> String {
            let mut line = String::new();
            self.said.read_line(&mut line).unwrap();
            line.trim().to_owned()
        }

        fn goes_on(&mut self) {
            let input = self.process.child().stdin.as_mut().unwrap();
            input.write_all(b"\n").unwrap();
        }
    }

    #[test]
    fn memory_is_charged_and_given_back() {
        let script = "import sys; b = bytearray(b'x') * (64 << 20); print('up', flush=True); sys.stdin.readline()";
        let Some(mut program) = Program::start(script) else {
            return;
        };
        assert_eq!(program.hears(), "up");
        let high = program.cgroup.charge().unwrap();
        assert!(high > 64 << 20, "{high}");
        let frames = crate::frames::distinct(&[program.process.pid()]).unwrap();
        assert!(frames > (64 << 20) / 4096, "{frames}");
        program.goes_on();
        let ended = program.process.wait(Duration::from_secs(60)).unwrap();
        assert!(ended.is_some());
        assert!(program.cgroup.charge().unwrap() < high - (60 << 20));
    }

    /// To look must not change what is looked at: clean files are the first thing the kernel would drop.
    #[test]
    fn a_look_at_the_charge_leaves_files_in_memory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; 32 << 20]).unwrap();
        rustix::fs::fsync(file.as_file()).unwrap();
        let drop = rustix::fs::Advice::DontNeed;
        rustix::fs::fadvise(file.as_file(), 0, None, drop).unwrap();
        let script = format!(
            "import sys; open({:?}, 'rb').read(); print('up', flush=True); sys.stdin.readline()",
            file.path()
        );
        let Some(mut program) = Program::start(&script) else {
            return;
        };
        assert_eq!(program.hears(), "up");
        // The kernel adds up its statistics in the meantime.
        program.cgroup.charge().unwrap();
        let before = program.cgroup.parts().unwrap().disks;
        if before < 32 << 20 {
            eprintln!("skipped: this file system has no page cache that can be dropped");
            return;
        }
        let charge = program.cgroup.charge().unwrap();
        let after = program.cgroup.parts().unwrap().disks;
        assert!(
            before - after.min(before) <= 2 * uncertainty(),
            "{before}, then {after}"
        );
        assert!(charge < 32 << 20, "{charge} with the file");
    }

    /// Half of each huge page is unmapped, and nothing is freed before it is split.
    #[test]
    fn what_is_left_of_huge_pages_is_charged() {
        let script = "import mmap, sys
size, huge = 64 << 20, 2 << 20
m = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, size, 4096): m[at] = 1
def huge_kib():
    return sum(int(l.split()[1]) for l in open('/proc/self/smaps') if l.startswith('AnonHugePages'))
print(huge_kib(), flush=True)
sys.stdin.readline()
base = [int(l.split('-')[0], 16) for l in open('/proc/self/maps') if int(l.split()[0].split('-')[1], 16) - int(l.split('-')[0], 16) >= size][-1]
for at in range(-base % huge, size - huge, huge): m.madvise(mmap.MADV_DONTNEED, at, huge // 2)
print('half', flush=True)
sys.stdin.readline()
";
        let Some(mut program) = Program::start(script) else {
            return;
        };
        let huge: u64 = program.hears().parse().unwrap();
        if huge < 32 << 10 {
            eprintln!("skipped: {huge} KiB in huge pages");
            return;
        }
        let (before, frames) = (
            program.cgroup.charge().unwrap(),
            crate::frames::distinct(&[program.process.pid()]).unwrap(),
        );
        program.goes_on();
        assert_eq!(program.hears(), "half");
        let (after, mapped) = (
            program.cgroup.charge().unwrap(),
            crate::frames::distinct(&[program.process.pid()]).unwrap(),
        );
        assert!(
            mapped < frames - (16 << 20) / 4096,
            "{frames}, then {mapped}"
        );
        assert!(after > before - (4 << 20), "{before}, then {after}");
    }
}
