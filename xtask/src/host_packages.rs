//! What must be installed on this machine, and how it gets there.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    apt::{self, KEYRING, explain},
    cache::Cache,
    namespace::is_root,
    process::{self, Log, bound_command},
    trouble::Trouble,
    ui::{Measure, Step, notice},
};

const OLDEST_QEMU: (u32, u32) = (10, 0);

/// A program (or file) and the package that has it.
struct Need {
    file: &'static str,
    package: &'static str,
}

const NEEDS: &[Need] = &[
    Need {
        file: "mmdebstrap",
        package: "mmdebstrap",
    },
    Need {
        file: "mkfs.ext4",
        package: "e2fsprogs",
    },
    Need {
        file: "depmod",
        package: "kmod",
    },
    Need {
        file: "setpriv",
        package: "util-linux",
    },
    Need {
        file: "unshare",
        package: "util-linux",
    },
    Need {
        file: "dpkg-deb",
        package: "dpkg",
    },
    Need {
        file: "/usr/lib/apt/apt-helper",
        package: "apt",
    },
    Need {
        file: "xz",
        package: "xz-utils",
    },
    Need {
        file: "zstd",
        package: "zstd",
    },
    Need {
        file: "cc",
        package: "gcc",
    },
    Need {
        file: "/usr/include/stdio.h",
        package: "libc6-dev",
    },
    Need {
        file: "perl",
        package: "perl",
    },
    Need {
        file: KEYRING,
        package: "debian-archive-keyring",
    },
];

/// Makes sure everything is there; returns QEMU's path.
pub(crate) fn provision(cache: &Cache) -> Result<PathBuf> {
    if env::consts::ARCH != "x86_64" {
        bail!(
            "this builds and boots x86-64 kernels, and needs an x86-64 machine with Debian 12 or 13"
        );
    }
    let missing = missing();
    if !missing.is_empty() {
        install(cache, &missing)?;
    }
    find_qemu().context("QEMU is installed but does not run")
}

fn missing() -> Vec<&'static str> {
    let mut packages: Vec<&str> = NEEDS
        .iter()
        .filter(|need| find(need.file).is_none())
        .map(|need| need.package)
        .collect();
    if !is_root() && find("newuidmap").is_none() {
        packages.push("uidmap");
    }
    if find_qemu().is_none() {
        packages.push("qemu-system-x86");
    }
    packages.dedup();
    packages
}

/// The path of a program, also where a user without root does not look.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        // An absolute path takes the place of the directory.
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

fn find_qemu() -> Option<PathBuf> {
    let qemu = find("qemu-system-x86_64")?;
    let output = Command::new(&qemu).arg("--version").output().ok()?;
    let version = qemu_version(&String::from_utf8_lossy(&output.stdout))?;
    if version < OLDEST_QEMU {
        notice(&format!(
            "{} is version {}.{}; {}.{} or later is needed",
            qemu.display(),
            version.0,
            version.1,
            OLDEST_QEMU.0,
            OLDEST_QEMU.1
        ));
        return None;
    }
    Some(qemu)
}

fn qemu_version(text: &str) -> Option<(u32, u32)> {
    let version = text.split("version ").nth(1)?;
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The Debian suites that have all of it for the release of this machine, its own first, and which of them is asked for QEMU.
fn suites(os_release: &str) -> Result<(&'static [&'static str], &'static str)> {
    let field = |name: &str| {
        os_release
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"'))
    };
    match field("VERSION_CODENAME") {
        Some("bookworm") => Ok((
            &["bookworm", "bookworm-updates", "bookworm-backports"],
            "bookworm-backports",
        )),
        Some("trixie") => Ok((&["trixie", "trixie-updates"], "trixie")),
        _ => bail!(
            "packages are missing, and this is neither Debian 12 nor 13 but {}; install them by hand",
            field("PRETTY_NAME").unwrap_or("something else")
        ),
    }
}

fn install(cache: &Cache, missing: &[&str]) -> Result<()> {
    let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let (suites, qemu_suite) =
        suites(&os_release).with_context(|| format!("missing packages: {}", missing.join(" ")))?;
    let sources = cache.dir("apt").join("machine");
    apt::write_sources(&sources, suites[0], suites)?;
    let script = install_script(&sources, missing, qemu_suite);
    if !is_root() {
        return Err(Trouble::PackagesMissing {
            packages: missing.join(" "),
            command: format!("sudo sh -c '{}'", script.replace('\'', r"'\''")),
        }
        .into());
    }
    let step = Step::start(
        &format!("installing {}", missing.join(" ")),
        Measure::Unknown,
    );
    let mut log = Log::create(&cache.dir("logs").join("install.log"))?;
    let mut command = bound_command("sh");
    command.args(["-c", &script]);
    process::run("the installation of packages", command, &step, &mut log).map_err(explain)?;
    step.done();
    Ok(())
}

/// For root; leaves the machine's own sources and package lists as they are.
fn install_script(sources: &Path, missing: &[&str], qemu_suite: &str) -> String {
    let options = apt::machine_options(sources, "$lists").join(" ");
    let apt = format!("apt-get -y -o DPkg::Lock::Timeout=300 {options}");
    let mut packages = missing.to_vec();
    let mut target = String::new();
    if packages.contains(&"qemu-system-x86") {
        target = format!(" -t {qemu_suite}");
    }
    packages.sort_unstable();
    format!(
        "set -e; lists=$(mktemp -d); trap \"rm -rf $lists\" EXIT; export DEBIAN_FRONTEND=noninteractive; \
         {apt} update; {apt} install --no-install-recommends{target} {}",
        packages.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_version_is_read_from_what_it_prints() {
        assert_eq!(
            qemu_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"),
            Some((10, 0))
        );
        assert_eq!(qemu_version("QEMU emulator version 7.2.19"), Some((7, 2)));
        assert_eq!(qemu_version("nothing"), None);
    }

    #[test]
    fn debian_12_takes_qemu_from_backports_and_13_has_it() {
        assert_eq!(
            suites("VERSION_CODENAME=bookworm\n").unwrap().1,
            "bookworm-backports"
        );
        assert_eq!(suites("VERSION_CODENAME=\"trixie\"\n").unwrap().1, "trixie");
        let error = suites("PRETTY_NAME=\"Fedora 40\"\n").unwrap_err();
        assert!(error.to_string().contains("Fedora 40"));
    }

    #[test]
    fn only_a_missing_qemu_makes_backports_the_target() {
        let script =
            |missing: &[&str]| install_script(Path::new("/s"), missing, "bookworm-backports");
        assert!(
            script(&["qemu-system-x86", "kmod"])
                .ends_with(" -t bookworm-backports kmod qemu-system-x86")
        );
        assert!(!script(&["kmod"]).contains(" -t "));
        assert!(script(&["kmod"]).contains("Dir::Etc::SourceParts=/s"));
    }
}
