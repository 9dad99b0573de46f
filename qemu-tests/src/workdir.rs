//! Temporary directories that say whose they are, so that those of a killed harness can be told and removed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

const PREFIX: &str = "pagefusion-";
/// `f_type` of tmpfs.
const TMPFS: i64 = 0x0102_1994;

/// The process in a name that was made here.
pub(crate) fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

/// Whether a process lives.
pub(crate) fn alive(pid: u32) -> bool {
    PathBuf::from(format!("/proc/{pid}")).exists()
}

/// A directory below `parent`.
pub fn create_in(parent: &Path) -> Result<TempDir> {
    for entry in fs::read_dir(parent).with_context(|| format!("list {}", parent.display()))? {
        let entry = entry?;
        if entry
            .file_name()
            .to_str()
            .and_then(owner)
            .is_some_and(|owner| !alive(owner))
        {
            // Another harness may be removing the same leftover.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    tempfile::Builder::new()
        .prefix(&format!("{PREFIX}{}-", std::process::id()))
        .tempdir_in(parent)
        .with_context(|| format!("create a directory in {}", parent.display()))
}

/// A directory for sockets and logs.
pub fn create() -> Result<TempDir> {
    create_in(&std::env::temp_dir())
}

/// A directory on tmpfs, for the store.
pub fn create_on_tmpfs() -> Result<TempDir> {
    let parent = Path::new("/dev/shm");
    let kind = rustix::fs::statfs(parent)
        .context("look at /dev/shm")?
        .f_type;
    ensure!(kind == TMPFS, "/dev/shm is not on tmpfs");
    create_in(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_owner() {
        assert_eq!(owner("pagefusion-123-abc"), Some(123));
        assert_eq!(owner("pagefusion-abc"), None);
        assert_eq!(owner("other-123-abc"), None);
    }

    #[test]
    fn leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not() {
        let parent = tempfile::tempdir().unwrap();
        let mine = parent
            .path()
            .join(format!("pagefusion-{}-x", std::process::id()));
        let dead = parent.path().join("pagefusion-4194999-x");
        fs::create_dir(&mine).unwrap();
        fs::create_dir(&dead).unwrap();
        let made = create_in(parent.path()).unwrap();
        assert!(mine.exists() && made.path().exists() && !dead.exists());
    }
}
