// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is so on this host, as far as sharing depends on it.

use super::doctor::NEW_KERNEL;
use super::launch::find_preload;
use crate::engine::{Uffd, UffdError};
use crate::protocol::{AdminClient, AdminError};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The file system that holds the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tmpfs {
    /// The nearest directory there is.
    pub path: PathBuf,
    /// Whether it is a tmpfs.
    pub is_tmpfs: bool,
    /// Its size, bytes.
    pub bytes: u64,
    /// What is free of it, bytes.
    pub free: u64,
    /// What its files have large folios for (`huge=` of its mount), if that could be found out.
    pub huge: Option<String>,
    /// Of a store directory that is there: what lets others write to it, and how to end that.
    pub foreign: Option<(String, String)>,
}

/// Why the daemon, or the kernel, does not do what is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoAnswer {
    /// Why.
    pub reason: String,
    /// The command that mends it.
    pub cure: &'static str,
}

impl From<AdminError> for NoAnswer {
    fn from(error: AdminError) -> Self {
        let cure = match error {
            AdminError::NotRunning(_) => "systemctl start pagefusiond",
            AdminError::NotAllowed(_) => "sudo pagefusionctl doctor",
            // One of another version, or one that is not well.
            _ => "systemctl restart pagefusiond",
        };
        Self {
            reason: error.to_string(),
            cure,
        }
    }
}

impl From<UffdError> for NoAnswer {
    fn from(error: UffdError) -> Self {
        let cure = match &error {
            UffdError::Open(source) if source.kind() == std::io::ErrorKind::PermissionDenied => {
                "sudo pagefusionctl doctor"
            }
            // Debian's has all that is asked for.
            _ => NEW_KERNEL,
        };
        Self {
            reason: error.to_string(),
            cure,
        }
    }
}

/// What was found. What could not be found out is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Release of the kernel.
    pub kernel: String,
    /// Whether `userfaultfd` does all that is needed, or why not.
    pub userfaultfd: Option<Result<(), NoAnswer>>,
    /// Permission bits of `/dev/userfaultfd`.
    pub userfaultfd_mode: Option<u32>,
    /// `vm.max_map_count`
    pub max_map_count: Option<u64>,
    /// `vm.overcommit_memory`
    pub overcommit_memory: Option<u64>,
    /// The word in brackets of `transparent_hugepage/enabled`.
    pub huge_pages: Option<String>,
    /// `ksm/run`
    pub ksm: Option<u64>,
    /// Whether the kernel counts who waits for memory.
    pub pressure: Option<bool>,
    /// Memory of the host, bytes.
    pub memory: Option<u64>,
    /// Where the store is.
    pub store: Option<Tmpfs>,
    /// QEMU's first line of `--version`, or why it could not be had.
    pub qemu: Option<Result<String, String>>,
    /// Whether QEMU has `ivshmem-doorbell`.
    pub ivshmem: Option<bool>,
    /// The preload library, or why it was not found.
    pub preload: Option<Result<PathBuf, String>>,
    /// Version of the daemon, or why it does not answer.
    pub daemon: Option<Result<String, NoAnswer>>,
}

impl Facts {
    /// Looks at this host.
    pub fn gather(
        runtime_dir: &Path,
        store_dir: &Path,
        qemu: &OsStr,
        preload: Option<&Path>,
    ) -> Self {
        let version = output(qemu, &["--version"]);
        let devices = version.is_ok().then(|| output(qemu, &["-device", "help"]));
        let daemon = AdminClient::connect(runtime_dir).and_then(|mut it| it.status());
        Self {
            kernel: rustix::system::uname().release().to_string_lossy().into(),
            userfaultfd: Some(Uffd::open(None).map(drop).map_err(NoAnswer::from)),
            userfaultfd_mode: mode(Path::new("/dev/userfaultfd")),
            max_map_count: number("/proc/sys/vm/max_map_count"),
            overcommit_memory: number("/proc/sys/vm/overcommit_memory"),
            huge_pages: fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
                .ok()
                .and_then(|text| chosen(&text)),
            ksm: number("/sys/kernel/mm/ksm/run"),
            pressure: Some(
                fs::read_to_string("/proc/pressure/memory")
                    .is_ok_and(|text| text.starts_with("some ")),
            ),
            memory: fs::read_to_string("/proc/meminfo")
                .ok()
                .and_then(|text| total_memory(&text)),
            store: store(store_dir),
            ivshmem: devices
                .map(|text| text.is_ok_and(|text| text.contains("\"ivshmem-doorbell\""))),
            qemu: Some(version.map(|text| text.lines().next().unwrap_or_default().to_owned())),
            preload: Some(find_preload(preload).map_err(|error| error.to_string())),
            daemon: Some(daemon.map(|it| it.version).map_err(NoAnswer::from)),
        }
    }
}

fn output(program: &OsStr, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output();
    match output {
        Ok(output) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        }
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn mode(path: &Path) -> Option<u32> {
    use std::os::unix::fs::PermissionsExt;
    Some(fs::metadata(path).ok()?.permissions().mode() & 0o777)
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The one of several words that is in brackets.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|it| it.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The store directory may not be there before the first daemon.
fn store(directory: &Path) -> Option<Tmpfs> {
    let path = directory.ancestors().find(|path| path.is_dir())?;
    let found = rustix::fs::statfs(path).ok()?;
    let block = found.f_bsize as u64;
    Some(Tmpfs {
        path: path.to_owned(),
        is_tmpfs: found.f_type as u64 == crate::daemon::TMPFS_MAGIC,
        bytes: found.f_blocks * block,
        free: found.f_bavail * block,
        huge: huge_of(path),
        foreign: if path == directory {
            foreign_store(path)
        } else {
            None
        },
    })
}

/// The option `huge` of the mount that holds `path`: `never` where it has none.
fn huge_of(path: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let device = fs::metadata(path).ok()?.dev();
    let device = (rustix::fs::major(device), rustix::fs::minor(device));
    huge_in(&fs::read_to_string("/proc/self/mountinfo").ok()?, device)
}

fn huge_in(mountinfo: &str, (major, minor): (u32, u32)) -> Option<String> {
    let device = format!("{major}:{minor}");
    let is_it = |line: &&str| line.split(' ').nth(2) == Some(&device);
    let (_, options) = mountinfo.lines().find(is_it)?.rsplit_once(' ')?;
    let huge = options.split(',').find_map(|it| it.strip_prefix("huge="));
    Some(huge.unwrap_or("never").to_owned())
}

/// The daemon runs as root or, where somebody tries it, as whoever asks.
fn foreign_store(path: &Path) -> Option<(String, String)> {
    use std::os::unix::fs::MetadataExt;
    let found = fs::symlink_metadata(path).ok()?;
    let users = [0, rustix::process::geteuid().as_raw()];
    let foreign = crate::daemon::foreign(found.uid(), found.mode(), &users)?;
    let found = format!("{foreign} ({})", foreign.advice());
    Some((found, foreign.command(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_kernel_are_read() {
        assert_eq!(chosen("always [madvise] never\n").unwrap(), "madvise");
        let meminfo = "MemFree:  1 kB\nMemTotal:       24575472 kB\n";
        assert_eq!(total_memory(meminfo), Some(24_575_472 << 10));
        assert_eq!(total_memory("MemTotal: many"), None);
    }

    #[test]
    fn large_folios_of_a_tmpfs_are_read_from_its_mount() {
        let mountinfo = "22 1 0:21 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n\
                         30 24 0:26 / /dev/shm rw,nosuid - tmpfs tmpfs rw,size=8388608k\n\
                         41 30 0:40 / /dev/shm/pagefusion rw - tmpfs tmpfs rw,mode=700,huge=within_size\n";
        let huge = |device| huge_in(mountinfo, device);
        assert_eq!(huge((0, 26)).as_deref(), Some("never"));
        assert_eq!(huge((0, 40)).as_deref(), Some("within_size"));
        assert_eq!(huge((0, 99)), None);
        assert!(huge_of(Path::new("/dev/shm")).is_some());
    }

    #[test]
    fn the_store_is_looked_for_where_it_will_be() {
        let found = store(Path::new("/dev/shm/none/of/these")).unwrap();
        assert_eq!(found.path, Path::new("/dev/shm"));
        assert!(found.is_tmpfs && found.free <= found.bytes);
        // That one is for everybody to write to, and not the store.
        assert_eq!(found.foreign, None);
    }

    #[test]
    fn a_store_that_others_may_write_is_found() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path();
        assert_eq!(store(path).unwrap().foreign, None);
        fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
        let (found, cure) = store(path).unwrap().foreign.unwrap();
        assert!(found.contains("0777"), "{found}");
        assert!(cure.contains("chmod go-w"), "{cure}");
    }

    #[test]
    fn a_program_that_is_not_there_is_no_panic() {
        let directory = tempfile::tempdir().unwrap();
        let nowhere = directory.path().join("nowhere");
        let facts = Facts::gather(&nowhere, &nowhere, nowhere.as_os_str(), Some(&nowhere));
        assert!(facts.qemu.unwrap().is_err());
        assert!(
            facts
                .daemon
                .unwrap()
                .unwrap_err()
                .reason
                .contains("systemctl start")
        );
        assert!(facts.preload.unwrap().is_err());
        assert_eq!(facts.ivshmem, None);
        assert!(facts.max_map_count.is_some());
    }
}
