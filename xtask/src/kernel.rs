//! The kernels. The stock ones are unpacked from Debian's packages, image and modules, nothing installed.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{
    cache::{Build, Cache},
    debug_kernel,
    fetch::stored,
    key::KeyBuilder,
    pins::Pin,
    process::{self, bound_command},
    sets::{
        DEBUG_TOOLS, FORKY_TOOLS, KERNEL_7_2, KERNEL_7_3, PackageSet, TRIXIE_TOOLS, kernel_release,
    },
    space,
    ui::{Measure, Step},
};

/// A kernel this project is built for. Another one is another row.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// What `--kernel` calls it.
    pub(crate) series: &'static str,
    pub(crate) packages: &'static PackageSet,
    /// The root with the very compilers that Debian built it with, or with those that can build it for debugging.
    pub(crate) tools: &'static PackageSet,
    /// The C compiler in that root.
    pub(crate) cc: &'static str,
    /// Whether it is built here, with detectors of every kind.
    pub(crate) debug: bool,
}

/// The kernel that everything is run on.
pub(crate) const USUAL: &str = "7.3";
/// The second version that distributions have.
pub(crate) const SECOND: &str = "7.2";
/// The usual one, built to find mistakes.
pub(crate) const DEBUG: &str = "debug";

pub(crate) const KERNELS: &[Kernel] = &[
    Kernel {
        series: USUAL,
        packages: &KERNEL_7_3,
        tools: &TRIXIE_TOOLS,
        cc: "x86_64-linux-gnu-gcc-14",
        debug: false,
    },
    Kernel {
        series: SECOND,
        packages: &KERNEL_7_2,
        tools: &FORKY_TOOLS,
        cc: "x86_64-linux-gnu-gcc-16",
        debug: false,
    },
    Kernel {
        series: DEBUG,
        packages: &KERNEL_7_3,
        tools: &DEBUG_TOOLS,
        cc: "clang-19",
        debug: true,
    },
];

pub(crate) fn find(series: &str) -> Result<&'static Kernel> {
    KERNELS
        .iter()
        .find(|kernel| kernel.series == series)
        .with_context(|| {
            let known: Vec<_> = KERNELS.iter().map(|kernel| kernel.series).collect();
            format!("no kernel {series:?}; there is: {}", known.join(", "))
        })
}

/// A kernel ready to boot.
#[derive(Debug)]
pub(crate) struct Unpacked {
    /// The entry's name, which stands for its content.
    pub(crate) key: String,
    pub(crate) release: String,
    pub(crate) image: PathBuf,
    /// `lib/modules/RELEASE`, with dependencies computed.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    pub(crate) fn provision(&self, cache: &Cache) -> Result<Unpacked> {
        const RECIPE: &str = "kernel 1";
        if self.debug {
            return Ok(debug_kernel::provision(cache, self)?.kernel);
        }
        let key = |pins: &[Pin]| {
            chosen(pins, &["linux-binary-", "linux-modules-"])
                .iter()
                .fold(KeyBuilder::new("kernel").with(RECIPE), |key, pin| {
                    key.with(&pin.sha256)
                })
                .finish()
        };
        let pins = self.packages.available(cache, key)?;
        let release = kernel_release(&pins)?;
        let key = key(&pins);
        let entry = cache.entry(&key, "the stock kernel", |build| {
            space::require(cache.root(), 400 * space::MIB, "the stock kernel")?;
            let step = Step::start("stock kernel", Measure::Unknown);
            for pin in chosen(&pins, &["linux-binary-", "linux-modules-"]) {
                let mut unpack = bound_command("dpkg-deb");
                unpack.arg("-x").arg(stored(cache, pin)).arg(build.dir);
                process::run("dpkg-deb", unpack, &step, &mut build.log)?;
            }
            if !build.dir.join("lib").exists() {
                std::os::unix::fs::symlink("usr/lib", build.dir.join("lib"))?;
            }
            depmod(build, &release, &step)?;
            step.done();
            Ok(())
        })?;
        let modules = entry.join("lib/modules").join(&release);
        Ok(Unpacked {
            key: key.to_string(),
            image: modules.join("vmlinuz"),
            modules,
            release,
        })
    }
}

/// Computes the dependencies of the modules in `build`, which are for `release`.
pub(crate) fn depmod(build: &mut Build<'_>, release: &str, step: &Step) -> Result<()> {
    let mut depmod = bound_command("depmod");
    depmod
        .arg("-b")
        .arg(build.dir)
        .arg(release)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    process::run("depmod", depmod, step, &mut build.log)
}

/// The pins whose names begin with one of `prefixes`.
pub(crate) fn chosen<'a>(pins: &'a [Pin], prefixes: &[&str]) -> Vec<&'a Pin> {
    pins.iter()
        .filter(|pin| prefixes.iter().any(|prefix| pin.name().starts_with(prefix)))
        .collect()
}
