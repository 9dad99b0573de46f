// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Removes what others have filled: as deep, as large and as odd as they liked.
//!
//! No call stack, no path and no set of descriptors grows with the depth: a directory that is
//! not empty is moved up, next to the one it was in.

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::ffi::{CStr, CString, OsString};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Beginning of the names of what is to be removed.
const PREFIX: &str = "left-";
/// Most entries removed at one go; the rest is for the next daemon.
const MOST_ENTRIES: usize = 1 << 20;

/// A name that nothing has.
pub(super) fn new_name() -> io::Result<OsString> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(format!("{PREFIX}{:016x}", u64::from_ne_bytes(bytes)).into())
}

/// What is to be removed in a directory.
pub(super) fn names(directory: &Path) -> io::Result<Vec<OsString>> {
    let names = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name()));
    let is_left = |name: &OsString| name.to_str().is_some_and(|it| it.starts_with(PREFIX));
    names
        .filter(|name| name.as_ref().map_or(true, is_left))
        .collect()
}

/// Removes entries of a directory, on a thread of its own. What remains is for the next daemon.
pub(super) fn remove(directory: PathBuf, names: Vec<OsString>) {
    let path = directory.clone();
    let work = move || {
        if let Err(error) = remove_now(&directory, names, MOST_ENTRIES) {
            log::warn!(
                "{} holds what VMs left and is not empty: {error}",
                directory.display()
            );
        }
    };
    let spawned = std::thread::Builder::new()
        .name("remove".into())
        .spawn(work);
    if let Err(error) = spawned {
        log::warn!("cannot empty {}: {error}", path.display());
    }
}

fn remove_now(directory: &Path, names: Vec<OsString>, most: usize) -> io::Result<()> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(CWD, directory, flags, Mode::empty())?;
    let mut left = most;
    let mut result = Ok(());
    let mut names: Vec<CString> = names
        .into_iter()
        .filter_map(|name| CString::new(name.into_vec()).ok())
        .collect();
    while let Some(name) = names.pop() {
        match remove_one(directory.as_fd(), &name, &mut names, &mut left) {
            // Nothing more is removed then.
            Err(error) if left == 0 => return Err(error),
            Err(error) => result = Err(error),
            Ok(()) => {}
        }
    }
    result
}

/// Removes an entry of `top`. Directories in it come to `top` and to `names`.
fn remove_one(
    top: BorrowedFd<'_>,
    name: &CStr,
    names: &mut Vec<CString>,
    left: &mut usize,
) -> io::Result<()> {
    if unlink(top, name)? {
        return Ok(());
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // What is mounted there is none of ours, and may be a file system that never answers.
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV;
    let directory = rustix::fs::openat2(top, name, flags, Mode::empty(), resolve)?;
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let child = entry.file_name();
        if child == c"." || child == c".." {
            continue;
        }
        *left = left
            .checked_sub(1)
            .ok_or_else(|| io::Error::other("too many files"))?;
        if !unlink(directory.as_fd(), child)? {
            let name = CString::new(new_name()?.into_vec())?;
            rustix::fs::renameat(&directory, child, top, &name)?;
            names.push(name);
        }
    }
    // Another process of the user may have put something new into it.
    unlink(top, name)?;
    Ok(())
}

/// Removes a file or an empty directory; whether it is gone.
fn unlink(directory: BorrowedFd<'_>, name: &CStr) -> io::Result<bool> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(Errno::NOENT) => return Ok(true),
        result => return result.map(|()| true).map_err(Into::into),
    }
    match rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory in which `deep` is a chain of directories, deeper than any path can be.
    fn deep(levels: usize) -> tempfile::TempDir {
        let top = tempfile::tempdir_in("/dev/shm").unwrap();
        let open = |at: BorrowedFd<'_>, name: &str| {
            rustix::fs::openat(at, name, OFlags::DIRECTORY, Mode::empty()).unwrap()
        };
        let mut at = open(CWD, top.path().to_str().unwrap());
        for level in 0..levels {
            let name = if level == 0 { "deep" } else { "d" };
            rustix::fs::mkdirat(&at, name, Mode::RWXU).unwrap();
            let next = open(at.as_fd(), name);
            let flags = OFlags::CREATE | OFlags::WRONLY;
            rustix::fs::openat(&next, "file", flags, Mode::RWXU).unwrap();
            at = next;
        }
        top
    }

    #[test]
    fn depth_takes_neither_stack_nor_descriptors() {
        let top = deep(20_000);
        let remove = || remove_now(top.path(), vec!["deep".into()], MOST_ENTRIES);
        let small = std::thread::Builder::new().stack_size(128 << 10);
        std::thread::scope(|scope| small.spawn_scoped(scope, remove).unwrap().join())
            .unwrap()
            .unwrap();
        assert!(fs::read_dir(top.path()).unwrap().next().is_none());
    }

    #[test]
    fn what_is_too_much_is_left_for_later() {
        let top = deep(50);
        let error = remove_now(top.path(), vec!["deep".into()], 30).unwrap_err();
        assert!(error.to_string().contains("too many"), "{error}");
        let names = || {
            let mut names = names(top.path()).unwrap();
            names.push("deep".into());
            names
        };
        while fs::read_dir(top.path()).unwrap().next().is_some() {
            let _ = remove_now(top.path(), names(), 30);
        }
    }

    #[test]
    fn links_are_removed_and_not_followed() {
        let top = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        fs::write(other.path().join("kept"), "").unwrap();
        fs::create_dir(top.path().join("it")).unwrap();
        std::os::unix::fs::symlink(other.path(), top.path().join("it/link")).unwrap();
        remove_now(top.path(), vec!["it".into()], 10).unwrap();
        assert!(fs::read_dir(top.path()).unwrap().next().is_none());
        assert!(other.path().join("kept").exists());
    }
}
