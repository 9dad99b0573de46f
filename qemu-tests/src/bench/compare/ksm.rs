//! KSM's settings, which are the machine's: they are put back however a benchmark ends.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::systems::Pace;

const KSM: &str = "/sys/kernel/mm/ksm";
/// What was set before is here while something else is; sysfs and this are both gone after a reboot.
const SAVED: &str = "/run/pagefusion-bench-ksm.json";
/// Stops KSM and takes back what it has merged.
const UNMERGE: &str = "2";

/// In the order in which they are written: nothing is set while something runs or while the advisor sets it itself,
/// and `run` comes last.
const KNOBS: [&str; 9] = [
    "pages_to_scan",
    "sleep_millisecs",
    "smart_scan",
    "advisor_target_scan_time",
    "advisor_max_cpu",
    "advisor_min_pages_to_scan",
    "advisor_max_pages_to_scan",
    ADVISOR,
    RUN,
];
/// What the kernel sets beside the pace, and all that are compared have.
const SHIPPED: [(&str, &str); 5] = [
    ("smart_scan", "1"),
    ("advisor_target_scan_time", "200"),
    ("advisor_max_cpu", "70"),
    ("advisor_min_pages_to_scan", "500"),
    ("advisor_max_pages_to_scan", "30000"),
];
const ADVISOR: &str = "advisor_mode";
const RUN: &str = "run";

/// KSM while it is ours. What was set before is set again when this is dropped; after a SIGKILL the next benchmark
/// does so before anything else.
#[derive(Debug)]
pub(super) struct Ksm {
    knobs: PathBuf,
    saved: PathBuf,
}

/// What KSM says of itself.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    /// Rounds through all memory.
    pub(super) full_scans: u64,
}

impl Ksm {
    /// Takes KSM over. It is off afterwards, and nothing is merged.
    pub(super) fn take() -> Result<Self> {
        Self::take_at(Path::new(KSM), Path::new(SAVED))
    }

    fn take_at(knobs: &Path, saved: &Path) -> Result<Self> {
        let ksm = Self {
            knobs: knobs.to_owned(),
            saved: saved.to_owned(),
        };
        // What a killed benchmark has left is not what the machine's owner has set.
        if !ksm.saved.exists() {
            let before = ksm.all()?;
            let partial = ksm.saved.with_extension("new");
            fs::write(&partial, serde_json::to_vec_pretty(&before)?)
                .with_context(|| format!("write {}", partial.display()))?;
            fs::rename(&partial, &ksm.saved).context("keep KSM's settings")?;
        }
        ksm.off()?;
        Ok(ksm)
    }

    /// Stops it and undoes all merging.
    pub(super) fn off(&self) -> Result<()> {
        self.set(RUN, UNMERGE)?;
        self.set(RUN, "0")
    }

    /// Stops it; what is merged stays.
    pub(super) fn stop(&self) -> Result<()> {
        self.set(RUN, "0")
    }

    /// Prepares it; it does not run yet.
    pub(super) fn prepare(&self, pace: Pace) -> Result<()> {
        self.off()?;
        if self.has(ADVISOR) {
            self.set(ADVISOR, "none")?;
        }
        for (knob, value) in SHIPPED {
            if self.has(knob) {
                self.set(knob, value)?;
            }
        }
        self.set("sleep_millisecs", &pace.sleep_millisecs.to_string())?;
        match pace.pages_to_scan {
            Some(pages) => self.set("pages_to_scan", &pages.to_string()),
            None => {
                ensure!(self.has(ADVISOR), "this kernel's KSM has no advisor");
                self.set(ADVISOR, "scan-time")
            }
        }
    }

    /// Lets it run.
    pub(super) fn start(&self) -> Result<()> {
        self.set(RUN, "1")
    }

    /// How far it is.
    pub(super) fn progress(&self) -> Result<Progress> {
        let text = self.get("full_scans")?;
        let full_scans = text.parse().context("parse KSM's full_scans")?;
        Ok(Progress { full_scans })
    }

    /// All settings as they are.
    pub(super) fn all(&self) -> Result<BTreeMap<String, String>> {
        let mut all = BTreeMap::new();
        for knob in KNOBS {
            // Older kernels have no advisor.
            if self.has(knob) {
                all.insert(knob.to_owned(), self.get(knob)?);
            }
        }
        Ok(all)
    }

    fn restore(&self) -> Result<()> {
        let text = fs::read(&self.saved).context("read what KSM's settings were")?;
        let before: BTreeMap<String, String> =
            serde_json::from_slice(&text).context("parse what KSM's settings were")?;
        self.off()?;
        if before.contains_key(ADVISOR) {
            self.set(ADVISOR, "none")?;
        }
        for knob in KNOBS {
            if let Some(value) = before.get(knob) {
                self.set(knob, value)?;
            }
        }
        fs::remove_file(&self.saved).context("forget what KSM's settings were")
    }

    fn has(&self, knob: &str) -> bool {
        self.knobs.join(knob).exists()
    }

    fn get(&self, knob: &str) -> Result<String> {
        let path = self.knobs.join(knob);
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Ok(chosen(text.trim()).to_owned())
    }

    fn set(&self, knob: &str, value: &str) -> Result<()> {
        let path = self.knobs.join(knob);
        fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            eprintln!("KSM is not as it was before: {error:#}");
        }
    }
}

/// The word in brackets, where a file shows all there are; else all of it.
fn chosen(text: &str) -> &str {
    let inside = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or(text, |(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files in place of the kernel's, in a directory where settings can be kept, too.
    fn knobs() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let knobs = directory.path().join("ksm");
        fs::create_dir(&knobs).unwrap();
        for (knob, value) in [
            ("run", "1\n"),
            ("pages_to_scan", "321\n"),
            ("sleep_millisecs", "45\n"),
            ("smart_scan", "1\n"),
            ("advisor_mode", "none [scan-time]\n"),
            ("advisor_max_cpu", "33\n"),
        ] {
            fs::write(knobs.join(knob), value).unwrap();
        }
        let saved = directory.path().join("saved.json");
        (directory, knobs, saved)
    }

    fn values(knobs: &Path) -> Vec<String> {
        let names = ["run", "pages_to_scan", "sleep_millisecs", "advisor_mode"];
        let read = |name| fs::read_to_string(knobs.join(name)).unwrap();
        names.map(read).to_vec()
    }

    const BEFORE: [&str; 4] = ["1", "321", "45", "scan-time"];

    fn change(ksm: &Ksm) {
        ksm.prepare(Pace {
            sleep_millisecs: 0,
            pages_to_scan: Some(100_000),
        })
        .unwrap();
        ksm.start().unwrap();
        assert_eq!(values(&ksm.knobs), ["1", "100000", "0", "none"]);
    }

    #[test]
    fn settings_are_back_afterwards() {
        let (_directory, knobs, saved) = knobs();
        let ksm = Ksm::take_at(&knobs, &saved).unwrap();
        assert_eq!(values(&knobs)[0], "0", "off as long as nobody starts it");
        change(&ksm);
        drop(ksm);
        assert_eq!(values(&knobs), BEFORE);
        assert!(!saved.exists());
    }

    #[test]
    fn settings_are_back_after_a_panic() {
        let (_directory, knobs, saved) = knobs();
        let paths = (knobs.clone(), saved.clone());
        let panicked = std::thread::spawn(move || {
            let ksm = Ksm::take_at(&paths.0, &paths.1).unwrap();
            change(&ksm);
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
        assert_eq!(values(&knobs), BEFORE);
    }

    #[test]
    fn the_next_one_repairs_what_a_kill_has_left() {
        let (_directory, knobs, saved) = knobs();
        let killed = Ksm::take_at(&knobs, &saved).unwrap();
        change(&killed);
        std::mem::forget(killed);
        let next = Ksm::take_at(&knobs, &saved).unwrap();
        drop(next);
        assert_eq!(values(&knobs), BEFORE);
    }
}
