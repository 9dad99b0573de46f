//! The disk with the files that benchmarks map.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::pattern;

/// Pages of one file.
pub(super) const FILE_PAGES: u64 = 16_384;
/// MiB of one file.
pub(super) const FILE_MIB: u64 = 64;

/// What is in the files. No two pages are alike, so that a host has nothing to share within the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// A number and zeros, for a benchmark to which the bytes do not matter.
    Numbered,
    /// Bytes as of a compressed file, the same in every run.
    Random,
}

/// The name of a file in the image.
pub(super) fn file_name(number: u64) -> String {
    format!("data{number:02}")
}

/// Makes an ext4 image of `files` files.
pub(super) fn make(directory: &Path, image: &Path, files: u64, bytes: Content) -> Result<()> {
    let content = directory.join("content");
    fs::create_dir(&content).context("create a directory")?;
    for number in 0..files {
        let file = File::create(content.join(file_name(number))).context("create a file")?;
        let mut output = BufWriter::with_capacity(1 << 20, file);
        let mut page = [0; 4096];
        for index in 0..FILE_PAGES {
            match bytes {
                Content::Numbered => {
                    page[..8].copy_from_slice(&(number * FILE_PAGES + index + 1).to_le_bytes());
                }
                Content::Random => pattern::fill(number + 1, index * 4096, &mut page),
            }
            output.write_all(&page).context("write a file")?;
        }
        output.flush().context("write a file")?;
    }
    // And what the file system takes for itself.
    let mib = files * FILE_MIB * 33 / 32 + 64;
    let output = Command::new("mkfs.ext4")
        .env("PATH", "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-m", "0", "-E", "lazy_itable_init=0", "-d"])
        .arg(&content)
        .arg(image)
        .arg(format!("{mib}M"))
        .stdin(Stdio::null())
        .output()
        .context("run mkfs.ext4")?;
    ensure!(
        output.status.success(),
        "mkfs.ext4: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    fs::remove_dir_all(&content).context("delete the files")
}
