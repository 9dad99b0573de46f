//! Keeps khugepaged from changing what memory takes while that is read.
//!
//! It makes a huge page of a range with as little as one page in it, and fills the rest with zeroes; or it gives back what
//! an earlier huge page has left over there. Memory that shares is not khugepaged's, as its faults are told to somebody.
//! Memory whose sharing was undone is, so that a collapse or two would be part of the difference.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::interrupt;

const SLEEP: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs";
/// Locked by whoever keeps khugepaged asleep, and holds what was set before; empty when nobody does. It is gone after a
/// reboot, as sysfs is.
const SAVED: &str = "/run/pagefusion-khugepaged";
/// Longer than any two readings are apart.
const HOUR: &str = "3600000";
/// A lock that is given back has no event.
const INTERVAL: Duration = Duration::from_millis(100);

/// While this is there, khugepaged sleeps after what it has begun, and another one waits. The setting is put back when
/// this is dropped; after a SIGKILL the next one does so.
#[derive(Debug)]
pub struct Asleep {
    knob: PathBuf,
    saved: File,
}

impl Asleep {
    /// Puts it to sleep; `None` where there is none.
    pub fn now() -> Result<Option<Self>> {
        Self::at(Path::new(SLEEP), Path::new(SAVED))
    }

    fn at(knob: &Path, saved: &Path) -> Result<Option<Self>> {
        if !knob.exists() {
            return Ok(None);
        }
        let mut asleep = Self {
            knob: knob.to_owned(),
            saved: locked(saved).with_context(|| format!("lock {}", saved.display()))?,
        };
        // What a killed one has left is not what the machine's owner has set.
        if asleep.before()?.is_empty() {
            let before = fs::read_to_string(knob);
            let before = before.with_context(|| format!("read {}", knob.display()))?;
            asleep
                .saved
                .write_all(before.trim().as_bytes())
                .with_context(|| format!("keep khugepaged's setting in {}", saved.display()))?;
        }
        asleep.set(HOUR)?;
        Ok(Some(asleep))
    }

    fn before(&mut self) -> Result<String> {
        let mut before = String::new();
        self.saved
            .rewind()
            .and_then(|()| self.saved.read_to_string(&mut before))
            .context("read what khugepaged's setting was")?;
        Ok(before)
    }

    /// Writing also wakes it, for one round.
    fn set(&self, millisecs: &str) -> Result<()> {
        fs::write(&self.knob, millisecs)
            .with_context(|| format!("write {millisecs} to {}", self.knob.display()))
    }

    fn restore(&mut self) -> Result<()> {
        let before = self.before()?;
        // Nothing was set yet.
        if before.is_empty() {
            return Ok(());
        }
        self.set(&before)?;
        self.saved
            .set_len(0)
            .context("forget what khugepaged's setting was")
    }
}

/// The file, made where there is none, with its lock.
fn locked(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(path)?;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        interrupt::check()?;
        thread::sleep(INTERVAL);
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
        assert_eq!(fs::read_to_string(&saved).unwrap(), "");
    }

    #[test]
    fn of_two_at_once_one_waits_and_the_setting_is_the_owners_afterwards() {
        let (_directory, knob, saved) = knob();
        let first = Asleep::at(&knob, &saved).unwrap().unwrap();
        let paths = (knob.clone(), saved.clone());
        let second = thread::spawn(move || drop(Asleep::at(&paths.0, &paths.1).unwrap()));
        // It cannot have been there before the first one ends, however long that takes.
        assert!(
            flock(
                File::open(&saved).unwrap(),
                FlockOperation::NonBlockingLockShared
            )
            .is_err()
        );
        drop(first);
        second.join().unwrap();
        assert_eq!(fs::read_to_string(&knob).unwrap(), "12345");
    }

    #[test]
    fn the_next_one_repairs_what_a_kill_has_left() {
        let (_directory, knob, saved) = knob();
        let killed = Asleep::at(&knob, &saved).unwrap().unwrap();
        // What the kernel does with a killed process's file, and nothing else.
        flock(&killed.saved, FlockOperation::Unlock).unwrap();
        std::mem::forget(killed);
        assert_eq!(fs::read_to_string(&knob).unwrap(), HOUR);
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
