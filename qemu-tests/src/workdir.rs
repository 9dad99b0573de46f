//! Temporary directories that say whose they are, so that those of a killed harness can be told and removed.

use std::{
    ffi::CString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
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
            // It may be a store, which is a tmpfs of its own.
            let _ = unmount(entry.path(), UnmountFlags::DETACH);
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

/// A tmpfs of its own for the store, below `/dev/shm`; unmounted and removed in the end.
#[derive(Debug)]
pub struct Store {
    directory: TempDir,
}

impl Store {
    /// Mounts one, with the options that it is installed with.
    pub fn create() -> Result<Self> {
        let parent = Path::new("/dev/shm");
        let kind = rustix::fs::statfs(parent)
            .context("look at /dev/shm")?
            .f_type;
        ensure!(kind == TMPFS, "/dev/shm is not on tmpfs");
        let directory = create_in(parent)?;
        let options = options(UNIT)?;
        mount(
            "tmpfs",
            directory.path(),
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV,
            options.as_c_str(),
        )
        .with_context(|| format!("mount a tmpfs with {options:?}"))?;
        Ok(Self { directory })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Who has its files open keeps them.
        let _ = unmount(self.directory.path(), UnmountFlags::DETACH);
    }
}

const UNIT: &str = include_str!("../../packaging/dev-shm-pagefusion.mount");

/// What a mount unit has for the file system itself.
fn options(unit: &str) -> Result<CString> {
    let line = unit.lines().find_map(|line| line.strip_prefix("Options="));
    let options = line.context("the mount unit has no options")?.split(',');
    let own: Vec<&str> = options.filter(|it| it.contains('=')).collect();
    CString::new(own.join(",")).context("options of the mount unit")
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
    fn the_store_is_mounted_as_it_is_installed() {
        let expected = c"mode=0700,size=50%,huge=within_size";
        assert_eq!(options(UNIT).unwrap().as_c_str(), expected);
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
