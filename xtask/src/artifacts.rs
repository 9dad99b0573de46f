//! The file that tells the tests where everything is.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::Serialize;

/// All paths are absolute; what has not been made is null.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Artifacts {
    pub(crate) kernel_release: Option<String>,
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) modules_dir: Option<PathBuf>,
    pub(crate) module_ko: Option<PathBuf>,
    pub(crate) guest_image: Option<PathBuf>,
    pub(crate) guest_manifest: Option<PathBuf>,
    pub(crate) lab_image: Option<PathBuf>,
    pub(crate) lab_kernel: Option<PathBuf>,
    pub(crate) qemu: Option<PathBuf>,
    pub(crate) bin_dir: Option<PathBuf>,
    pub(crate) cache: Option<PathBuf>,
}

impl Artifacts {
    /// Writes `artifacts.json` into `dir`; readers see the old file or the new one.
    pub(crate) fn write(&self, dir: &Path) -> Result<PathBuf> {
        fs::create_dir_all(dir)?;
        let path = dir.join("artifacts.json");
        let partial = dir.join(format!("artifacts.json.{}", std::process::id()));
        fs::write(&partial, serde_json::to_string_pretty(self)? + "\n")
            .and_then(|()| fs::rename(&partial, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}
