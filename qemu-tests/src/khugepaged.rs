//! Keeps khugepaged from changing what memory takes while that is read.
//!
//! It makes a huge page of a range with as little as one page in it, and fills the rest with zeroes; or it gives back what
//! an earlier huge page has left over there. Memory that shares is not khugepaged's, as its faults are told to somebody.
//! Memory whose sharing was undone is, so that a collapse or two would be part of the difference.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

const SLEEP: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs";
/// What was set before is here while something else is; sysfs and this are both gone after a reboot.
const SAVED: &str = "/run/pagefusion-khugepaged";
/// Longer than any two readings are apart.
const HOUR: &str = "3600000";

/// While this is there, khugepaged sleeps after what it has begun. Its setting is put back when this is dropped; after a
/// SIGKILL the next one does so.
#[derive(Debug)]
pub struct Asleep {
    knob: PathBuf,
    saved: PathBuf,
}

impl Asleep {
    /// Puts it to sleep; `None` where there is none.
    pub fn now() -> Result<Option<Self>> {
        Self::at(Path::new(SLEEP), Path::new(SAVED))
    }

    fn at(knob: &Path, saved: &Path) -> Result<Option<Self>> {
        let before = match fs::read_to_string(knob) {
            Ok(before) => before,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", knob.display())),
        };
        // What a killed one has left is not what the machine's owner has set.
        if !saved.exists() {
            let partial = saved.with_extension("new");
            fs::write(&partial, before.trim())
                .and_then(|()| fs::rename(&partial, saved))
                .with_context(|| format!("keep khugepaged's setting in {}", saved.display()))?;
        }
        let asleep = Self {
            knob: knob.to_owned(),
            saved: saved.to_owned(),
        };
        asleep.set(HOUR)?;
        Ok(Some(asleep))
    }

    /// Writing also wakes it, for one round.
    fn set(&self, millisecs: &str) -> Result<()> {
        fs::write(&self.knob, millisecs)
            .with_context(|| format!("write {millisecs} to {}", self.knob.display()))
    }

    fn restore(&self) -> Result<()> {
        let before = fs::read_to_string(&self.saved).context("read what its setting was")?;
        self.set(&before)?;
        fs::remove_file(&self.saved).context("forget what its setting was")
    }
}

impl Drop for Asleep {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            eprintln!("khugepaged sleeps longer than before: {error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn knob() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let (knob, saved) = (
            directory.path().join("knob"),
            directory.path().join("saved"),
        );
        fs::write(&knob, "12345\n").unwrap();
        (directory, knob, saved)
    }

    #[test]
    fn the_setting_is_back_afterwards() {
        let (_directory, knob, saved) = knob();
        let asleep = Asleep::at(&knob, &saved).unwrap().unwrap();
        assert_eq!(fs::read_to_string(&knob).unwrap(), HOUR);
        drop(asleep);
        assert_eq!(fs::read_to_string(&knob).unwrap(), "12345");
        assert!(!saved.exists());
    }

    #[test]
    fn the_next_one_repairs_what_a_kill_has_left() {
        let (_directory, knob, saved) = knob();
        std::mem::forget(Asleep::at(&knob, &saved).unwrap().unwrap());
        drop(Asleep::at(&knob, &saved).unwrap().unwrap());
        assert_eq!(fs::read_to_string(&knob).unwrap(), "12345");
    }

    #[test]
    fn a_kernel_without_it_needs_nothing() {
        let (directory, _, saved) = knob();
        let none = Asleep::at(&directory.path().join("no"), &saved).unwrap();
        assert!(none.is_none() && !saved.exists());
    }
}
