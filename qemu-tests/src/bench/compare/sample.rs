//! What everything costs and takes, many times a second.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::cgroup::Gauge;

/// How the engine's threads in a VMM are called.
const OURS: &str = "pf-";

/// What was used until a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sample {
    /// Seconds since the start of sampling.
    pub(super) at: f64,
    /// Bytes charged.
    pub(super) charge: u64,
    /// CPU time of KSM's thread, nanoseconds.
    pub(super) ksmd: u64,
    /// CPU time of the engine's threads in all VMMs, and of the daemon.
    pub(super) engine: u64,
    /// How long all of these were ready to run and had no CPU, because somebody else had it.
    pub(super) waited: u64,
}

impl Sample {
    /// What sharing costs the host.
    pub(super) fn sharing(&self) -> u64 {
        self.ksmd + self.engine
    }
}

/// Whom to look at.
#[derive(Clone, Debug)]
pub(super) struct Subjects {
    gauge: Gauge,
    ksmd: PathBuf,
    vmms: Vec<u32>,
    daemon: Option<u32>,
}

impl Subjects {
    pub(super) fn new(gauge: Gauge, vmms: Vec<u32>, daemon: Option<u32>) -> Result<Self> {
        Ok(Self {
            gauge,
            ksmd: ksmd()?,
            vmms,
            daemon,
        })
    }

    fn look(&self, start: Instant) -> Result<Sample> {
        let ksmd = Time::of(&self.ksmd)?;
        let mut sample = Sample {
            charge: self.gauge.now()?,
            ksmd: ksmd.ran,
            waited: ksmd.waited,
            ..Sample::default()
        };
        let mut add = |time: Time| {
            sample.engine += time.ran;
            sample.waited += time.waited;
        };
        for vmm in &self.vmms {
            let threads = threads(*vmm)?;
            let ours = threads
                .into_iter()
                .filter(|(name, _)| name.starts_with(OURS));
            ours.for_each(|(_, time)| add(time));
        }
        if let Some(daemon) = self.daemon {
            threads(daemon)?.into_iter().for_each(|(_, time)| add(time));
        }
        sample.at = start.elapsed().as_secs_f64();
        Ok(sample)
    }
}

/// A thread that looks.
#[derive(Debug)]
pub(super) struct Sampler {
    start: Instant,
    samples: Arc<Mutex<Vec<Sample>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Sampler {
    pub(super) fn start(subjects: Subjects, interval: Duration) -> Self {
        let start = Instant::now();
        let samples = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, told) = (Arc::clone(&samples), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                let sample = subjects.look(start)?;
                seen.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(sample);
                thread::sleep(interval);
            }
            Ok(())
        });
        Self {
            start,
            samples,
            stop,
            thread: Some(thread),
        }
    }

    /// Seconds since the start of sampling.
    pub(super) fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// What was seen up to now.
    pub(super) fn seen(&self) -> Vec<Sample> {
        self.samples
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Ends it and returns what was seen.
    pub(super) fn finish(mut self) -> Result<Vec<Sample>> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            match thread.join() {
                Ok(result) => result.context("look at what is used")?,
                Err(_) => bail!("the sampler panicked"),
            }
        }
        Ok(self.seen())
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// KSM's thread.
fn ksmd() -> Result<PathBuf> {
    for entry in fs::read_dir("/proc").context("list /proc")? {
        let path = entry?.path();
        if fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "ksmd") {
            return Ok(path);
        }
    }
    bail!("this kernel has no KSM")
}

/// Name and time of each thread of a process.
fn threads(pid: u32) -> Result<Vec<(String, Time)>> {
    let mut threads = Vec::new();
    let tasks = format!("/proc/{pid}/task");
    for entry in fs::read_dir(&tasks).with_context(|| format!("list {tasks}"))? {
        let path = entry?.path();
        // One that has just ended has nothing to say.
        let Ok(name) = fs::read_to_string(path.join("comm")) else {
            continue;
        };
        if let Ok(time) = Time::of(&path) {
            threads.push((name.trim().to_owned(), time));
        }
    }
    Ok(threads)
}

/// Nanoseconds of a task.
#[derive(Clone, Copy, Debug, Default)]
struct Time {
    /// On a CPU.
    ran: u64,
    /// Ready to run, and not on one.
    waited: u64,
}

impl Time {
    fn of(task: &Path) -> Result<Self> {
        let path = task.join("schedstat");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let mut numbers = text.split(' ').map(|word| word.trim().parse().ok());
        let mut next = || {
            let number = numbers.next().flatten();
            number.with_context(|| format!("{} holds {text:?}", path.display()))
        };
        Ok(Self {
            ran: next()?,
            waited: next()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_works_is_seen_by_its_name() {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let worker = thread::Builder::new()
            .name("pf-test".into())
            .spawn(move || while !told.load(Ordering::Relaxed) {})
            .unwrap();
        let time = || {
            let threads = threads(std::process::id()).unwrap();
            let found = threads.into_iter().find(|(name, _)| name == "pf-test");
            found.map_or(0, |(_, time)| time.ran)
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        while time() == 0 && Instant::now() < deadline {}
        let before = time();
        while time() == before && Instant::now() < deadline {}
        assert!(time() > before);
        stop.store(true, Ordering::Relaxed);
        worker.join().unwrap();
    }
}
