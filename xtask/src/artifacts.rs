//! The file that tells the tests where everything is.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::Serialize;

/// All paths are absolute.
#[derive(Debug, Serialize)]
pub(crate) struct Artifacts {
    pub(crate) kernel_release: String,
    /// The kernel has detectors of every kind.
    pub(crate) debug: bool,
    /// The kernel's image.
    pub(crate) kernel: PathBuf,
    /// Its modules: `lib/modules/RELEASE`.
    pub(crate) modules_dir: PathBuf,
    pub(crate) module_ko: PathBuf,
    pub(crate) guest_image: PathBuf,
    /// `sha256sum`'s list of every regular file below the guest's /usr.
    pub(crate) guest_manifest: PathBuf,
    /// File systems of each kind, and what is in them.
    pub(crate) filesystems: PathBuf,
    pub(crate) lab_image: PathBuf,
    pub(crate) lab_kernel: PathBuf,
    pub(crate) lab_modules_dir: PathBuf,
    pub(crate) qemu: PathBuf,
    /// The oldest that is tested.
    pub(crate) older_qemu: PathBuf,
    /// Where the workspace's release build puts its programs.
    pub(crate) bin_dir: PathBuf,
    pub(crate) cache: PathBuf,
}

impl Artifacts {
    /// Writes itself as `name` into `dir`; readers see the old file or the new one.
    pub(crate) fn write(&self, dir: &Path, name: &str) -> Result<PathBuf> {
        fs::create_dir_all(dir)?;
        let path = dir.join(name);
        let partial = dir.join(format!("{name}.{}", std::process::id()));
        fs::write(&partial, serde_json::to_string_pretty(self)? + "\n")
            .and_then(|()| fs::rename(&partial, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}
