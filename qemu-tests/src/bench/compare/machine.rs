//! Where it is measured.

use std::{fs, num::NonZero, process::Command};

use anyhow::{Context, Result};

use super::results::Machine;
use crate::{artifacts::Artifacts, guest::Accelerator, world::Host};

pub(super) fn describe(artifacts: &Artifacts, host: Host) -> Result<Machine> {
    let field = |path: &str, name: &str| -> Result<String> {
        let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
        let value = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| key.trim() == name)
            .map(|(_, value)| value.trim().to_owned());
        value.with_context(|| format!("{path} has no {name}"))
    };
    let memory = field("/proc/meminfo", "MemTotal")?;
    let memory: u64 = memory
        .trim_end_matches(" kB")
        .parse()
        .context("parse MemTotal")?;
    let huge = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .unwrap_or_else(|_| "[none]".to_owned());
    let huge = huge.split(['[', ']']).nth(1).unwrap_or_default().to_owned();
    Ok(Machine {
        processor: field("/proc/cpuinfo", "model name")?,
        cpus: std::thread::available_parallelism().map_or(1, NonZero::get),
        memory_mib: memory / 1024,
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        huge_pages: huge,
        guest_kernel: artifacts.kernel_release.clone(),
        qemu: artifacts.qemu_version()?,
        accelerator: accelerator(host).to_owned(),
        pagefusion: revision(),
    })
}

fn accelerator(host: Host) -> &'static str {
    match (host.accelerator, host.nested) {
        (Accelerator::Kvm, true) => "KVM on an emulated host",
        (Accelerator::Kvm, false) => "KVM",
        (Accelerator::Tcg | Accelerator::Counted, _) => "TCG",
    }
}

/// The commit of the checkout this runs in, where there is one.
pub(super) fn revision() -> String {
    let output = Command::new("git")
        .args(["describe", "--always", "--dirty"])
        .output();
    match output {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => env!("CARGO_PKG_VERSION").to_owned(),
    }
}

impl Machine {
    /// Whether both can stand in one table.
    pub(super) fn same_host(&self, other: &Self) -> bool {
        let key = |machine: &Self| Self {
            pagefusion: String::new(),
            ..machine.clone()
        };
        key(self) == key(other)
    }
}
