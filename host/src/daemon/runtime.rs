// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the daemon keeps on file systems, so that the next one can go on.
//!
//! ```text
//! RUNTIME/lock            held while a daemon runs
//! RUNTIME/admin.sock      for operators, mode 0600
//! RUNTIME/metrics.sock    for monitoring, mode 0600
//! RUNTIME/state.json      next VM number, what is paused
//! RUNTIME/records/N.json  one living VM each
//! RUNTIME/vms/N/          its sockets; belongs to the VM's user
//! RUNTIME/staging/        where sockets are made before they are moved into place, and where
//!                         what VMs leave is moved before it is removed
//! STORE/lock              held while a daemon runs; names the runtime directory
//! STORE/NAME.pages        the pages of one trust group
//! ```
//!
//! Records are not in the VM's own directory: its user could replace them, and choose a
//! trust group.

use super::error::DaemonError;
use super::leftover;
use super::limits::HostLimits;
use crate::protocol::{FileKey, Limits};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeSet;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::{fmt, fs};

/// Longest path of a socket, its final zero excluded.
const MAX_SOCKET_PATH: usize = 107;
/// Longest name of a socket below the runtime directory.
const LONGEST_SOCKET: &str = "/vms/4294967295/ivshmem.sock";
/// How often something is moved out of the way of one socket.
const TRIES: usize = 8;
pub(crate) const TMPFS_MAGIC: u64 = 0x0102_1994;

/// One VM, as the next daemon must know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VmRecord {
    pub(super) number: u32,
    pub(super) name: String,
    pub(super) group: Option<String>,
    pub(super) pid: i32,
    pub(super) start_time: u64,
    pub(super) uid: u32,
    pub(super) paused: bool,
    /// Whether it was told to turn everything back when it was paused.
    #[serde(default)]
    pub(super) undone: bool,
    /// Files that it does not share.
    #[serde(default)]
    pub(super) undone_files: Vec<UndoneFile>,
    /// Its own limits.
    #[serde(default)]
    pub(super) limits: Limits,
    /// Whether an engine has ever been told where the store is; only then can it map pages.
    pub(super) engine_seen: bool,
}

/// A file that the operator has undone, by what name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct UndoneFile {
    pub(super) file: FileKey,
    pub(super) name: String,
}

/// What does not belong to one VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) next_vm: u32,
    /// New VMs begin paused.
    pub(super) all_paused: bool,
    /// New VMs of these groups begin paused.
    pub(super) paused_groups: BTreeSet<String>,
    /// Files that new VMs of a group, or all with `None`, do not share.
    #[serde(default)]
    pub(super) undone_files: Vec<(Option<String>, UndoneFile)>,
    /// Limits of groups and of the VMs in them.
    #[serde(default)]
    pub(super) limits: HostLimits,
}

/// The runtime directory and the store directory, locked.
#[derive(Debug)]
pub(super) struct Runtime {
    directory: PathBuf,
    store: PathBuf,
    /// Whether VMs that live already get their sockets. Whatever their users do with their
    /// directories, the daemon starts: such a VM is only cut off from it.
    adopting: bool,
    _lock: fs::File,
    _store_lock: fs::File,
}

impl Runtime {
    pub(super) fn open(directory: &Path, store: &Path) -> Result<Self, DaemonError> {
        // A slash at the end would follow a link.
        let (directory, store): (PathBuf, PathBuf) = (
            directory.components().collect(),
            store.components().collect(),
        );
        let (directory, store) = (directory.as_path(), store.as_path());
        let max = MAX_SOCKET_PATH - LONGEST_SOCKET.len();
        if directory.as_os_str().len() > max {
            return Err(DaemonError::PathTooLong {
                path: directory.into(),
                max,
            });
        }
        let unusable = |source| DaemonError::RuntimeDirectory {
            path: directory.into(),
            source,
        };
        make_own_directory(directory, 0o755, unusable)?;
        for (name, mode) in [("vms", 0o755), ("records", 0o700), ("staging", 0o700)] {
            make_own_directory(&directory.join(name), mode, unusable)?;
        }
        let lock = lock(&directory.join("lock")).map_err(unusable)?;
        let lock = lock.ok_or_else(|| DaemonError::AlreadyRunning {
            path: directory.into(),
        })?;
        let store_lock = Self::open_store(directory, store)?;
        Ok(Self {
            directory: directory.into(),
            store: store.into(),
            adopting: false,
            _lock: lock,
            _store_lock: store_lock,
        })
    }

    fn open_store(directory: &Path, store: &Path) -> Result<fs::File, DaemonError> {
        let unusable = |source| DaemonError::StoreDirectory {
            path: store.into(),
            source,
        };
        make_own_directory(store, 0o700, unusable)?;
        let file_system = rustix::fs::statfs(store)
            .map_err(io::Error::from)
            .map_err(unusable)?;
        if file_system.f_type as u64 != TMPFS_MAGIC {
            return Err(DaemonError::NotTmpfs { path: store.into() });
        }
        let lock = lock(&store.join("lock")).map_err(unusable)?;
        let mut lock = lock.ok_or_else(|| DaemonError::AlreadyRunning { path: store.into() })?;
        // Pages of VMs that another runtime directory knows are none of ours. Without a name
        // their memory lives as long as those VMs.
        let mut owner = Vec::new();
        lock.read_to_end(&mut owner).map_err(unusable)?;
        let us = fs::canonicalize(directory).map_err(unusable)?;
        if owner != us.as_os_str().as_bytes() {
            for path in stores(store).map_err(unusable)? {
                fs::remove_file(path).map_err(unusable)?;
            }
            lock.set_len(0).map_err(unusable)?;
            lock.rewind().map_err(unusable)?;
            lock.write_all(us.as_os_str().as_bytes())
                .map_err(unusable)?;
        }
        Ok(lock)
    }

    /// Listens on a socket for the daemon's own user and root.
    pub(super) fn operator_socket(&self, name: &str) -> io::Result<UnixListener> {
        self.listen(
            &self.directory.join(name),
            rustix::process::geteuid().as_raw(),
        )
    }

    /// Begins or ends to make the sockets of VMs that live already.
    pub(super) fn set_adopting(&mut self, adopting: bool) {
        self.adopting = adopting;
    }

    /// Directory of a VM, made for `uid` if it is not there.
    pub(super) fn vm_directory(&self, number: u32, uid: u32) -> io::Result<PathBuf> {
        let path = self.directory.join("vms").join(number.to_string());
        let made = make_directory(&path, 0o700).and_then(|()| give_to(&path, uid));
        self.unless_cut_off(&path, made)?;
        Ok(path)
    }

    /// Listens on a socket that `uid` can connect to.
    pub(super) fn listen(&self, path: &Path, uid: u32) -> io::Result<UnixListener> {
        // Made where nobody else can interfere, then moved.
        let staging = self.directory.join("staging").join("socket");
        self.clear(&staging)?;
        let listener = UnixListener::bind(&staging)?;
        let made = rustix::fs::chmodat(
            rustix::fs::CWD,
            &staging,
            Mode::RUSR | Mode::WUSR,
            AtFlags::empty(),
        )
        .map_err(io::Error::from)
        .and_then(|()| give_to(&staging, uid))
        .and_then(|()| self.move_into_place(&staging, path));
        if made.is_err() {
            remove(&staging)?;
        }
        self.unless_cut_off(path, made)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    /// Moves a socket to where its user may have put a directory, and may do so again.
    fn move_into_place(&self, staging: &Path, path: &Path) -> io::Result<()> {
        for _ in 0..TRIES {
            match fs::rename(staging, path) {
                Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                    log::warn!("{} is in the way of a socket; removing it", path.display());
                    self.discard(path)?;
                }
                result => return result,
            }
        }
        fs::rename(staging, path)
    }

    /// Passes over what went wrong with a VM that is adopted, unless the daemon itself is short
    /// of something: then it had better not start than cut every VM off.
    fn unless_cut_off(&self, path: &Path, result: io::Result<()>) -> io::Result<()> {
        use rustix::io::Errno;
        let shortage = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
        match result {
            Err(error) if self.adopting && !shortage.contains(&errno(&error)) => {
                log::error!(
                    "cannot make {}: {error}; its VM keeps what it shares and shares nothing new \
                     until the daemon is started again",
                    path.display()
                );
                Ok(())
            }
            result => result,
        }
    }

    /// Makes a path in our own directories free.
    fn clear(&self, path: &Path) -> io::Result<()> {
        match remove(path) {
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => self.discard(path),
            result => result,
        }
    }

    /// Moves a file or a directory out of the way, and removes it meanwhile: how long that takes
    /// is up to whoever filled it.
    fn discard(&self, path: &Path) -> io::Result<()> {
        let staging = self.directory.join("staging");
        let name = leftover::new_name()?;
        match fs::rename(path, staging.join(&name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result?,
        }
        leftover::remove(staging, vec![name]);
        Ok(())
    }

    /// Removes what could not be removed so far.
    pub(super) fn remove_leftovers(&self) -> io::Result<()> {
        let staging = self.directory.join("staging");
        let names = leftover::names(&staging)?;
        if !names.is_empty() {
            leftover::remove(staging, names);
        }
        Ok(())
    }

    /// The state, as new if there is none or it is damaged.
    pub(super) fn state(&self) -> io::Result<State> {
        let path = self.directory.join("state.json");
        match read_json(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(State::default()),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                log::error!(
                    "{error}; what was paused, undone and limited for groups and new VMs is lost"
                );
                Ok(State::default())
            }
            state => state,
        }
    }

    pub(super) fn save_state(&self, state: &State) -> io::Result<()> {
        write_json(&self.directory.join("state.json"), state)
    }

    /// All records. One that cannot be read or understood is an error, not a VM that has ended:
    /// nobody knows which pages that VM maps.
    pub(super) fn records(&self) -> io::Result<Vec<VmRecord>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(self.directory.join("records"))? {
            let path = entry?.path();
            match path.extension().and_then(|it| it.to_str()) {
                Some("json") => records.push(read_record(&path)?),
                // Of a daemon that died while it wrote; what was before it is still there.
                Some("new") => remove(&path)?,
                _ => log::warn!("{} is no record and passed over", path.display()),
            }
        }
        records.sort_by_key(|record| record.number);
        Ok(records)
    }

    pub(super) fn save_record(&self, record: &VmRecord) -> io::Result<()> {
        write_json(&self.record(record.number), record)
    }

    /// Removes all that belongs to a VM.
    pub(super) fn remove_vm(&self, number: u32) {
        let directory = self.directory.join("vms").join(number.to_string());
        for result in [remove(&self.record(number)), self.discard(&directory)] {
            if let Err(error) = result {
                log::warn!("cannot remove what belonged to VM {number}: {error}");
            }
        }
    }

    /// Removes directories of VMs that are not in `living`.
    pub(super) fn remove_other_vms(&self, living: &BTreeSet<u32>) -> io::Result<()> {
        for entry in fs::read_dir(self.directory.join("vms"))? {
            let entry = entry?;
            let number = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if !number.is_some_and(|number| living.contains(&number)) {
                let path = entry.path();
                if let Err(error) = self.discard(&path) {
                    log::warn!("cannot remove {}: {error}", path.display());
                }
            }
        }
        Ok(())
    }

    /// Path of the pages of a group.
    pub(super) fn store_path(&self, group: &str) -> PathBuf {
        self.store.join(format!("{group}.pages"))
    }

    /// Removes the pages of groups that are not in `living`.
    pub(super) fn remove_other_stores(&self, living: &BTreeSet<PathBuf>) -> io::Result<()> {
        for path in stores(&self.store)? {
            if !living.contains(&path) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    fn record(&self, number: u32) -> PathBuf {
        self.directory
            .join("records")
            .join(format!("{number}.json"))
    }
}

fn stores(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "pages")
        {
            paths.push(path);
        }
    }
    Ok(paths)
}

fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if fs::symlink_metadata(path)?.is_dir() {
                Ok(())
            } else {
                Err(error)
            }
        }
        result => result,
    }
}

/// Makes a directory of the daemon's own. One that is there already is refused if anybody else may
/// have put something into it: who has the pages open can write to them whatever they become.
fn make_own_directory(
    path: &Path,
    mode: u32,
    unusable: impl Fn(io::Error) -> DaemonError,
) -> Result<(), DaemonError> {
    let found = make_directory(path, mode).and_then(|()| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(rustix::fs::fstat(&directory)?)
    });
    let found = found.map_err(unusable)?;
    let us = rustix::process::geteuid().as_raw();
    match foreign(found.st_uid, found.st_mode, &[us]) {
        Some(foreign) => Err(DaemonError::NotOurs {
            path: path.into(),
            cure: foreign.cure(path),
            found: foreign.to_string(),
        }),
        None => Ok(()),
    }
}

/// Why a directory is not the daemon's alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Foreign {
    /// It belongs to this user.
    Owner(u32),
    /// Its mode lets others write.
    Mode(u32),
}

impl Foreign {
    /// What to do about it.
    pub(crate) fn cure(&self, path: &Path) -> String {
        format!("{}, then: {}", self.advice(), self.command(path))
    }

    /// What only a person can do, before the command.
    pub(crate) fn advice(&self) -> &'static str {
        match self {
            Self::Owner(_) => "look who made it",
            Self::Mode(_) => "remove from it what you did not put there",
        }
    }

    /// The command that ends it.
    pub(crate) fn command(&self, path: &Path) -> String {
        let path = path.display();
        match self {
            Self::Owner(_) => format!("mv {path} {path}.foreign"),
            Self::Mode(_) => format!("chmod go-w {path}"),
        }
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owner(uid) => write!(f, "belongs to user {uid}"),
            Self::Mode(mode) => write!(f, "may be written by others (mode {mode:04o})"),
        }
    }
}

/// Whether anybody but these `users` may put something into a directory. Access control lists
/// show in the mode.
pub(crate) fn foreign(owner: u32, mode: u32, users: &[u32]) -> Option<Foreign> {
    if !users.contains(&owner) {
        Some(Foreign::Owner(owner))
    } else if mode & 0o022 != 0 {
        Some(Foreign::Mode(mode & 0o7777))
    } else {
        None
    }
}

fn give_to(path: &Path, uid: u32) -> io::Result<()> {
    let uid = rustix::fs::Uid::from_raw(uid);
    if uid == rustix::process::geteuid() {
        return Ok(());
    }
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    Ok(rustix::fs::chownat(
        rustix::fs::CWD,
        path,
        Some(uid),
        None,
        flags,
    )?)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn errno(error: &io::Error) -> rustix::io::Errno {
    rustix::io::Errno::from_raw_os_error(error.raw_os_error().unwrap_or_default())
}

/// Locks a file, unless somebody else has.
fn lock(path: &Path) -> io::Result<Option<fs::File>> {
    let flags = OFlags::NOFOLLOW.bits() as i32;
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)?;
    match rustix::fs::flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn read_record(path: &Path) -> io::Result<VmRecord> {
    let number = path.file_stem().and_then(|it| it.to_str()?.parse().ok());
    match read_json::<VmRecord>(path) {
        Ok(record) if number == Some(record.number) => Ok(record),
        Ok(record) => Err(unusable_record(&format!(
            "{} is the record of VM {}",
            path.display(),
            record.number
        ))),
        // Records are moved into place whole, so it is not what a daemon that died has left.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(unusable_record(&error.to_string()))
        }
        Err(error) => Err(error),
    }
}

fn unusable_record(what: &str) -> io::Error {
    let reason = format!(
        "{what}; start the version of the daemon that wrote it, or end that VM and remove the \
         file: its pages cannot be kept without it"
    );
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Reads a file; `InvalidData` if it is not what was written.
fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let bytes = fs::read(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let reason = format!("{} is damaged: {error}", path.display());
        io::Error::new(io::ErrorKind::InvalidData, reason)
    })
}

/// Writes a file so that it is there whole or not at all, whenever the daemon dies.
fn write_json<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)?;
    serde_json::to_writer(&mut file, value)?;
    drop(file);
    fs::rename(&new, path)
}
