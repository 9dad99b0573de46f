//! The guest's image made anew: every file and its bytes as they are, in a file system of another identity and in other
//! inodes, as when the same packages are installed twice.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

/// Files made before all others, so that those get other inodes.
const SHIFT: u32 = 1000;
/// Directories that are there stay as they are, as dpkg has it: services may depend on whose they are.
const UNPACK: &str =
    r#"dpkg-deb --fsys-tarfile "$0" | tar -x --no-overwrite-dir --keep-directory-symlink -C "$1""#;

/// Makes `new` of `image`, both ext4, by way of `directory`, with the files of `packages` in place of those there are. Needs
/// root, for the files' owners.
pub(super) fn remake(
    image: &Path,
    directory: &Path,
    packages: &[PathBuf],
    new: &Path,
) -> Result<()> {
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
    for package in packages {
        run(Command::new("sh")
            .args(["-c", UNPACK])
            .arg(package)
            .arg(&tree))?;
    }
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_new_image_has_the_files_of_packages_in_place_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let write = |name: &str, text: &str| {
            fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            fs::write(path(name), text).unwrap();
        };
        write("old/usr/bin/program", "old");
        write("old/usr/bin/other", "other");
        write("package/usr/bin/program", "new");
        let mode = |name: &str, mode| {
            fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).unwrap();
        };
        mode("old/usr/bin", 0o710);
        mode("package/usr/bin", 0o755);
        let control = "Package: p\nVersion: 1\nArchitecture: all\nMaintainer: m <m@example.org>\nDescription: d\n";
        write("package/DEBIAN/control", control);
        let (image, package, new) = (path("image"), path("p.deb"), path("new"));
        let made = run(Command::new("dpkg-deb")
            .args(["-b".as_ref(), path("package").as_os_str()])
            .arg(&package))
        .and_then(|()| {
            let old = path("old");
            let arguments = [
                "-q".as_ref(),
                "-d".as_ref(),
                old.as_os_str(),
                image.as_os_str(),
            ];
            run(Command::new("mkfs.ext4").args(arguments).arg("16M"))
        })
        .and_then(|()| remake(&image, directory.path(), &[package], &new));
        if let Err(error) = made {
            eprintln!("skipped: {error:#}");
            return;
        }
        let asked = |request: &str| {
            let mut command = Command::new("debugfs");
            command.args(["-R", request]).arg(&new);
            let output = command
                .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
                .output();
            String::from_utf8(output.unwrap().stdout).unwrap()
        };
        assert_eq!(asked("cat /usr/bin/program"), "new");
        assert_eq!(asked("cat /usr/bin/other"), "other");
        let kept = asked("stat /usr/bin");
        assert!(kept.contains("Mode:  0710"), "{kept}");
    }
}
