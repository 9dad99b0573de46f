//! What provisioning made: the paths of everything the tests boot and run.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// The description that provisioning writes, one JSON object.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Artifacts {
    /// `uname -r` of the guest kernel.
    pub kernel_release: String,
    /// It has detectors of every kind, and is slower for it.
    #[serde(default)]
    pub debug: bool,
    /// The guest kernel's image.
    pub kernel: PathBuf,
    /// `lib/modules/<release>` of the guest kernel.
    pub modules_dir: PathBuf,
    /// `pagefusion.ko` for it.
    pub module_ko: Option<PathBuf>,
    /// A Debian root, ext4 on a raw disk.
    pub guest_image: PathBuf,
    /// SHA-256 of every file under `/usr` of that root.
    pub guest_manifest: PathBuf,
    /// File systems of each kind, and what is in them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystems: Option<PathBuf>,
    /// The root of the lab host, ext4 on a raw disk.
    pub lab_image: Option<PathBuf>,
    /// The lab host's kernel.
    pub lab_kernel: Option<PathBuf>,
    /// `lib/modules/<release>` of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lab_modules_dir: Option<PathBuf>,
    /// The QEMU to run.
    pub qemu: PathBuf,
    /// The oldest that is tested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub older_qemu: Option<PathBuf>,
    /// Our own programs; without it, where this program is.
    pub bin_dir: Option<PathBuf>,
    /// An initramfs made elsewhere; without one it is built from the rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_initramfs: Option<PathBuf>,
}

impl Artifacts {
    /// Reads the description and checks that what it names is there.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let artifacts: Self =
            serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
        let needed = [
            &artifacts.kernel,
            &artifacts.guest_image,
            &artifacts.guest_manifest,
            &artifacts.qemu,
        ];
        for needed in needed {
            ensure!(
                needed.exists(),
                "{} is missing; provision the machine first",
                needed.display()
            );
        }
        Ok(artifacts)
    }

    /// The same with the oldest QEMU that is tested, if there is one.
    pub fn with_older_qemu(&self) -> Option<Self> {
        let qemu = self.older_qemu.clone()?;
        let mut artifacts = self.clone();
        artifacts.qemu = qemu;
        Some(artifacts)
    }

    /// The path of one of our programs.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let path = match &self.bin_dir {
            Some(directory) => directory.join(name),
            None => std::env::current_exe()
                .context("find this program")?
                .with_file_name(name),
        };
        ensure!(
            path.exists(),
            "{} is missing; build the workspace first",
            path.display()
        );
        Ok(path)
    }

    /// What `qemu --version` calls itself.
    pub fn qemu_version(&self) -> Result<String> {
        let output = std::process::Command::new(&self.qemu)
            .arg("--version")
            .output()
            .with_context(|| format!("run {}", self.qemu.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text
            .lines()
            .next()
            .and_then(|line| line.split("version ").nth(1));
        Ok(version
            .context("QEMU does not tell its version")?
            .trim()
            .to_owned())
    }
}
