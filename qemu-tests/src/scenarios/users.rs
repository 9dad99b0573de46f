//! QEMU as an ordinary user.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::{
    Skip, Stage,
    shared_files::{SharedFiles, with_disk},
};
use crate::world::{KERNEL, Small, World};

/// `nobody`
const USER: u32 = 65534;
/// Whether users who are not root may have their own `userfaultfd`.
const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// The kernel gives such a QEMU no `userfaultfd`: it has that which the daemon has opened.
pub(super) fn a_qemu_of_an_ordinary_user_shares(stage: &mut Stage) -> Result<()> {
    let allowed = fs::read_to_string(SYSCTL).with_context(|| SYSCTL.to_owned())?;
    if allowed.trim() != "0" {
        let why = "vm.unprivileged_userfaultfd is not 0: every user has a userfaultfd";
        return Err(Skip(why.to_owned()).into());
    }
    let seed = stage.seed();
    let directory = readable(&stage.world)?;
    let mut small = with_disk(&stage.world)?;
    for disk in &mut small.disks {
        *disk = copy(disk, &directory)?;
    }
    let small = Small {
        user: Some((USER, directory)),
        ..small
    };
    stage.with_small_pair(&small, |world| {
        for guest in &world.guests {
            is_ordinary(guest.pid())?;
        }
        let mut files = SharedFiles::hold(world, seed)?;
        files.are_right(world)?;
        files.are_undone_and_shared_again(world)?;
        files.add(world)?;
        files.are_right(world)
    })
}

/// A directory with all that another user needs.
fn readable(world: &World) -> Result<PathBuf> {
    let directory = world.directory();
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
    let made = directory.join("readable");
    fs::create_dir_all(&made)?;
    fs::set_permissions(&made, fs::Permissions::from_mode(0o755))?;
    let kernel = copy(&world.artifacts.kernel, &made)?;
    fs::rename(kernel, made.join(KERNEL))?;
    copy(world.site.preload(), &made)?;
    fs::set_permissions(world.initramfs(), fs::Permissions::from_mode(0o644))?;
    Ok(made)
}

fn copy(from: &Path, directory: &Path) -> Result<PathBuf> {
    let name = from.file_name().context("a file without a name")?;
    let to = directory.join(name);
    fs::copy(from, &to).with_context(|| format!("copy {}", from.display()))?;
    fs::set_permissions(&to, fs::Permissions::from_mode(0o644))?;
    Ok(to)
}

/// The process is this user's and may do nothing that such a user may not.
fn is_ordinary(pid: u32) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.with_context(|| format!("process {pid} has no {name}"))
    };
    let mut users = field("Uid:")?.split_whitespace();
    ensure!(
        users.all(|user| user == USER.to_string()),
        "QEMU is not user {USER}: {status}"
    );
    let capabilities = u64::from_str_radix(field("CapEff:")?.trim(), 16)?;
    ensure!(capabilities == 0, "QEMU has capabilities {capabilities:#x}");
    Ok(())
}
