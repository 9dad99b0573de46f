//! How long guests' requests take while their memory is being shared, when it is, and while sharing is undone.
//!
//! The first guest asks its own nginx, the second its own PostgreSQL, at a pace that leaves half of their time. Sharing
//! begins and is undone several times meanwhile, so that there are enough requests in what takes seconds.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{
    conclusions::time_to,
    ksm::Ksm,
    systems::System,
    trial::{self, Course, Trial, pause},
};
use crate::{
    guest::Guest,
    protocol::{Op, RunOutcome},
    world::World,
};

const SCRIPT: &str = include_str!("requests.py");
/// Requests a second, for which these guests in emulation want about half of their CPU.
const WEB_RATE: &str = "25";
const DATABASE_RATE: &str = "50";
/// Where the guests write down how long each took.
const LOG: &str = "/tmp/requests";
/// Rows of the database, in 100,000: all of them fit into its cache.
const SCALE: &str = "1";
/// Nothing is looked at before: connections are made, code is translated.
const WARM: Duration = Duration::from_secs(10);
/// Without any sharing.
const BEFORE: Duration = Duration::from_secs(60);
/// How often sharing begins.
const ROUNDS: usize = 8;
/// From one beginning to the end of that: by far longer than it takes.
const ROUND: Duration = Duration::from_secs(12);
/// The last part of a round, in seconds, when no more comes.
const SETTLED: f64 = 4.0;
/// For what takes a guest long.
const LONG: Duration = Duration::from_secs(600);

/// What happens meanwhile.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Nothing.
    Before,
    /// Sharing, from its start until 99% are saved.
    Building,
    /// Everything is shared.
    Settled,
    /// All of it is undone.
    Undoing,
}

/// The requests of one kind while one thing happened.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Latency {
    /// While what.
    pub phase: Phase,
    /// How many.
    pub requests: u64,
    /// In how many seconds.
    pub seconds: f64,
    /// The 50th, 99th and 99.9th percentile, from when each was due, in microseconds by the guest's clock.
    pub microseconds: [f64; 3],
}

/// One run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Served {
    /// The version it was made with; runs of before this was noted have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pagefusion: Option<String>,
    /// What shared the guests' memory.
    pub system: System,
    /// To nginx.
    pub web: Vec<Latency>,
    /// To PostgreSQL.
    pub database: Vec<Latency>,
}

/// Runs it.
pub(super) fn run(trial: Trial, world: &mut World, ksm: &Ksm) -> Result<Served> {
    let mut played = Windows::default();
    start(world)?;
    pause(WARM)?;
    let before = uptimes(world)?;
    pause(BEFORE)?;
    let after = uptimes(world)?;
    played.add(Phase::Before, before, after);
    if trial.system.scope().is_some() {
        trial::wait_withdrawn(world)?;
    }
    for _ in 0..ROUNDS {
        round(trial, world, ksm, &mut played)?;
    }
    let [web, database] = end(world, &played)?;
    Ok(Served {
        pagefusion: None,
        system: trial.system,
        web,
        database,
    })
}

/// Sharing from its beginning to its undoing.
fn round(trial: Trial, world: &mut World, ksm: &Ksm, played: &mut Windows) -> Result<()> {
    let sampler = trial::sampler(trial, world)?;
    pause(trial::BEFORE)?;
    let from = uptimes(world)?;
    let start = sampler.now();
    trial::begin(trial, world, ksm)?;
    pause(ROUND)?;
    let to = uptimes(world)?;
    let length = sampler.now() - start;
    let course = Course::new(&sampler.finish()?, start, start + length);
    let built = time_to(&course.series, course.saved, 0.99).unwrap_or(length);
    let built = match trial.system {
        System::Nothing => length - SETTLED,
        _ => built.min(length - SETTLED),
    };
    played.add(Phase::Building, from, from.map(|from| from + built));
    played.add(Phase::Settled, to.map(|to| to - SETTLED), to);
    if trial.system == System::Nothing {
        return Ok(());
    }
    let from = uptimes(world)?;
    ksm.off()?;
    if trial.system.scope().is_some() {
        let mut guests = world.guests.iter_mut();
        guests.try_for_each(|guest| guest.set("run", "2"))?;
        trial::wait_withdrawn(world)?;
    }
    let to = uptimes(world)?;
    played.add(Phase::Undoing, from, to);
    Ok(())
}

/// What happened when, in seconds since the boot of each of both guests.
#[derive(Debug, Default)]
struct Windows([Vec<(Phase, f64, f64)>; 2]);

impl Windows {
    fn add(&mut self, phase: Phase, from: [f64; 2], to: [f64; 2]) {
        for (guest, windows) in self.0.iter_mut().enumerate() {
            windows.push((phase, from[guest], to[guest]));
        }
    }
}

fn uptimes(world: &mut World) -> Result<[f64; 2]> {
    let mut uptimes = [0.0; 2];
    for (guest, uptime) in world.guests.iter_mut().zip(&mut uptimes) {
        let text: String = guest.request(Op::Read {
            path: "/proc/uptime".into(),
        })?;
        let first = text.split(' ').next().unwrap_or_default();
        *uptime = first.parse().context("parse /proc/uptime")?;
    }
    Ok(uptimes)
}

fn start(world: &mut World) -> Result<()> {
    let web = r#"setsid python3 -c "$0" "$1" "$2" > "$2.log" 2>&1 < /dev/null &"#;
    let database = r#"bin=$(ls -d /usr/lib/postgresql/*/bin) && cd /tmp &&
        runuser -u postgres -- $bin/pgbench -i -q -s "$0" postgres > /dev/null 2>&1 &&
        { setsid runuser -u postgres -- $bin/pgbench -n -S -R "$1" -T 100000 --log --log-prefix="$2" postgres \
            > "$2.log" 2>&1 < /dev/null & echo $! > "$2.pid"; }"#;
    let [asks_web, asks_database] = &mut world.guests[..] else {
        bail!("there are two guests");
    };
    shell(asks_web, &[web, SCRIPT, WEB_RATE, LOG])?;
    shell(asks_database, &[database, SCALE, DATABASE_RATE, LOG]).map(drop)
}

/// Ends both, and says how long requests took.
fn end(world: &mut World, played: &Windows) -> Result<[Vec<Latency>; 2]> {
    // What pgbench has not written yet goes with it.
    pause(Duration::from_secs(5))?;
    let [asks_web, asks_database] = &mut world.guests[..] else {
        bail!("there are two guests");
    };
    shell(asks_web, &["touch \"$0.stop\"", LOG])?;
    let web = lines(asks_web, "cat \"$0\"")?;
    let clocks = "kill -INT $(cat \"$0.pid\") && cut -d ' ' -f 1 /proc/uptime && date +%s.%N";
    let clocks = shell(asks_database, &[clocks, LOG])?;
    let ahead = match clocks.lines().map(str::parse::<f64>).collect::<Vec<_>>()[..] {
        [Ok(uptime), Ok(epoch)] => epoch - uptime,
        _ => bail!("the guest's clocks show {clocks:?}"),
    };
    let mut database = lines(asks_database, "cat \"$0\".[0-9]*")?;
    // Half a line, as a rule.
    database.pop();
    let parsed = |lines: &[String], parse: &dyn Fn(&str) -> Option<Request>| {
        let all = lines.iter().map(|line| {
            parse(line).with_context(|| format!("not the line of a request: {line:?}"))
        });
        all.collect::<Result<Vec<_>>>()
    };
    Ok([
        summary(&parsed(&web, &web_request)?, &played.0[0])?,
        summary(
            &parsed(&database, &|line| database_request(line, ahead))?,
            &played.0[1],
        )?,
    ])
}

/// When a request was due, in seconds since the boot, and how long after that its answer had come.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Request {
    due: f64,
    microseconds: f64,
}

fn web_request(line: &str) -> Option<Request> {
    let (due, microseconds) = line.split_once(' ')?;
    Some(Request {
        due: due.parse().ok()?,
        microseconds: microseconds.parse().ok()?,
    })
}

/// pgbench says: client, transaction, microseconds since it was due, script, and when it ended, in seconds and
/// microseconds since 1970, which are so many seconds `ahead` of those since the boot.
fn database_request(line: &str, ahead: f64) -> Option<Request> {
    let mut words = line.split(' ').map(|word| word.parse::<f64>().ok());
    let microseconds = words.nth(2)??;
    let (seconds, rest) = (words.nth(1)??, words.next()??);
    Some(Request {
        due: seconds - ahead + (rest - microseconds) / 1e6,
        microseconds,
    })
}

fn summary(requests: &[Request], windows: &[(Phase, f64, f64)]) -> Result<Vec<Latency>> {
    let mut phases: Vec<_> = windows.iter().map(|(phase, ..)| *phase).collect();
    phases.sort_unstable();
    phases.dedup();
    let each = phases.into_iter().map(|phase| {
        let of_phase: Vec<_> = windows.iter().filter(|it| it.0 == phase).collect();
        let mut found: Vec<_> = requests
            .iter()
            .filter(|it| {
                of_phase
                    .iter()
                    .any(|(_, from, to)| (*from..*to).contains(&it.due))
            })
            .map(|it| it.microseconds)
            .collect();
        found.sort_by(f64::total_cmp);
        let last = found.len().checked_sub(1);
        let last = last.with_context(|| format!("no request was made: {phase:?}"))?;
        let percentile = |part: f64| found[((found.len() as f64 * part) as usize).min(last)];
        Ok(Latency {
            phase,
            requests: found.len() as u64,
            seconds: of_phase.iter().map(|(_, from, to)| to - from).sum(),
            microseconds: [0.5, 0.99, 0.999].map(percentile),
        })
    });
    each.collect()
}

/// What a script prints, of any length.
fn lines(guest: &mut Guest, script: &str) -> Result<Vec<String>> {
    let op = Op::Run {
        argv: ["sh", "-c", script, LOG].map(str::to_owned).to_vec(),
        timeout_ms: LONG.as_millis() as u64,
        stream: true,
    };
    let mut lines = Vec::new();
    guest.request_for::<RunOutcome>(op, 2 * LONG, |line| lines.push(line.to_owned()))?;
    Ok(lines)
}

fn shell(guest: &mut Guest, arguments: &[&str]) -> Result<String> {
    let mut argv = vec!["sh", "-c"];
    argv.extend(arguments);
    let outcome = guest.run_for(&argv, LONG)?;
    ensure!(
        outcome.status == Some(0),
        "{}: {arguments:?} ended with {:?}: {}",
        guest.name(),
        outcome.status,
        outcome.stderr.trim()
    );
    Ok(outcome.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_from_when_it_was_due() {
        let request = |due, microseconds| Some(Request { due, microseconds });
        assert_eq!(web_request("12.5 1500.0"), request(12.5, 1500.0));
        // Client, transaction, time, script, end, and how late it was sent.
        let line = "0 7 250000 0 1000 500000 120";
        assert_eq!(database_request(line, 900.0), request(100.25, 250_000.0));
        assert_eq!(web_request("12.5"), None);
        assert_eq!(database_request("0 7 skipped 0 1000 500000", 900.0), None);
    }

    #[test]
    fn requests_are_those_that_were_due_while_it_happened() {
        let requests: Vec<_> = (0..2000)
            .map(|number| Request {
                due: f64::from(number) / 100.0,
                microseconds: f64::from(number),
            })
            .collect();
        let windows = [
            (Phase::Building, 1.0, 2.0),
            (Phase::Before, 0.0, 1.0),
            (Phase::Building, 10.0, 19.0),
        ];
        let [before, building] = &summary(&requests, &windows).unwrap()[..] else {
            panic!("two phases");
        };
        assert_eq!((before.phase, before.requests), (Phase::Before, 100));
        assert_eq!(before.microseconds, [50.0, 99.0, 99.0]);
        assert_eq!((building.requests, building.seconds), (1000, 10.0));
        assert_eq!(building.microseconds, [1400.0, 1890.0, 1899.0]);
        assert!(summary(&requests, &[(Phase::Before, 50.0, 51.0)]).is_err());
    }
}
