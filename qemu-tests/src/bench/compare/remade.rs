//! The guest's image made anew: every file and its bytes as they are, in a file system of another identity and in other
//! inodes, as when the same packages are installed twice.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

/// Files made before all others, so that those get other inodes.
const SHIFT: u32 = 1000;

/// Makes `new` of `image`, both ext4, by way of `directory`. Needs root, for the files' owners.
pub(super) fn remake(image: &Path, directory: &Path, new: &Path) -> Result<()> {
    let tree = directory.join("tree");
    fs::create_dir(&tree).context("create a directory")?;
    // Names that come first in every listing.
    let shift = tree.join("!shift");
    fs::create_dir(&shift).context("create a directory")?;
    for number in 0..SHIFT {
        fs::write(shift.join(number.to_string()), "").context("create a file")?;
    }
    let request = format!("rdump / {}", tree.display());
    run(Command::new("debugfs").arg("-R").arg(request).arg(image))?;
    let bytes = fs::metadata(image)?.len();
    run(Command::new("mkfs.ext4")
        .args(["-q", "-m", "0", "-L", "guest"])
        .args(["-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"])
        .arg(&tree)
        .arg(new)
        .arg(format!("{}K", bytes / 1024)))?;
    fs::remove_dir_all(&tree).context("delete the files")
}

fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .env("PATH", "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {name}"))?;
    ensure!(
        output.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
