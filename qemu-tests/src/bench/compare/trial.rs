//! One run: one system under one workload, with guests of its own.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{
    conclusions::time_to,
    ksm::Ksm,
    leave, oracle,
    results::{Rest, Run},
    sample::{Sample, Sampler, Subjects},
    systems::System,
    workloads::{Disks, Workload},
};
use crate::{
    artifacts::Artifacts,
    guest::{Accelerator, Guest},
    interrupt,
    protocol::Op,
    world::{Host, World},
};

/// What the charge is at the start is looked at for so long.
pub(super) const BEFORE: Duration = Duration::from_secs(1);
/// How often it is asked whether more comes.
pub(super) const INTERVAL: Duration = Duration::from_millis(200);
/// No more comes when this much of what was saved has not come for a while.
const TOLERANCE: f64 = 0.003;
/// That while, in seconds.
const QUIET: f64 = 6.0;
/// KSM looks for the like of a page that has not changed between two rounds: most is merged in the third one.
const ROUNDS: u64 = 3;
/// What is not done by then is given up.
const LIMIT: f64 = 1200.0;
/// How long nothing at all is looked at.
const NOTHING: f64 = 20.0;
/// How many points of the course of a run are kept.
const POINTS: usize = 240;
/// `struct ksm_rmap_item` of the kernel, one for each page that KSM looks at.
const RMAP_ITEM: u64 = 64;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trial {
    pub(super) workload: Workload,
    pub(super) system: System,
    /// Guests count their instructions.
    pub(super) counted: bool,
    /// How long to look at it when no more comes.
    pub(super) rest: Duration,
}

/// Runs it.
pub(super) fn run(
    trial: Trial,
    host: Host,
    artifacts: &Artifacts,
    ksm: &Ksm,
    disks: &Disks,
    logs: Option<&Path>,
) -> Result<Run> {
    let (mut world, run_lengths) = prepare(trial, host, artifacts, ksm, disks, logs)?;
    let mut run = measure(trial, &mut world, ksm)?;
    run.run_lengths = run_lengths;
    if trial.workload == Workload::Apart {
        run.packages = disks.packages();
    }
    run.folios = trial.workload.folios(&mut world)?;
    if !trial.counted && !trial.system.slow() {
        run.left = leave::one_by_one(trial, &mut world, ksm)?;
    }
    ksm.off()?;
    world.close()?;
    Ok(run)
}

/// Does `play` with two Debian guests, in which nothing is shared at first.
pub(super) fn with_two_guests<T>(
    system: System,
    host: Host,
    artifacts: &Artifacts,
    ksm: &Ksm,
    disks: &Disks,
    logs: Option<&Path>,
    play: impl FnOnce(Trial, &mut World, &Ksm) -> Result<T>,
) -> Result<T> {
    let trial = Trial {
        workload: Workload::Boot { guests: 2 },
        system,
        counted: false,
        rest: Duration::ZERO,
    };
    let (mut world, _) = prepare(trial, host, artifacts, ksm, disks, logs)?;
    let played = play(trial, &mut world, ksm)?;
    world.healthy()?;
    ksm.off()?;
    world.close()?;
    Ok(played)
}

/// Guests that have in memory what is to be shared, and nothing is; and how it lies there, which is [`Run::run_lengths`].
fn prepare(
    trial: Trial,
    host: Host,
    artifacts: &Artifacts,
    ksm: &Ksm,
    disks: &Disks,
    logs: Option<&Path>,
) -> Result<(World, Vec<Vec<u64>>)> {
    let host = match trial.counted {
        true => Host {
            accelerator: Accelerator::Counted,
            ..host
        },
        false => host,
    };
    let mut world = World::new(artifacts, host, logs)?;
    if trial.system.scope().is_none() {
        world.plain = true;
        if let Some(daemon) = world.daemon.take() {
            daemon.stop()?;
        }
    }
    ksm.off()?;
    trial.workload.boot(&mut world, disks)?;
    let mut run_lengths = Vec::new();
    if !matches!(trial.workload, Workload::Files { .. }) {
        run_lengths.push(mapped_runs(&mut world)?);
    }
    if trial.workload == Workload::Aged {
        trial.workload.age(&mut world)?;
        run_lengths.push(mapped_runs(&mut world)?);
    }
    if let Some(pace) = trial.system.pace() {
        ksm.prepare(pace)?;
    }
    if let Some(scope) = trial.system.scope() {
        // Loaded, and as if it had just been: nothing is shared, and nothing reported.
        for guest in &mut world.guests {
            guest.load_module()?;
            guest.set("scope", scope.name())?;
            guest.set("run", "2")?;
        }
    }
    trial.workload.load(&mut world)?;
    if trial.counted {
        // While a guest waits for its host, its clock must not jump to the end of every time limit.
        for guest in &mut world.guests {
            guest.request::<()>(Op::Spin { on: true })?;
        }
    }
    Ok((world, run_lengths))
}

fn mapped_runs(world: &mut World) -> Result<Vec<u64>> {
    world.guests[0].request_for(Op::MappedRuns, world.limits.settle, |_| {})
}

fn measure(trial: Trial, world: &mut World, ksm: &Ksm) -> Result<Run> {
    let ours = trial.system.scope().is_some();
    if ours {
        wait_withdrawn(world)?;
    }
    let guest_before = guest_time(world, ours)?;
    let scans_before = ksm.progress()?.full_scans;
    let heap_before = heap(trial, world)?;
    let before = world.cgroup.parts()?;
    let sampler = sampler(trial, world)?;
    pause(BEFORE)?;

    let start = sampler.now();
    begin(trial, world, ksm)?;
    let settled = settle(trial, &sampler, start, || {
        Ok(ksm.progress()?.full_scans - scans_before)
    })?;
    let end = sampler.now();
    let full_scans = ksm.progress()?.full_scans - scans_before;
    let after = world.cgroup.parts()?;
    let guest_settled = guest_time(world, ours)?;
    let rest_from = sampler.now();
    pause(trial.rest)?;
    let rest_to = sampler.now();
    let samples = sampler.finish()?;
    let guest_after = guest_time(world, ours)?;

    let course = Course::new(&samples, start, end);
    let seconds_to = [0.5, 0.9, 0.99].map(|part| time_to(&course.series, course.saved, part));
    let to_99 = seconds_to[2].unwrap_or(end - start);
    let cpu = |from, to| (at(&samples, to).sharing() - at(&samples, from).sharing()) as f64 / 1e9;
    let mut run = Run {
        pagefusion: None,
        workload: trial.workload,
        packages: Vec::new(),
        system: trial.system,
        counted: trial.counted,
        seconds_to: match seconds_to {
            [Some(a), Some(b), Some(c)] => Some([a, b, c]),
            _ => None,
        },
        settled,
        seconds: end - start,
        full_scans,
        saved: course.saved,
        saved_by_undo: 0,
        host_seconds_to_99: cpu(start, start + to_99),
        host_seconds: cpu(start, end),
        waited_seconds: (at(&samples, start + to_99).waited - at(&samples, start).waited) as f64
            / 1e9,
        charged: [before, after],
        guest_seconds: guest_settled - guest_before,
        rest: Rest {
            seconds: rest_to - rest_from,
            host_seconds: cpu(rest_from, rest_to),
            guest_seconds: guest_after - guest_settled,
        },
        pages_reported: 0,
        metadata: 0,
        ksm_metadata: 0,
        heap: [heap_before, 0],
        folios: None,
        run_lengths: Vec::new(),
        left: Vec::new(),
        oracle: None,
        series: course.points(),
    };
    if !trial.counted {
        finish(trial, world, ksm, &mut run)?;
    }
    world.healthy()?;
    Ok(run)
}

/// Has sharing begin.
pub(super) fn begin(trial: Trial, world: &mut World, ksm: &Ksm) -> Result<()> {
    if trial.system.pace().is_some() {
        ksm.start()?;
    }
    if trial.system.scope().is_some() {
        for guest in &mut world.guests {
            guest.set("run", "1")?;
        }
    }
    Ok(())
}

/// What can be seen only when all stand still.
fn finish(trial: Trial, world: &mut World, ksm: &Ksm, run: &mut Run) -> Result<()> {
    run.heap[1] = heap(trial, world)?;
    let census = oracle::census(&mut world.guests)?;
    world.guests.iter_mut().try_for_each(Guest::pause)?;
    ksm.stop()?;
    run.oracle = Some(oracle::look(
        &mut world.guests,
        trial.workload.memory_mib(),
        &census,
    )?);
    if trial.system.scope().is_some() {
        let status = world.status()?;
        run.pages_reported = status.vms.iter().map(|vm| vm.pages_reported).sum();
        run.metadata = status.bytes_metadata;
    }
    if trial.system.pace().is_some() {
        let mut bytes = 0;
        for guest in &world.guests {
            bytes += rmap_items(guest.pid())? * RMAP_ITEM;
        }
        match trial.system.scope() {
            Some(_) => run.ksm_metadata = bytes,
            None => run.metadata = bytes,
        }
    }
    let shared = world.cgroup.charge()?;
    ksm.off()?;
    if trial.system.scope().is_some() {
        world.site.ctl(&["undo", "--all"])?;
        let left = world.status()?.pages_shared;
        ensure!(left == 0, "{left} pages are shared after the undo");
    }
    run.saved_by_undo = world.cgroup.charge()? as i64 - shared as i64;
    world.guests.iter_mut().try_for_each(Guest::resume)
}

pub(super) fn sampler(trial: Trial, world: &World) -> Result<Sampler> {
    let vmms = world.guests.iter().map(Guest::pid).collect();
    let daemon = world.daemon.as_ref().map(crate::daemon::Daemon::pid);
    let subjects = Subjects::new(world.cgroup.gauge(), vmms, daemon)?;
    let interval = if trial.system.slow() { 250 } else { 20 };
    Ok(Sampler::start(subjects, Duration::from_millis(interval)))
}

/// Waits until no more comes. False when that was given up.
pub(super) fn settle(
    trial: Trial,
    sampler: &Sampler,
    start: f64,
    mut rounds: impl FnMut() -> Result<u64>,
) -> Result<bool> {
    loop {
        pause(INTERVAL)?;
        let now = sampler.now();
        if trial.system == System::Nothing {
            if now - start > NOTHING {
                return Ok(true);
            }
            continue;
        }
        let since = now - start;
        let (enough, quiet) = match trial.system.pace() {
            Some(_) => {
                let rounds = rounds()?;
                // Half a round, as it passes by much that nothing is like.
                (
                    rounds >= ROUNDS,
                    QUIET.max(since / rounds.max(1) as f64 / 2.0),
                )
            }
            None => (true, QUIET),
        };
        let course = Course::new(&sampler.seen(), start, now);
        if enough && course.quiet(since, quiet) {
            return Ok(true);
        }
        if now - start > LIMIT {
            return Ok(false);
        }
    }
}

/// How much was saved when.
#[derive(Debug)]
pub(super) struct Course {
    pub(super) series: Vec<(f64, i64)>,
    pub(super) saved: i64,
}

impl Course {
    /// From `start` to `end`; what the charge is compared with was there before.
    pub(super) fn new(samples: &[Sample], start: f64, end: f64) -> Self {
        let mut before: Vec<_> = samples
            .iter()
            .filter(|sample| sample.at <= start)
            .map(|sample| sample.charge as i64)
            .collect();
        let base = median(&mut before);
        let series: Vec<_> = samples
            .iter()
            .filter(|sample| sample.at > start && sample.at <= end)
            .map(|sample| (sample.at - start, base - sample.charge as i64))
            .collect();
        let last = end - start - QUIET / 2.0;
        let mut late: Vec<_> = series
            .iter()
            .filter(|(at, _)| *at >= last)
            .map(|(_, saved)| *saved)
            .collect();
        Self {
            saved: median(&mut late),
            series,
        }
    }

    /// Whether hardly anything has come for so many seconds, and something before.
    fn quiet(&self, now: f64, seconds: f64) -> bool {
        let then = self.series.iter().rfind(|(at, _)| *at <= now - seconds);
        let Some((_, then)) = then else { return false };
        let change = (self.saved - then).abs() as f64;
        self.saved > 0 && change <= self.saved as f64 * TOLERANCE
    }

    /// As many of them as a picture needs; those where most happens.
    fn points(&self) -> Vec<(f64, i64)> {
        let step = (self.saved / POINTS as i64).max(1);
        let apart = self.series.last().map_or(0.0, |(at, _)| at / POINTS as f64);
        let mut points: Vec<(f64, i64)> = Vec::new();
        for (at, saved) in &self.series {
            let far = points.last().is_none_or(|(last_at, last)| {
                (saved - last).abs() >= step || at - last_at >= apart
            });
            if far {
                points.push(((at * 1000.0).round() / 1000.0, *saved));
            }
        }
        points
    }
}

fn median(values: &mut [i64]) -> i64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// The sample at a moment.
pub(super) fn at(samples: &[Sample], moment: f64) -> Sample {
    let found = samples.iter().find(|sample| sample.at >= moment);
    found.or(samples.last()).copied().unwrap_or_default()
}

/// CPU seconds of the module's threads in all guests.
fn guest_time(world: &mut World, ours: bool) -> Result<f64> {
    let mut usecs = 0;
    if ours {
        for guest in &mut world.guests {
            usecs += guest.counter("cpu_usecs")?;
        }
    }
    Ok(usecs as f64 / 1e6)
}

/// Waits until everything that was shared when the module was loaded has been withdrawn.
pub(super) fn wait_withdrawn(world: &mut World) -> Result<()> {
    let deadline = Instant::now() + world.limits.settle;
    loop {
        let shared = world.status()?.pages_shared;
        let mut tracked = 0;
        for guest in &mut world.guests {
            tracked += guest.counter("pages_tracked")?;
        }
        if shared == 0 && tracked == 0 {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{shared} pages are shared though everything was withdrawn, {tracked} reported"
        );
        pause(INTERVAL)?;
    }
}

/// Anonymous memory of all processes that is not the guests' and holds no code: QEMU's translations are not ours.
fn heap(trial: Trial, world: &mut World) -> Result<u64> {
    let mib = trial.workload.memory_mib();
    let mut bytes = 0;
    for guest in &mut world.guests {
        let memory = guest.memory(mib)?;
        let guests = |address: u64| {
            let inside = |(_, start, frames): &(u64, u64, u64)| {
                (*start..start + frames * 4096).contains(&address)
            };
            memory.iter().any(inside)
        };
        bytes += anonymous(guest.pid(), guests)?;
    }
    if let Some(daemon) = &world.daemon {
        bytes += anonymous(daemon.pid(), |_| false)?;
    }
    Ok(bytes)
}

/// Anonymous memory of a process that holds no code, but for mappings that begin at an address left out.
fn anonymous(pid: u32, left_out: impl Fn(u64) -> bool) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    anonymous_in(&text, left_out).with_context(|| format!("parse {path}"))
}

fn anonymous_in(smaps: &str, left_out: impl Fn(u64) -> bool) -> Result<u64> {
    let mut counts = false;
    let mut kib = 0;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(first), Some(second)) = (words.next(), words.next()) else {
            continue;
        };
        let address = first
            .split_once('-')
            .and_then(|(start, _)| u64::from_str_radix(start, 16).ok());
        if let Some(address) = address {
            counts = !second.contains('x') && !left_out(address);
        } else if counts && first == "Anonymous:" {
            kib += second.parse::<u64>().context("parse Anonymous")?;
        }
    }
    Ok(kib * 1024)
}

/// How many pages of a process KSM keeps account of.
fn rmap_items(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/ksm_stat");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("ksm_rmap_items "));
    line.and_then(|text| text.trim().parse().ok())
        .with_context(|| format!("{path} has no ksm_rmap_items"))
}

pub(super) fn pause(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    loop {
        interrupt::check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(INTERVAL));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: f64, charge: u64) -> Sample {
        Sample {
            at,
            charge,
            ..Sample::default()
        }
    }

    #[test]
    fn what_is_saved_is_by_what_was_charged_before() {
        let before = [900, 1000, 1010].map(|charge| sample(1.0, charge));
        let mut samples = before.to_vec();
        samples.extend([sample(2.5, 800), sample(3.0, 400), sample(4.0, 500)]);
        samples.push(sample(9.0, 0));
        let course = Course::new(&samples, 2.0, 5.0);
        assert_eq!(course.series, [(0.5, 200), (1.0, 600), (2.0, 500)]);
        assert_eq!(course.saved, 500, "the median of the last seconds");
    }

    #[test]
    fn it_is_quiet_when_hardly_anything_has_come_for_a_while() {
        let course = |late: u64| {
            let mut samples = vec![sample(0.0, 100_000)];
            samples.extend((1..=20).map(|second| sample(f64::from(second), 50_000)));
            samples.extend((21..=30).map(|second| sample(f64::from(second), late)));
            Course::new(&samples, 0.0, 30.0)
        };
        assert!(course(50_000).quiet(30.0, QUIET));
        assert!(course(49_900).quiet(30.0, QUIET));
        let mut moving = course(40_000);
        moving.series.retain(|(at, _)| *at <= 22.0);
        assert!(!moving.quiet(22.0, QUIET), "a fifth more has just come");
        assert!(!course(40_000).quiet(30.0, 15.0), "not for so long");
        assert!(!course(100_000).quiet(30.0, QUIET), "nothing is saved");
    }

    #[test]
    fn few_points_show_a_whole_course() {
        let samples: Vec<_> = (0..20_000)
            .map(|index| sample(f64::from(index) / 100.0, 1 << 30))
            .chain((0..1000).map(|index| sample(200.0 + f64::from(index) / 1000.0, 0)))
            .collect();
        let points = Course::new(&samples, 0.0, 201.0).points();
        assert!(points.len() < 3 * POINTS, "{}", points.len());
        assert_eq!(points.last().map(|(_, saved)| *saved), Some(1 << 30));
    }

    #[test]
    fn memory_on_the_heap_counts_and_that_of_guests_and_code_does_not() {
        let smaps = "\
1000-5000 rw-p 00000000 00:00 0      [heap]
Rss:                  16 kB
Anonymous:            12 kB
VmFlags: rd wr mr mw me ac
5000-9000 rwxp 00000000 00:00 0
Anonymous:            16 kB
9000-a000 rw-p 00000000 00:00 0
Anonymous:             4 kB
b000-c000 r--p 00000000 fe:00 7      /usr/lib/a
Anonymous:             8 kB
";
        assert_eq!(anonymous_in(smaps, |_| false).unwrap(), 24 << 10);
        let guests = |address| address == 0x9000;
        assert_eq!(anonymous_in(smaps, guests).unwrap(), 20 << 10);
        assert!(anonymous_in("1000-5000 rw-p 0 0 0\nAnonymous: much\n", guests).is_err());
    }
}
