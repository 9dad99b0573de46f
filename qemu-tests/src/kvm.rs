//! Whether this machine can really run KVM guests.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};

use crate::{
    artifacts::Artifacts,
    guest::{Accelerator, Config, Guest, Mode},
    initramfs, progress, workdir,
};

/// A kernel under KVM boots in a second or two.
const LIMIT: Duration = Duration::from_secs(30);

/// Fails with the reason when it cannot. `/dev/kvm` alone proves nothing: on some machines it runs only tiny guests.
pub fn probe(artifacts: &Artifacts) -> Result<()> {
    progress::now("boot a guest to see whether KVM works");
    ensure!(Path::new("/dev/kvm").exists(), "there is no /dev/kvm");
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("open /dev/kvm")?;
    let directory = workdir::create()?;
    let initramfs = directory.path().join("probe.cpio");
    initramfs::build_guest(artifacts, &[], &initramfs)?;
    let config = Config {
        name: "probe".to_owned(),
        mode: Mode::Agent,
        accelerator: Accelerator::Kvm,
        memory_mib: 256,
        cpus: 1,
        cpu: "host",
        kernel: artifacts.kernel.clone(),
        initramfs,
        disks: Vec::new(),
        kernel_arguments: String::new(),
        arguments: Vec::new(),
    };
    let mut guest = Guest::start(
        &config,
        Command::new(&artifacts.qemu),
        None,
        directory.path(),
    )?;
    guest.wait_agent(LIMIT).map(drop).map_err(|error| {
        let first = error
            .to_string()
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned();
        anyhow::anyhow!("a real kernel does not boot under /dev/kvm: {first}")
    })
}
