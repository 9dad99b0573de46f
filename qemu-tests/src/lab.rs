//! A host with real KVM on a machine without: TCG emulates a CPU with SVM and nested paging, a stock kernel and QEMU
//! run on it, and in that the same harness starts KVM guests.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    artifacts::Artifacts,
    guest::{Accelerator, Config, Guest, Mode},
    initramfs, progress,
    protocol::Op,
    workdir,
};

/// Where the lab host mounts its payload; `pf-init` knows it too.
const PAYLOAD: &str = "/run/pagefusion";
/// The guest image is the lab host's third disk.
const GUEST_DISK: &str = "/dev/vdc";
/// The whole run inside.
const LIMIT: Duration = Duration::from_secs(15 * 60);
/// The harness inside says every few seconds that it is alive. A lab host that says nothing for so long stands still.
const SILENCE: Duration = Duration::from_secs(90);
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// Our programs that run inside.
const PROGRAMS: [&str; 5] = [
    "qemu-tests",
    "pagefusiond",
    "pagefusionctl",
    "libpagefusion_preload.so",
    "pf-init",
];
/// The library's example: a VMM of two guests, which needs nothing but KVM.
const EXAMPLE: &str = "two_guests";

/// Ordinary scenarios in which what KVM does to memory, or knows of it, matters, or QEMU's version, which is another one in
/// the lab. It can play others as well: `qemu-tests lab-host test --host kvm NAME`.
pub const SCENARIOS: [&str; 2] = [
    "memory_plugged_in_and_pulled_out",
    "machines_of_every_kind_share",
];
/// Drivers that a guest of some scenario needs; all have the same initramfs.
const DRIVERS: [&str; 2] = ["virtio_balloon", "virtio_mem"];
/// What scenarios inside need of the file systems that were made.
const FILESYSTEMS: [&str; 2] = ["files.sha256", "images/ext4"];

/// A running lab host.
#[derive(Debug)]
pub struct Lab {
    host: Guest,
    _directory: tempfile::TempDir,
}

impl Lab {
    /// Boots it with everything the harness inside needs.
    pub fn start(artifacts: &Artifacts, logs: Option<&Path>) -> Result<Self> {
        let image = artifacts
            .lab_image
            .clone()
            .context("there is no image of the lab host")?;
        let kernel = artifacts
            .lab_kernel
            .clone()
            .context("there is no kernel for the lab host")?;
        let directory = workdir::create()?;
        let logs = logs.unwrap_or(directory.path()).to_owned();
        fs::create_dir_all(&logs).with_context(|| format!("create {}", logs.display()))?;
        let payload = payload(artifacts, directory.path())?;
        let initramfs = directory.path().join("lab.cpio");
        initramfs::build_lab(artifacts, &initramfs)?;
        let config = Config {
            name: "lab".to_owned(),
            mode: Mode::Lab,
            accelerator: Accelerator::Tcg,
            memory_mib: 6144,
            // With two, QEMU 10.0 resets the lab host or a guest in it every few minutes, whether memory is shared or
            // not: its emulation of SVM does not stand several CPU threads.
            cpus: 1,
            // Without five-level page tables: every level is walked twice, and in software.
            cpu: "max,svm=on,npt=on,la57=off",
            kernel,
            initramfs,
            disks: vec![image, payload, artifacts.guest_image.clone()],
            kernel_arguments: String::new(),
            arguments: Vec::new(),
        };
        let mut host = Guest::start(&config, Command::new(&artifacts.qemu), None, &logs)?;
        host.wait_agent(BOOT_LIMIT).context("boot the lab host")?;
        Ok(Self {
            host,
            _directory: directory,
        })
    }

    /// Runs the harness inside with `arguments`; its lines go to `output`. Returns its exit status.
    pub fn run(&mut self, arguments: &[&str], mut output: impl FnMut(&str)) -> Result<i32> {
        let program = format!("{PAYLOAD}/bin/qemu-tests");
        let description = format!("{PAYLOAD}/artifacts.json");
        let own = [&*program, "--artifacts", &description, "--nested"];
        let words = own.iter().chain(arguments);
        let argv = words.map(|&word| word.to_owned()).collect();
        self.stream(argv, &mut output)
    }

    /// Whether the library's example has been built, which no build of the workspace does.
    pub fn has_example(artifacts: &Artifacts) -> bool {
        example(artifacts).is_ok()
    }

    /// Runs the library's example inside; its lines go to `output`. Returns its exit status.
    pub fn run_example(&mut self, mut output: impl FnMut(&str)) -> Result<i32> {
        self.stream(vec![format!("{PAYLOAD}/bin/{EXAMPLE}")], &mut output)
    }

    fn stream(&mut self, argv: Vec<String>, output: &mut dyn FnMut(&str)) -> Result<i32> {
        let mut at = "its start".to_owned();
        let relay = |line: &str| match line.strip_prefix(progress::ALIVE) {
            Some(what) => what.trim().clone_into(&mut at),
            None => output(line),
        };
        let outcome = self.host.stream(argv, LIMIT, SILENCE, relay);
        let outcome = outcome.with_context(|| format!("the lab, at: {at}"))?;
        ensure!(
            !outcome.timed_out,
            "the run in the lab took longer than {LIMIT:?}, at last: {at}"
        );
        outcome.status.context("what ran in the lab was killed")
    }

    /// Reads a file the harness inside wrote.
    pub fn read(&mut self, path: &str) -> Result<String> {
        self.host.request(Op::Read {
            path: path.to_owned(),
        })
    }
}

/// Where cargo puts the example.
fn example(artifacts: &Artifacts) -> Result<PathBuf> {
    artifacts.program(&format!("examples/{EXAMPLE}"))
}

/// A disk with our programs, the guests' kernel and a description of both, made without mounting anything.
fn payload(artifacts: &Artifacts, directory: &Path) -> Result<PathBuf> {
    let staging = directory.join("payload");
    fs::create_dir_all(staging.join("bin")).context("create the payload")?;
    for name in PROGRAMS {
        copy(&artifacts.program(name)?, &staging.join("bin").join(name))?;
    }
    if let Ok(example) = example(artifacts) {
        copy(&example, &staging.join("bin").join(EXAMPLE))?;
    }
    copy(&artifacts.kernel, &staging.join("vmlinuz"))?;
    copy(&artifacts.guest_manifest, &staging.join("manifest"))?;
    initramfs::build_guest(artifacts, &DRIVERS, &staging.join("guest.cpio"))?;
    let filesystems = artifacts.filesystems.as_deref();
    if let Some(made) = filesystems {
        let target = staging.join("filesystems");
        fs::create_dir_all(target.join("images")).context("create the payload")?;
        for file in FILESYSTEMS {
            copy(&made.join(file), &target.join(file))?;
        }
    }
    let inside = |name: &str| Path::new(PAYLOAD).join(name);
    let description = Artifacts {
        kernel: inside("vmlinuz"),
        guest_initramfs: Some(inside("guest.cpio")),
        guest_manifest: inside("manifest"),
        guest_image: GUEST_DISK.into(),
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        older_qemu: None,
        bin_dir: Some(inside("bin")),
        filesystems: filesystems.map(|_| inside("filesystems")),
        lab_image: None,
        lab_kernel: None,
        lab_modules_dir: None,
        ..artifacts.clone()
    };
    fs::write(
        staging.join("artifacts.json"),
        serde_json::to_vec_pretty(&description)?,
    )
    .context("describe the payload")?;

    let disk = directory.join("payload.ext4");
    // Sparse: what the file system does not use takes no room.
    let size = 2 * bytes_below(&staging)? + (64 << 20);
    fs::File::create(&disk)
        .and_then(|file| file.set_len(size))
        .context("create the payload's disk")?;
    let arguments = [
        OsStr::new("-q"),
        "-F".as_ref(),
        "-O".as_ref(),
        "^has_journal".as_ref(),
        "-d".as_ref(),
    ];
    let output = Command::new("/sbin/mkfs.ext4")
        .args(arguments)
        .args([&staging, &disk])
        .stdin(Stdio::null())
        .output()
        .context("run mkfs.ext4")?;
    if !output.status.success() {
        bail!(
            "mkfs.ext4: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    fs::remove_dir_all(&staging).context("remove the staged payload")?;
    Ok(disk)
}

/// Size of all files below a directory.
fn bytes_below(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).context("measure the payload")? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() {
            bytes_below(&entry.path())?
        } else {
            metadata.len()
        };
    }
    Ok(bytes)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .map(drop)
        .with_context(|| format!("copy {} to the payload", from.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenarios;

    #[test]
    fn what_runs_inside_is_one_scenario_each() {
        for name in SCENARIOS {
            let chosen = scenarios::ALL.iter().filter(|it| it.name.contains(name));
            let chosen: Vec<_> = chosen.map(|scenario| scenario.name).collect();
            assert_eq!(chosen, [name]);
        }
    }
}
