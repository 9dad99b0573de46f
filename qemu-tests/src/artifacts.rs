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
    /// The guest kernel's image.
    pub kernel: PathBuf,
    /// `lib/modules/<release>` of the guest kernel.
    pub modules_dir: PathBuf,
    /// `pagefusion.ko` for it.
    pub module_ko: PathBuf,
    /// A Debian root, ext4 on a raw disk.
    pub guest_image: PathBuf,
    /// SHA-256 of every file under `/usr` of that root.
    pub guest_manifest: PathBuf,
    /// The root of the lab host, ext4 on a raw disk.
    pub lab_image: PathBuf,
    /// The lab host's kernel; its modules are in `modules_dir` too.
    pub lab_kernel: PathBuf,
    /// The QEMU to run.
    pub qemu: PathBuf,
    /// Our own programs.
    pub bin_dir: PathBuf,
    /// The cache all of this is in.
    #[serde(default)]
    pub cache: PathBuf,
    /// An initramfs made elsewhere; without one it is built from the rest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_initramfs: Option<PathBuf>,
}

impl Artifacts {
    /// Reads the description and checks that what it names is there.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let artifacts: Self = serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
        let needed = [&artifacts.kernel, &artifacts.guest_image, &artifacts.guest_manifest, &artifacts.qemu];
        for needed in needed.into_iter().chain([&artifacts.bin_dir]) {
            ensure!(needed.exists(), "{} is missing; run `cargo xtask setup`", needed.display());
        }
        Ok(artifacts)
    }

    /// The path of one of our programs.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let path = self.bin_dir.join(name);
        ensure!(path.exists(), "{} is missing; build the workspace first", path.display());
        Ok(path)
    }

    /// What `qemu --version` calls itself.
    pub fn qemu_version(&self) -> Result<String> {
        let output = std::process::Command::new(&self.qemu)
            .arg("--version")
            .output()
            .with_context(|| format!("run {}", self.qemu.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().next().and_then(|line| line.split("version ").nth(1));
        Ok(version.context("QEMU does not tell its version")?.trim().to_owned())
    }
}
