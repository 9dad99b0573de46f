//! Another kernel in place of this one.
#![expect(
    unsafe_code,
    reason = "kexec_file_load, for which there is no safe wrapper"
)]

use std::{ffi::CString, fs, fs::File, os::fd::AsRawFd};

use anyhow::{Context, Result, ensure};
use rustix::system::{RebootCommand, reboot};

use crate::protocol::NextKernel;

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
