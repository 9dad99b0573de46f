//! Swapping, and other kernels in place of this one.
#![expect(
    unsafe_code,
    reason = "system calls for which there is no safe wrapper"
)]

use std::{ffi::CString, fs, fs::File, os::fd::AsRawFd, path::Path};

use anyhow::{Context, Result, ensure};
use rustix::{
    param::page_size,
    system::{RebootCommand, reboot},
};

use crate::protocol::NextKernel;

/// Makes a disk swap space and swaps to it. What was written there before, a hibernated machine even, is gone.
pub(super) fn swap_on(device: &str) -> Result<()> {
    let pages = blocks(device)? * 512 / page_size() as u64;
    let last = u32::try_from(pages.saturating_sub(1))?;
    // `union swap_header`: version, last page, number of bad pages; the signature ends the page.
    let mut header = vec![0; page_size()];
    header[1024..1028].copy_from_slice(&1_u32.to_le_bytes());
    header[1028..1032].copy_from_slice(&last.to_le_bytes());
    let end = header.len();
    header[end - 10..].copy_from_slice(b"SWAPSPACE2");
    fs::write(device, &header).with_context(|| format!("write {device}"))?;
    let path = CString::new(device)?;
    // SAFETY: a path that ends with a zero, and no flags.
    let result = unsafe { libc::swapon(path.as_ptr(), 0) };
    ensure!(
        result == 0,
        "swap to {device}: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// Length of a disk in sectors.
fn blocks(device: &str) -> Result<u64> {
    let name = Path::new(device).file_name().context("no disk")?;
    let path = Path::new("/sys/class/block").join(name).join("size");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    text.trim().parse().context("size of a disk")
}

/// Starts another kernel. Returns only when that failed.
pub(super) fn kexec(next: &NextKernel) -> Result<()> {
    // The kernel reads regular files only.
    let copy = |from: &str, bytes: u64, to: &str| -> Result<File> {
        let mut source = File::open(from).with_context(|| format!("open {from}"))?;
        let mut target = File::create(to).with_context(|| format!("create {to}"))?;
        let mut part = std::io::Read::take(&mut source, bytes);
        let copied = std::io::copy(&mut part, &mut target).context("copy a kernel")?;
        ensure!(copied == bytes, "{from} has {copied} of {bytes} bytes");
        drop(target);
        File::open(to).with_context(|| format!("open {to}"))
    };
    let kernel = copy(&next.kernel, next.kernel_bytes, "/tmp/kernel")?;
    let initramfs = copy(&next.initramfs, next.initramfs_bytes, "/tmp/initramfs")?;
    let running = fs::read_to_string("/proc/cmdline").context("read the kernel command line")?;
    let arguments = CString::new(running.trim_end())?;
    // SAFETY: open files, and the command line with its final zero, as the length says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            arguments.as_bytes_with_nul().len(),
            arguments.as_ptr(),
            0,
        )
    };
    ensure!(
        result == 0,
        "load a kernel: {}",
        std::io::Error::last_os_error()
    );
    for path in ["/tmp/kernel", "/tmp/initramfs"] {
        fs::remove_file(path).with_context(|| format!("delete {path}"))?;
    }
    reboot(RebootCommand::Kexec).context("start the kernel")
}
