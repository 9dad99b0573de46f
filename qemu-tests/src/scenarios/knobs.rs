//! What an operator can set and see in a guest.

use std::{
    collections::BTreeSet,
    fs,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{
    Stage,
    shared_files::{SharedFiles, with_disk},
    steps::{each, hold, none_same, release, renice, unit, write},
};
use crate::{
    guest::{Guest, SYSFS},
    protocol::Op,
    services,
    settle::settle,
    world::{Small, World},
};

const MANUAL: &str = include_str!("../../../docs/sysfs.md");
const ABI: &str = include_str!("../../../docs/ABI/sysfs-kernel-pagefusion");
/// What the manual says of knobs that take no number.
const SCOPES: &[&str] = &["exec", "readonly", "cached", "clean"];

/// One line of a table in the manual.
struct Entry {
    name: &'static str,
    /// Range and default of a knob, `None` of a statistic.
    knob: Option<(&'static str, &'static str)>,
}

fn manual() -> Vec<Entry> {
    let cells = |line: &'static str| -> Vec<&'static str> {
        let inner = line.trim_matches('|');
        inner.split(" | ").map(str::trim).collect()
    };
    let rows = MANUAL.lines().filter(|line| line.starts_with("| `"));
    rows.map(cells)
        .map(|row| Entry {
            name: row[0].trim_matches('`'),
            knob: (row.len() == 4).then(|| (row[1], row[2].trim_matches('`'))),
        })
        .collect()
}

pub(super) fn as_in_the_manual(stage: &mut Stage) -> Result<()> {
    module_says_who_it_is(stage)?;
    let launcher = Command::new(&stage.world.artifacts.qemu);
    let mut guest = stage.world.start_small(launcher, &[])?;
    let before: Vec<String> = guest.request(Op::KernelLog)?;
    guest.load_module()?;
    let after: Vec<String> = guest.request(Op::KernelLog)?;
    // What the kernel says of every module that is not its own; nothing else. Of what is none of the module's it
    // says something at any time.
    let usual = ["loading out-of-tree module", "module verification failed"];
    let said = after.iter().skip(before.len());
    let unusual: Vec<_> = said
        .filter(|line| line.contains("pagefusion"))
        .filter(|line| !usual.iter().any(|usual| line.contains(usual)))
        .collect();
    ensure!(
        unusual.is_empty(),
        "loading the module made the kernel say {unusual:?}"
    );

    let files: Vec<String> = guest.request(Op::List { path: SYSFS.into() })?;
    let files: BTreeSet<&str> = files.iter().map(String::as_str).collect();
    let entries = manual();
    let described: BTreeSet<&str> = entries.iter().map(|entry| entry.name).collect();
    let without = |a: &BTreeSet<&str>, b: &BTreeSet<&str>| {
        a.difference(b).copied().collect::<Vec<_>>().join(", ")
    };
    ensure!(
        files == described,
        "only in sysfs: {}; only in docs/sysfs.md: {}",
        without(&files, &described),
        without(&described, &files)
    );
    let in_abi: BTreeSet<&str> = ABI
        .lines()
        .filter_map(|line| line.strip_prefix("What:\t\t/sys/kernel/pagefusion/"))
        .collect();
    ensure!(
        files == in_abi,
        "only in sysfs: {}; only in docs/ABI/sysfs-kernel-pagefusion: {}",
        without(&files, &in_abi),
        without(&in_abi, &files)
    );
    for entry in &entries {
        check(&mut guest, entry).with_context(|| entry.name.to_owned())?;
    }
    guest.unload_module()?;

    let refused = guest.load_module_with("run=3").unwrap_err();
    ensure!(
        format!("{refused:#}").contains("Invalid argument"),
        "run=3 was refused: {refused:#}"
    );
    guest.load_module_with("run=0")?;
    ensure!(guest.knob("run")? == "0", "loaded to stand still, it runs");
    guest.unload_module()?;
    guest.healthy()?;
    guest.kill()
}

/// The module names itself for `modinfo`, and its device for whoever loads modules by device.
fn module_says_who_it_is(stage: &Stage) -> Result<()> {
    let module = stage.world.artifacts.module_ko.as_ref();
    let image = fs::read(module.context("there is no module")?)?;
    for wanted in [
        "license=GPL v2",
        "author=",
        "description=Page fusion",
        "alias=pci:v00001AF4d00001110",
        "parm=run:",
    ] {
        let found = image
            .windows(wanted.len())
            .any(|window| window == wanted.as_bytes());
        ensure!(found, "the module's information lacks {wanted}");
    }
    Ok(())
}

fn check(guest: &mut Guest, entry: &Entry) -> Result<()> {
    let shown = guest.knob(entry.name)?;
    let Some((range, default)) = entry.knob else {
        shown.parse::<u64>().with_context(|| shown.clone())?;
        refused(guest, entry.name, "1")?;
        return Ok(());
    };
    if let Some((least, most)) = range.split_once('–') {
        ensure!(shown == default, "{shown} is the default, not {default}");
        let (least, most): (u64, u64) = (least.parse()?, most.parse()?);
        for nonsense in [
            "",
            "-1",
            "+1",
            " 1",
            "1 ",
            "1 2",
            "x",
            "1x",
            "0x10",
            "1.0",
            "1\n\n",
            "\n",
            "18446744073709551616",
        ] {
            refused(guest, entry.name, nonsense)?;
        }
        refused(guest, entry.name, &(most + 1).to_string())?;
        if let Some(less) = least.checked_sub(1) {
            refused(guest, entry.name, &less.to_string())?;
        }
        for value in [least, most] {
            guest.set(entry.name, &format!("{value}\n"))?;
            ensure!(guest.knob(entry.name)? == value.to_string());
        }
    } else if entry.name == "scope" {
        for word in SCOPES {
            guest.set("scope", word)?;
            let shown = guest.knob("scope")?;
            let expected: Vec<String> = SCOPES
                .iter()
                .map(|one| {
                    if one == word {
                        format!("[{one}]")
                    } else {
                        (*one).to_owned()
                    }
                })
                .collect();
            ensure!(shown == expected.join(" "), "{shown}");
        }
        for nonsense in ["", "1", "Exec", "exec clean", "[exec]", " exec"] {
            refused(guest, "scope", nonsense)?;
        }
    } else {
        ensure!(shown.is_empty(), "it begins with {shown}");
        for (written, list) in [
            ("libssl* /a/*.key\n", "libssl*\n/a/*.key"),
            ("+x -libssl*", "/a/*.key\nx"),
            ("y", "y"),
        ] {
            guest.set(entry.name, written)?;
            ensure!(guest.knob(entry.name)? == list, "after {written:?}");
        }
        for nonsense in ["+", "-x", "+a b", "[", "a\\", "[!"] {
            refused(guest, entry.name, nonsense)?;
        }
        let long = "x".repeat(4001);
        refused_with(guest, entry.name, &long, "os error 28")?;
        refused_with(guest, entry.name, &long.repeat(2), "os error 7")?;
        guest.set(entry.name, "\n")?;
        return Ok(());
    }
    let default = if entry.name == "scope" {
        default
    } else {
        shown.as_str()
    };
    guest.set(entry.name, default)
}

/// Writing this is refused and changes nothing.
fn refused(guest: &mut Guest, name: &str, data: &str) -> Result<()> {
    refused_with(guest, name, data, "os error ")
}

fn refused_with(guest: &mut Guest, name: &str, data: &str, why: &str) -> Result<()> {
    let before = guest.knob(name)?;
    match guest.set(name, data) {
        Err(error) if format!("{error:#}").contains(why) => {}
        // An empty write does not even reach the module.
        Ok(()) if data.is_empty() => {}
        Err(error) => bail!("{data:?} is refused with {error:#}"),
        Ok(()) => bail!("{data:?} is taken"),
    }
    let after = guest.knob(name)?;
    let changing = before.parse::<u64>().is_ok() && name == "cpu_usecs";
    ensure!(before == after || changing, "{data:?} made {after} of it");
    Ok(())
}

/// Bytes of a file whose coming and going is seen in the counters of a running system.
const FILE_BYTES: u64 = 8 << 20;
const FILE_PAGES: u64 = FILE_BYTES / 4096;
/// What else may change meanwhile.
const NOISE: u64 = FILE_PAGES / 4;
/// How long the module may take to act on a knob.
const LIMIT: Duration = Duration::from_secs(120);
/// Between two looks.
const SLICE: Duration = Duration::from_millis(20);
/// The age that a file must reach.
const AGE: Duration = Duration::from_millis(4000);

pub(super) fn decide_what_is_reported(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    // Pages that are being moved into huge pages, 4,096 at a time, come and go.
    services::stop_joining_pages(&mut stage.world.guests)?;
    let mut guest = Watched::new(&mut stage.world.guests[0])?;

    guest.set("exclude", "pf-knob-a")?;
    // Files that nobody maps any more have been withdrawn.
    guest.passes(2)?;
    guest.hold("/var/tmp/pf-knob-a", seed)?;
    guest.stays().context("an excluded file")?;
    ensure!(guest.guest.counter("files_excluded")? > 0);
    guest.set("exclude", "+/nowhere/* -pf-knob-a")?;
    guest.grows().context("no longer excluded")?;
    guest.set("exclude", "/var/tmp/pf-knob-?")?;
    guest.shrinks().context("excluded after it was reported")?;
    guest.set("exclude", "\n")?;
    guest.grows().context("an empty list")?;

    let path = "/var/tmp/pf-knob-a".to_owned();
    guest
        .guest
        .request::<Value>(Op::Release { path: path.clone() })?;
    guest.stays().context("a file that nobody maps any more")?;
    let before = guest.tracked;
    guest.set("exclude", "pf-knob-a")?;
    guest.passes(2)?;
    ensure!(
        guest.tracked + FILE_PAGES - NOISE <= before,
        "an excluded file that nobody maps any more: {} pages are tracked, {before} were before",
        guest.tracked
    );
    guest.set("exclude", "\n")?;
    guest.guest.request::<Value>(Op::Hold { path })?;
    guest.grows().context("mapped again")?;

    guest.set("scope", "exec")?;
    guest.shrinks().context("executable mappings only")?;
    guest.set("scope", "readonly")?;
    guest.grows().context("all readable mappings again")?;

    guest.set("kernel_text", "0")?;
    guest.shrinks().context("without the kernel")?;
    guest.set("kernel_text", "1")?;
    guest.grows().context("with the kernel again")?;

    guest.set("min_run_pages", "4096")?;
    guest.hold("/var/tmp/pf-knob-b", seed + 1)?;
    guest.stays().context("runs of thousands only")?;
    guest.set("max_inflight_pages", "1")?;
    guest.set("report_names", "0")?;
    guest.set("min_run_pages", "1")?;
    guest.grows().context("a page at a time, all runs")?;
    guest.set("max_inflight_pages", "8192")?;
    guest.set("report_names", "1")?;

    // The rest of that file.
    guest.passes(2)?;
    guest.set("min_age_millisecs", &AGE.as_millis().to_string())?;
    let first = uptime(guest.guest)?;
    guest.hold("/var/tmp/pf-knob-c", seed + 2)?;
    guest.grows().context("a file that grew old")?;
    let took = uptime(guest.guest)? - first;
    ensure!(took >= AGE, "it was reported after {took:?}");
    guest.set("min_age_millisecs", "0")?;

    for name in ["a", "b", "c"] {
        let path = format!("/var/tmp/pf-knob-{name}");
        guest
            .guest
            .request::<Value>(Op::Release { path: path.clone() })?;
        guest.guest.request::<Value>(Op::Delete { path })?;
    }
    settle(&mut stage.world, Instant::now())?;
    withdraws_everything(stage)
}

fn withdraws_everything(stage: &mut Stage) -> Result<()> {
    let before = built_anew(stage)?;
    let after = built_anew(stage)?;
    services::join_pages_again(&mut stage.world.guests)?;
    ensure!(
        after >= before * 9 / 10,
        "{after} pages are shared again, {before} were before"
    );
    stage.files_are_right()
}

/// Has the first guest withdraw everything and report it again. Returns the pages it then shares,
/// among which are none that it has freed, as there may be at any other time.
fn built_anew(stage: &mut Stage) -> Result<u64> {
    stage.world.guests[0].set("run", "2")?;
    let deadline = Instant::now() + LIMIT;
    loop {
        let shared = stage.shared_by(0)?;
        let guest = &mut stage.world.guests[0];
        let (tracked, said) = (
            guest.counter("pages_tracked")?,
            guest.counter("pages_shared")?,
        );
        if shared == 0 && tracked == 0 && said == 0 {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "{shared} pages are shared after all was withdrawn; the guest says {said} and remembers {tracked}"
        );
        crate::interrupt::check()?;
        std::thread::sleep(Duration::from_millis(250));
    }
    stage.files_are_right()?;
    stage.world.guests[0].set("run", "1")?;
    settle(&mut stage.world, Instant::now())?;
    stage.shared_by(0)
}

/// From the moment at which a file is opened for writing, in the middle of its being reported, none of its pages is:
/// a device may come to write to them.
pub(super) fn nothing_more_once_somebody_may_write(stage: &mut Stage) -> Result<()> {
    const PATH: &str = "/tmp/pf-opened";
    const PAGES: u64 = 8192;
    let seed = stage.seed();
    stage.with_small_pair(&Small::default(), |world| {
        // What the host asks for once more, as the other guest has it, too, would be counted.
        settle(world, Instant::now())?;
        let guest = &mut world.guests[0];
        write(guest, PATH, seed, 0, PAGES * 4096)?;
        // A page at a time, with a wait for each, so that there is a middle.
        guest.set("max_inflight_pages", "1")?;
        let before = guest.counter("pages_reported")?;
        let seen = seen_by_host(world)?;
        let guest = &mut world.guests[0];
        let path = PATH.to_owned();
        unit(guest, Op::Hold { path: path.clone() })?;
        let deadline = Instant::now() + LIMIT;
        while seen_by_host(world)? < seen + 50 {
            ensure!(Instant::now() < deadline, "nothing of it is reported");
            std::thread::sleep(SLICE);
        }
        let guest = &mut world.guests[0];
        let path = Some(path);
        unit(guest, Op::OpenForWriting { path })?;
        guest.wait_passes(1, LIMIT)?;
        let reported = guest.counter("pages_reported")? - before;
        ensure!(
            reported > 0 && reported < PAGES / 2,
            "{reported} of {PAGES} pages were reported"
        );
        unit(guest, Op::OpenForWriting { path: None })
    })
}

/// Pages of the first guest that have reached the host: the guest's own counters say it after a pass.
pub(super) fn seen_by_host(world: &World) -> Result<u64> {
    let name = world.guests[0].name();
    Ok(world.status()?.vm(name)?.pages_reported)
}

/// Whoever may see the host's figures need not know what its guests call their files.
pub(super) fn names_may_be_kept(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let told = files.add(world)?;
        each(world, |guest| guest.set("report_names", "0"))?;
        let kept = files.add(world)?;
        each(world, |guest| guest.set("report_names", "1"))?;
        let told_later = files.add(world)?;
        let listed = world.site.ctl(&["files", "--limit", "0"])?;
        for (path, expected) in [(told, true), (kept, false), (told_later, true)] {
            let name = path.rsplit('/').next().context("a name")?;
            ensure!(
                listed.contains(name) == expected,
                "{name} should be listed: {expected}; listed are\n{listed}"
            );
        }
        files.are_right(world)
    })
}

/// A file that is shared already when its name is excluded, or the scope leaves it out, is memory of that guest alone again.
pub(super) fn what_is_kept_out_is_shared_no_more(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let small = with_disk(&stage.world)?;
    stage.with_small_pair(&small, |world| {
        let mut files = SharedFiles::hold(world, seed)?;
        let path = files.add(world)?;
        let name = path.rsplit('/').next().context("a name")?;
        for (knob, out, back) in [("exclude", name, "\n"), ("scope", "exec", "readonly")] {
            world.guests[0].set(knob, out)?;
            none_same(world, &path).with_context(|| format!("{knob} is {out}"))?;
            files.are_right(world)?;
            world.guests[0].set(knob, back)?;
            files.are_shared(world)?;
        }
        files.are_right(world)
    })
}

/// A process whose mmap lock cannot be had when the scope changes keeps what it shares.
pub(super) fn what_cannot_be_looked_at_stays(stage: &mut Stage) -> Result<()> {
    /// Few enough: after sixteen passes that could not look the module judges all the same.
    const CHANGES: usize = 2;
    const PATH: &str = "/tmp/pf-restless";
    const BYTES: u64 = 8 << 20;
    let seed = stage.seed();
    // The module looks while the process is at it, which one processor would do in turns.
    let small = Small {
        arguments: ["-smp", "2"].map(Into::into).into(),
        ..Small::default()
    };
    stage.with_small_pair(&small, |world| {
        let guest = &mut world.guests[0];
        write(guest, PATH, seed, 0, BYTES)?;
        for shared in [false, true] {
            hold(guest, PATH)?;
            // The first one may have begun before.
            guest.wait_passes(2, LIMIT)?;
            let path = Some(PATH.to_owned());
            unit(guest, Op::Restless { path, shared })?;
            release(guest, PATH)?;
            for _ in 0..CHANGES {
                let before = guest.counter("pages_retracted")?;
                // Nothing that belongs to `readonly` does not belong to it.
                guest.set("scope", "cached")?;
                guest.wait_passes(2, LIMIT)?;
                let retracted = guest.counter("pages_retracted")? - before;
                ensure!(
                    retracted < BYTES / 4096,
                    "{retracted} pages were withdrawn when the scope grew; shared: {shared}"
                );
                guest.set("scope", "readonly")?;
                guest.wait_passes(2, LIMIT)?;
            }
            unit(guest, Op::Restless { path: None, shared })?;
            guest.wait_passes(2, LIMIT)?;
        }
        Ok(())
    })
}

/// How long a guest has been up by its own clock, which a busy host may make another than ours.
pub(super) fn uptime(guest: &mut Guest) -> Result<Duration> {
    let text: String = guest.request(Op::Read {
        path: "/proc/uptime".into(),
    })?;
    let seconds = text.split(' ').next().unwrap_or_default();
    Ok(Duration::from_secs_f64(seconds.parse()?))
}

/// A guest and the pages its module remembered as reported when last looked at.
struct Watched<'a> {
    guest: &'a mut Guest,
    tracked: u64,
}

impl<'a> Watched<'a> {
    fn new(guest: &'a mut Guest) -> Result<Self> {
        let mut this = Self { guest, tracked: 0 };
        this.passes(2)?;
        Ok(this)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        self.guest.set(name, value)
    }

    /// Waits for so many passes and looks again.
    fn passes(&mut self, passes: u64) -> Result<()> {
        self.guest.wait_passes(passes, LIMIT)?;
        self.tracked = self.guest.counter("pages_tracked")?;
        Ok(())
    }

    /// Maps a new file.
    fn hold(&mut self, path: &str, seed: u64) -> Result<()> {
        self.guest.request::<Value>(Op::WritePattern {
            path: path.into(),
            seed,
            offset: 0,
            bytes: FILE_BYTES,
        })?;
        self.guest
            .request::<Value>(Op::Hold { path: path.into() })
            .map(drop)
    }

    fn grows(&mut self) -> Result<()> {
        let least = self.tracked + FILE_PAGES - NOISE;
        self.until(|tracked| tracked >= least, &format!("{least} or more"))
    }

    fn shrinks(&mut self) -> Result<()> {
        let most = (self.tracked + NOISE).saturating_sub(FILE_PAGES);
        self.until(|tracked| tracked <= most, &format!("{most} or less"))
    }

    /// Three passes change nothing.
    fn stays(&mut self) -> Result<()> {
        let before = self.tracked;
        self.passes(3)?;
        ensure!(
            self.tracked.abs_diff(before) <= NOISE,
            "{} pages are tracked, {before} were before",
            self.tracked
        );
        Ok(())
    }

    fn until(&mut self, good: impl Fn(u64) -> bool, wanted: &str) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        loop {
            self.tracked = self.guest.counter("pages_tracked")?;
            if good(self.tracked) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{} pages are tracked, not {wanted}",
                self.tracked
            );
            self.guest.wait_passes(1, LIMIT)?;
        }
    }
}

/// Writes to every knob, over and over, while passes with rests after every few pages are under way.
const HAMMER: &str = r#"
cd /sys/kernel/pagefusion
for i in $(seq 400); do
    echo clean > scope; echo $((i % 4 * 20 + 10)) > max_sleep_millisecs
    echo exec > scope; echo 0 > kernel_text; echo $((i % 3)) > run
    echo '+*.so.6 +/usr/bin/*' > exclude; echo 1 > min_run_pages; echo 1 > max_inflight_pages
    echo cached > scope; echo 1 > run; echo 1 > kernel_text; echo $((i % 7 * 1024 + 1)) > pages_to_scan
    echo 10 > sleep_millisecs; echo $((i % 5 * 10)) > min_age_millisecs; echo 8192 > max_inflight_pages
    echo readonly > scope; echo > exclude; echo 4096 > min_run_pages; echo 0 > report_names; echo 1 > report_names
    cat * > /dev/null
done
echo 1 > run; echo 1 > min_run_pages; echo 0 > min_age_millisecs; echo 65536 > pages_to_scan
"#;

/// How long that may take with detectors.
const HAMMERED: Duration = Duration::from_secs(900);

pub(super) fn in_the_middle_of_a_pass(stage: &mut Stage) -> Result<()> {
    services::stop_joining_pages(&mut stage.world.guests)?;
    let before = built_anew(stage)?;
    let guest = &mut stage.world.guests[0];
    let passes = guest.counter("full_scans")?;
    // The shell leaves no time for a thread that gives way to it.
    renice(guest, 0)?;
    let hammered = guest.run_for(&["sh", "-c", HAMMER], HAMMERED)?;
    ensure!(hammered.status == Some(0), "{}", hammered.stderr);
    renice(guest, 19)?;
    let made = guest.counter("full_scans")? - passes;
    ensure!(made > 0, "no pass came to its end meanwhile");
    guest.set("sleep_millisecs", "100")?;
    guest.set("max_sleep_millisecs", "500")?;
    settle(&mut stage.world, Instant::now())?;
    let after = stage.shared_by(0)?;
    services::join_pages_again(&mut stage.world.guests)?;
    ensure!(
        after >= before * 9 / 10,
        "{after} pages are shared after all that, {before} were before"
    );
    stage.files_are_right()
}
