//! The sets of packages this project is built from, and what is done when a pinned one has vanished.

use std::{
    collections::BTreeSet,
    fs,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result, bail};

use crate::{
    apt::{PrivateApt, mirror},
    cache::Cache,
    fetch::{Fetched, fetch},
    key::{Key, KeyBuilder},
    pins::{self, Pin},
    trouble::Trouble,
    ui,
};

/// A named set of packages with its pins.
#[derive(Debug)]
pub(crate) struct PackageSet {
    pub(crate) name: &'static str,
    /// The first is the one preferred.
    pub(crate) suites: &'static [&'static str],
    pub(crate) contents: Contents,
    /// The committed pins.
    pub(crate) pins: &'static str,
}

#[derive(Debug)]
pub(crate) enum Contents {
    /// A root file system: the essential packages, apt, those of these lists, and all they depend on.
    Root(&'static [&'static [&'static str]]),
    /// Programs and all they depend on but the C library, to be run where they were unpacked.
    Programs(&'static [&'static str]),
    /// These alone; in the names `{release}` stands for a kernel release and `{series}` for its first two numbers.
    Kernel {
        /// What a release of this series begins and ends with; a number stands between.
        release: (&'static str, &'static str),
        packages: &'static [&'static str],
    },
}

pub(crate) const GUEST: PackageSet = PackageSet {
    name: "guest",
    suites: &["trixie"],
    contents: Contents::Root(&[&[
        "adduser",
        "ca-certificates",
        "coreutils",
        "dbus",
        "gcc",
        "iproute2",
        "kmod",
        "libc6-dev",
        "login",
        "mount",
        "netbase",
        "nginx",
        "passwd",
        "perl",
        "postgresql",
        "procps",
        "python3",
        "systemd",
        "systemd-sysv",
        "tzdata",
        "udev",
        "util-linux",
    ]]),
    pins: include_str!("../pins/guest.pins"),
};

pub(crate) const LAB: PackageSet = PackageSet {
    name: "lab",
    suites: &["trixie-backports", "trixie"],
    contents: Contents::Root(&[&[
        "coreutils",
        "iproute2",
        "kmod",
        "mount",
        "procps",
        "qemu-system-x86",
        "util-linux",
    ]]),
    pins: include_str!("../pins/lab.pins"),
};

/// The oldest QEMU that this is tested with.
pub(crate) const QEMU_7_2: PackageSet = PackageSet {
    name: "qemu-7.2",
    suites: &["bookworm"],
    contents: Contents::Programs(&["qemu-system-x86"]),
    pins: include_str!("../pins/qemu-7.2.pins"),
};

/// What makes file systems of the kinds that guests have, and some files to put into them.
pub(crate) const FILESYSTEMS: PackageSet = PackageSet {
    name: "filesystems",
    suites: &["trixie"],
    contents: Contents::Root(&[&[
        "bash",
        "btrfs-progs",
        "coreutils",
        "e2fsprogs",
        "erofs-utils",
        "perl-base",
        "squashfs-tools",
        "xfsprogs",
    ]]),
    pins: include_str!("../pins/filesystems.pins"),
};

/// What kernels with Rust are built with, beside compilers for C.
const KERNEL_TOOLS: &[&str] = &[
    "bc",
    "bindgen",
    "bison",
    "flex",
    "kmod",
    "libc6-dev",
    "libelf-dev",
    "libssl-dev",
    "make",
    "pahole",
    "perl-base",
    "python3-minimal",
    "rust-clippy",
    "rust-src",
    "rustc",
    "rustfmt",
    "xz-utils",
];

pub(crate) const TRIXIE_TOOLS: PackageSet = PackageSet {
    name: "tools-trixie",
    suites: &["trixie"],
    contents: Contents::Root(&[KERNEL_TOOLS, &["gcc-14"]]),
    pins: include_str!("../pins/tools-trixie.pins"),
};

/// What Debian builds the kernels of its next release with.
pub(crate) const FORKY_TOOLS: PackageSet = PackageSet {
    name: "tools-forky",
    suites: &["forky"],
    contents: Contents::Root(&[KERNEL_TOOLS, &["gcc-16"]]),
    pins: include_str!("../pins/tools-forky.pins"),
};

/// A kernel in C and Rust can have KASAN only when clang compiles the C.
pub(crate) const DEBUG_TOOLS: PackageSet = PackageSet {
    name: "tools-debug",
    suites: &["trixie"],
    contents: Contents::Root(&[KERNEL_TOOLS, &["clang-19", "gcc-14"]]),
    pins: include_str!("../pins/tools-debug.pins"),
};

pub(crate) const KERNEL_7_3: PackageSet = PackageSet {
    name: "kernel-7.3",
    suites: &["trixie-backports", "trixie"],
    contents: Contents::Kernel {
        release: ("7.3.", "+deb13-cloud-amd64"),
        packages: KERNEL_PACKAGES,
    },
    pins: include_str!("../pins/kernel-7.3.pins"),
};

/// Of Debian's next release, which is at an older kernel than the backports.
pub(crate) const KERNEL_7_2: PackageSet = PackageSet {
    name: "kernel-7.2",
    suites: &["forky"],
    contents: Contents::Kernel {
        release: ("7.2.", "+deb14-cloud-amd64"),
        packages: KERNEL_PACKAGES,
    },
    pins: include_str!("../pins/kernel-7.2.pins"),
};

const KERNEL_PACKAGES: &[&str] = &[
    "linux-binary-{release}",
    "linux-modules-{release}",
    "linux-headers-{release}",
    "linux-headers-{version}-common",
    "linux-kbuild-{version}",
    "linux-source-{series}",
];

pub(crate) const ALL: [&PackageSet; 9] = [
    &KERNEL_7_3,
    &KERNEL_7_2,
    &TRIXIE_TOOLS,
    &FORKY_TOOLS,
    &DEBUG_TOOLS,
    &GUEST,
    &LAB,
    &QEMU_7_2,
    &FILESYSTEMS,
];

impl PackageSet {
    /// The packages asked for by name.
    pub(crate) fn requested(&self) -> Vec<&'static str> {
        match self.contents {
            Contents::Root(lists) => lists.concat(),
            Contents::Programs(packages) | Contents::Kernel { packages, .. } => packages.to_vec(),
        }
    }

    /// The pins in force: the committed ones, or what had to take their place on this machine.
    pub(crate) fn current(&self, cache: &Cache) -> Result<Vec<Pin>> {
        let resolved = self.resolved_file(cache);
        match fs::read_to_string(&resolved) {
            Ok(text) => {
                let (old, new) = (pins::parse(self.pins)?, pins::parse(&text)?);
                self.tell_replacements(&old, &new);
                Ok(new)
            }
            Err(_) => pins::parse(self.pins)
                .with_context(|| format!("the pins of the set {:?}", self.name)),
        }
    }

    /// The pins; with the packages in the store if the entry called `key` has yet to be made.
    pub(crate) fn available(&self, cache: &Cache, key: impl Fn(&[Pin]) -> Key) -> Result<Vec<Pin>> {
        let pins = self.current(cache)?;
        if !pins.is_empty() && cache.lookup(&key(&pins)).is_some() {
            return Ok(pins);
        }
        self.obtain(cache)
    }

    /// Brings the packages into the store; returns the pins they turned out to have.
    pub(crate) fn obtain(&self, cache: &Cache) -> Result<Vec<Pin>> {
        let pins = self.current(cache)?;
        let gone = if pins.is_empty() {
            "the set of pins (it is empty)".to_owned()
        } else {
            match fetch(cache, self.name, &pins)? {
                Fetched::All => return Ok(pins),
                Fetched::Gone(file) => file,
            }
        };
        ui::notice(&format!(
            "{gone}, pinned for {:?}, is no longer on {}; looking for what took its place",
            self.name,
            mirror()
        ));
        let new = self.resolve(cache)?;
        if let Fetched::Gone(file) = fetch(cache, self.name, &new)? {
            return Err(Trouble::Vanished {
                package: file,
                mirror: mirror(),
            }
            .into());
        }
        self.tell_replacements(&pins, &new);
        let file = self.resolved_file(cache);
        let text = pins::render(self.name, &new);
        let partial = file.with_extension(format!("new-{}", std::process::id()));
        fs::write(&partial, text)?;
        fs::rename(partial, file)?;
        Ok(new)
    }

    /// Asks the mirror for the newest packages of this set.
    pub(crate) fn resolve(&self, cache: &Cache) -> Result<Vec<Pin>> {
        let _lock = cache.lock("apt", "package lists")?;
        let apt = PrivateApt::new(cache, self.suites)?;
        apt.update()?;
        match &self.contents {
            Contents::Root(_) => {
                let mut arguments = vec!["-t", self.suites[0], "install", "?essential", "apt"];
                arguments.extend(self.requested());
                apt.uris(&arguments)
            }
            Contents::Programs(packages) => {
                let mut arguments = vec!["-t", self.suites[0], "install"];
                arguments.extend(*packages);
                let mut pins = apt.uris(&arguments)?;
                // With one that is older than the machine's they could not load what was built here.
                pins.retain(|pin| pin.name() != "libc6");
                Ok(pins)
            }
            Contents::Kernel { release, packages } => {
                let newest = newest_release(
                    &apt.names(&format!("linux-binary-{}", release.0))?,
                    *release,
                )
                .ok_or_else(|| Trouble::Vanished {
                    package: format!("linux-binary-{}*{}", release.0, release.1),
                    mirror: mirror(),
                })?;
                let names: Vec<String> = packages
                    .iter()
                    .map(|template| package_name(template, &newest))
                    .collect();
                let mut arguments = vec!["-t", self.suites[0], "download"];
                arguments.extend(names.iter().map(String::as_str));
                apt.uris(&arguments)
            }
        }
    }

    /// Once in a run is enough.
    fn tell_replacements(&self, old: &[Pin], new: &[Pin]) {
        const SHOWN: usize = 8;
        static TOLD: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
        let lines = pins::replacements(old, new);
        let first = TOLD
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(self.name);
        if lines.is_empty() || !first {
            return;
        }
        let more = lines.len().saturating_sub(SHOWN);
        let mut text = format!(
            "the set {:?} is not the pinned one, which has vanished from the mirror:",
            self.name
        );
        for line in lines.iter().take(SHOWN) {
            text.push_str(&format!("\n    {line}"));
        }
        if more > 0 {
            text.push_str(&format!("\n    and {more} more"));
        }
        ui::notice(&text);
    }

    fn resolved_file(&self, cache: &Cache) -> std::path::PathBuf {
        let key = KeyBuilder::new(self.name).with(self.pins).finish();
        cache.dir("resolved").join(format!("{key}.pins"))
    }
}

/// The release of the kernel in `pins`.
pub(crate) fn kernel_release(pins: &[Pin]) -> Result<String> {
    for pin in pins {
        if let Some(release) = pin.name().strip_prefix("linux-binary-") {
            return Ok(release.to_owned());
        }
    }
    bail!("there is no linux-binary package among the kernel's pins")
}

/// Fills in `7.3.4+deb13-cloud-amd64`, `7.3.4+deb13` or `7.3`.
pub(crate) fn package_name(template: &str, release: &str) -> String {
    let version = release.split('-').next().unwrap_or(release);
    let series = version
        .match_indices('.')
        .nth(1)
        .map_or(version, |(end, _)| &version[..end]);
    template
        .replace("{release}", release)
        .replace("{version}", version)
        .replace("{series}", series)
}

fn newest_release(names: &[String], (begin, end): (&str, &str)) -> Option<String> {
    names
        .iter()
        .filter_map(|name| {
            let release = name.strip_prefix("linux-binary-")?;
            let number: u32 = release
                .strip_prefix(begin)?
                .strip_suffix(end)?
                .parse()
                .ok()?;
            Some((number, release))
        })
        .max()
        .map(|(_, release)| release.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_pins_can_be_read_and_name_what_was_asked_for() {
        for set in ALL {
            let pins = pins::parse(set.pins).unwrap();
            let release = match set.contents {
                Contents::Root(_) | Contents::Programs(_) => String::new(),
                Contents::Kernel { .. } => kernel_release(&pins).unwrap(),
            };
            for template in set.requested() {
                let name = package_name(template, &release);
                assert!(
                    pins.iter().any(|pin| pin.name() == name),
                    "{name} of the set {} has no pin",
                    set.name
                );
            }
        }
    }

    #[test]
    fn programs_that_run_where_they_lie_take_the_machines_c_library() {
        let pins = pins::parse(QEMU_7_2.pins).unwrap();
        assert!(pins.iter().any(|pin| pin.name() == "libglib2.0-0"));
        assert!(!pins.iter().any(|pin| pin.name() == "libc6"));
    }

    #[test]
    fn the_newest_release_is_the_one_with_the_greatest_number_not_the_last_in_order() {
        let names = [
            "linux-binary-7.3.4+deb13-cloud-amd64",
            "linux-binary-7.3.10+deb13-cloud-amd64",
            "linux-binary-7.3.9+deb13-cloud-amd64",
            "linux-binary-7.3.11+deb13-amd64",
            "linux-binary-7.3.12+deb14-cloud-amd64",
        ]
        .map(str::to_owned);
        assert_eq!(
            newest_release(&names, ("7.3.", "+deb13-cloud-amd64")).unwrap(),
            "7.3.10+deb13-cloud-amd64"
        );
        assert_eq!(newest_release(&names, ("7.4.", "+deb13-cloud-amd64")), None);
    }

    #[test]
    fn package_names_follow_the_release() {
        let release = "7.3.4+deb13-cloud-amd64";
        assert_eq!(
            package_name("linux-headers-{version}-common", release),
            "linux-headers-7.3.4+deb13-common"
        );
        assert_eq!(
            package_name("linux-source-{series}", release),
            "linux-source-7.3"
        );
    }
}
