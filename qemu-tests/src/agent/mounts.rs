//! Mounting and unmounting, and the files that only live in memory.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::OpenOptionsExt,
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount_remount, unmount},
};

use super::{files, held::Held};
use crate::protocol::{MountSpec, Unmounts};

/// The word that makes this program map a file and end.
pub const TOUCH: &str = "touch";

/// Mounts what is described; the directory is made.
pub(super) fn mount(spec: &MountSpec) -> Result<()> {
    fs::create_dir_all(&spec.target).with_context(|| format!("create {}", spec.target))?;
    let data = std::ffi::CString::new(spec.data.as_str())?;
    let flags = MountFlags::empty();
    let (source, target) = (&*spec.source, &*spec.target);
    rustix::mount::mount(source, target, &*spec.kind, flags, Some(data.as_c_str()))
        .with_context(|| format!("mount {spec:?}"))
}

/// Makes a mounted file system read-only, or writable again.
pub(super) fn remount(target: &str, readonly: bool) -> Result<()> {
    let flags = if readonly {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    mount_remount(target, flags, c"").with_context(|| format!("remount {target}"))
}

/// `umount`, once.
pub(super) fn unmount_once(target: &str) -> Result<()> {
    unmount(target, UnmountFlags::empty()).with_context(|| format!("unmount {target}"))
}

/// Mounts, lets a process map a file and end, unmounts at once; again and again.
pub(super) fn unmount_often(spec: &MountSpec, file: &str, rounds: u32) -> Result<Unmounts> {
    let mut result = Unmounts::default();
    for _ in 0..rounds {
        mount(spec)?;
        let status = Command::new("/proc/self/exe")
            .args([TOUCH, file])
            .status()
            .context("start a process that maps a file")?;
        ensure!(status.success(), "the process that maps {file} failed");
        let start = Instant::now();
        loop {
            match unmount(&*spec.target, UnmountFlags::empty()) {
                Ok(()) => break,
                Err(Errno::BUSY) => result.busy += 1,
                Err(error) => return Err(error).context("unmount"),
            }
        }
        let took = start.elapsed().as_micros() as u64;
        result.longest_us = result.longest_us.max(took);
        result.total_us += took;
        // Synchronous means that the device is free now.
        File::options()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(&spec.source)
            .with_context(|| format!("{} is still in use after the unmount", spec.source))?;
    }
    Ok(result)
}

/// Maps a file, touches all of it, and nothing else.
pub fn touch(path: &str) -> Result<()> {
    let _sum = Held::map(path)?.sha256();
    Ok(())
}

/// Reads a file from its start to its end, by `read` alone.
pub(super) fn read_through(path: &str, times: u32) -> Result<()> {
    let mut buffer = vec![0; 256 << 10];
    for _ in 0..times {
        let mut file = File::open(path).with_context(|| format!("open {path}"))?;
        while file.read(&mut buffer).context("read")? > 0 {}
    }
    Ok(())
}

/// Makes files of one page each, read as often as what is used.
pub(super) fn many_files(directory: &str, seed: u64, files: u64) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("create {directory}"))?;
    for number in 0..files {
        let path = format!("{directory}/{number}");
        let file = File::create(&path).with_context(|| format!("create {path}"))?;
        files::fill(&file, seed + number, 0, 4096).with_context(|| format!("write {path}"))?;
        drop(file);
        read_through(&path, 4)?;
    }
    Ok(())
}

/// A memfd with pattern bytes in it, mapped read-only.
pub(super) fn memory(name: &str, seed: u64, bytes: u64, sealed: bool) -> Result<Held> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file: File = memfd_create(name, flags).context("memfd_create")?.into();
    files::fill(&file, seed, 0, bytes)?;
    if sealed {
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
        fcntl_add_seals(&file, seals).context("seal")?;
    }
    Held::of(&file, 0, bytes)
}
