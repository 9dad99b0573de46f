//! A QEMU older than this machine's, unpacked from Debian's packages with the libraries it needs, nothing installed.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use anyhow::Result;

use crate::{
    cache::Cache,
    fetch::stored,
    key::KeyBuilder,
    pins::Pin,
    process::{self, bound_command},
    sets::QEMU_7_2,
    space,
    ui::{Measure, Step},
};

/// Becomes QEMU, which finds its firmware by where it lies itself, and its libraries by the environment.
const START: &str = r#"#!/bin/sh
root=${0%/*}
export LD_LIBRARY_PATH="$root/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu"
exec "$root/usr/bin/qemu-system-x86_64" "$@"
"#;

/// The program to run.
pub(crate) fn provision(cache: &Cache) -> Result<PathBuf> {
    const RECIPE: &str = "qemu 1";
    let key = |pins: &[Pin]| {
        let key = KeyBuilder::new("qemu").with(RECIPE).with(START);
        pins.iter()
            .fold(key, |key, pin| key.with(&pin.sha256))
            .finish()
    };
    let pins = QEMU_7_2.available(cache, key)?;
    let entry = cache.entry(&key(&pins), "the older QEMU", |build| {
        space::require(cache.root(), 200 * space::MIB, "the older QEMU")?;
        let step = Step::start("older QEMU", Measure::Unknown);
        for pin in &pins {
            let mut unpack = bound_command("dpkg-deb");
            unpack.arg("-x").arg(stored(cache, pin)).arg(build.dir);
            process::run("dpkg-deb", unpack, &step, &mut build.log)?;
        }
        let start = build.dir.join("qemu-system-x86_64");
        fs::write(&start, START)?;
        fs::set_permissions(&start, fs::Permissions::from_mode(0o755))?;
        step.done();
        Ok(())
    })?;
    Ok(entry.join("qemu-system-x86_64"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_started_becomes_qemu_with_the_libraries_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("usr/bin");
        fs::create_dir_all(&bin).unwrap();
        // Nothing that was just written is run: another test may have it open for a moment.
        std::os::unix::fs::symlink("/bin/sh", bin.join("qemu-system-x86_64")).unwrap();
        let start = dir.path().join("start");
        fs::write(&start, START).unwrap();
        let child = std::process::Command::new("sh")
            .arg(start)
            .args(["-c", r#"echo $$ "$LD_LIBRARY_PATH" "$@""#])
            .args(["qemu", "-m", "two words"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let id = child.id();
        let output = child.wait_with_output().unwrap();
        let root = dir.path().display();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            format!(
                "{id} {root}/lib/x86_64-linux-gnu:{root}/usr/lib/x86_64-linux-gnu -m two words\n"
            )
        );
    }
}
