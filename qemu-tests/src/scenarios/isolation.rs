//! Where there is nothing to share with, everything is as it was before.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, ensure};

use super::Stage;
use crate::{guest::Guest, integrity::Integrity, protocol::Op, world::World};

const PCI: &str = "/sys/bus/pci";

pub(super) fn qemu_runs_without_a_daemon(stage: &mut Stage) -> Result<()> {
    let launcher = stage.world.site.preloaded(&stage.world.artifacts.qemu);
    let mut guest = stage.world.start_small(launcher, &[])?;
    // No device: the module has nothing to drive and does no harm.
    guest.load_hurried_module()?;
    ensure!(
        bound(&mut guest)?.is_empty(),
        "the module drives a device that is not there"
    );
    guest.unload_module()?;
    guest.healthy()?;
    guest.kill()
}

pub(super) fn module_leaves_foreign_ivshmem(stage: &mut Stage) -> Result<()> {
    let launcher = Command::new(&stage.world.artifacts.qemu);
    let arguments = [
        "-object",
        "memory-backend-ram,id=foreign,size=1M,share=on",
        "-device",
        "ivshmem-plain,memdev=foreign",
    ];
    let mut guest = stage.world.start_small(launcher, &arguments)?;
    let devices: Vec<String> = guest.request(Op::List {
        path: format!("{PCI}/devices"),
    })?;
    let mut foreign = None;
    for device in devices {
        let id: String = guest.request(Op::Read {
            path: format!("{PCI}/devices/{device}/device"),
        })?;
        if id.trim() == "0x1110" {
            foreign = Some(device);
        }
    }
    ensure!(
        foreign.is_some(),
        "the guest does not see the ivshmem device"
    );
    guest.load_hurried_module()?;
    ensure!(
        bound(&mut guest)?.is_empty(),
        "the module took a device that is not ours"
    );
    guest.unload_module()?;
    guest.healthy()?;
    guest.kill()
}

/// What tells the kernel that its memory is encrypted, and whose processor does it.
const VENDOR: &str = "cc_vendor";
/// `CC_VENDOR_NONE`, `CC_VENDOR_INTEL`: TDX.
const NONE: [u8; 4] = [0, 0, 0, 0];
const INTEL: [u8; 4] = [2, 0, 0, 0];

/// No such guest can be had here, so an ordinary one is made to believe that it is one.
pub(super) fn module_refuses_confidential_guests(stage: &mut Stage) -> Result<()> {
    let others = std::mem::take(&mut stage.world.guests);
    let played = refused_by_confidential_guest(&mut stage.world);
    stage.world.guests = others;
    played
}

fn refused_by_confidential_guest(world: &mut World) -> Result<()> {
    world.start_files(1, "")?;
    let socket = world.directory().join("debugger");
    let guest = &mut world.guests[0];
    guest.wait_agent(world.limits.boot)?;
    let found = guest.output(&["grep", "-w", VENDOR, "/proc/kallsyms"])?;
    let address = found.split_whitespace().next().context("no such symbol")?;
    let address = u64::from_str_radix(address, 16)?;

    guest.poke(&socket, address, &INTEL)?;
    let refused = guest.load_module();
    guest.poke(&socket, address, &NONE)?;
    let error = refused.err().context("it was loaded")?.to_string();
    ensure!(error.contains("not supported"), "refused with: {error}");
    let log = guest.output(&["dmesg"])?;
    let said = "pagefusion: refused: this guest's memory is encrypted (SEV, TDX)";
    ensure!(log.contains(said), "the log does not say why:\n{log}");
    guest.load_module()?;
    guest.unload_module()?;
    guest.healthy()?;
    guest.kill()
}

/// The devices our driver is bound to.
fn bound(guest: &mut Guest) -> Result<Vec<String>> {
    let drivers: Vec<String> = guest.request(Op::List {
        path: format!("{PCI}/drivers"),
    })?;
    let driver = drivers
        .into_iter()
        .find(|name| name.contains("pagefusion"))
        .context("the module has no PCI driver")?;
    let mut entries: Vec<String> = guest.request(Op::List {
        path: format!("{PCI}/drivers/{driver}"),
    })?;
    entries.retain(|entry| entry.contains(':'));
    Ok(entries)
}

pub(super) fn host_side_gone(stage: &mut Stage) -> Result<()> {
    stage.world.daemon.take().context("no daemon")?.kill()?;
    let guest = stage.world.guests.first_mut().context("no guest")?;
    // The module goes on, finds nobody, and can be taken out and put in again.
    guest.request::<serde_json::Value>(Op::Evict)?;
    guest.unload_module()?;
    guest.load_hurried_module()?;
    let mut integrity = Integrity::default();
    integrity.mapped_files(guest, &stage.world.manifest)?;
    integrity.services(guest, stage.world.load)?;
    integrity.verdict()?;
    guest.unload_module()?;
    // Who would answer may be gone before.
    let _unanswered = guest.begin(Op::Run {
        argv: ["systemctl", "poweroff", "--force"]
            .map(str::to_owned)
            .into(),
        timeout_ms: 60_000,
        stream: false,
    })?;
    guest.wait_end(Duration::from_secs(60))?;
    stage.world.guests.clear();
    Ok(())
}
