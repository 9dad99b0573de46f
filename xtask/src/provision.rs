//! The order in which things are made, and what the tests are told about them.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::{
    artifacts::Artifacts,
    cache::Cache,
    headers::{self, BuildRoot},
    host_packages, images,
    kernel::{self, Kernel, USUAL},
    module, older_qemu, pins, sets,
};

/// What can be made by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Debian packages on this machine
    Host,
    /// The kernel
    Kernel,
    /// The root with the compilers the kernel is built with
    Tools,
    /// The kernel's headers, made fit for Rust modules
    Headers,
    /// The guest's disk image
    GuestImage,
    /// Images of every file system that is tested
    Filesystems,
    /// The disk image of the host that has KVM in emulation
    LabImage,
    /// The oldest QEMU that is tested, beside that of this machine
    OlderQemu,
}

/// Everything a command needs to know about where it runs.
#[derive(Debug)]
pub(crate) struct Project {
    pub(crate) cache: Cache,
    pub(crate) checkout: PathBuf,
    pub(crate) kernel: &'static Kernel,
}

impl Project {
    pub(crate) fn new(series: &str) -> Result<Self> {
        Ok(Self {
            cache: Cache::open()?,
            checkout: checkout()?,
            kernel: kernel::find(series)?,
        })
    }

    /// The same project with another kernel.
    pub(crate) fn with_kernel(&self, series: &str) -> Result<Self> {
        Ok(Self {
            cache: self.cache.clone(),
            checkout: self.checkout.clone(),
            kernel: kernel::find(series)?,
        })
    }

    /// Where cargo puts what it builds.
    pub(crate) fn target_dir(&self) -> PathBuf {
        match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) if !dir.is_empty() => self.checkout.join(dir),
            _ => self.checkout.join("target"),
        }
    }

    pub(crate) fn bin_dir(&self) -> PathBuf {
        self.target_dir().join("release")
    }

    pub(crate) fn part(&self, part: Part) -> Result<()> {
        host_packages::provision(&self.cache)?;
        match part {
            Part::Host => {}
            Part::Kernel => drop(self.kernel.provision(&self.cache)?),
            Part::Tools => drop(headers::tools(&self.cache, self.kernel)?),
            Part::Headers => drop(self.build_root()?),
            Part::GuestImage => drop(images::guest(&self.cache)?),
            Part::Filesystems => drop(images::filesystems(&self.cache)?),
            Part::LabImage => {
                let kernel = kernel::find(USUAL)?.provision(&self.cache)?;
                images::lab(&self.cache, &kernel)?;
            }
            Part::OlderQemu => drop(older_qemu::provision(&self.cache)?),
        }
        Ok(())
    }

    pub(crate) fn build_root(&self) -> Result<BuildRoot> {
        headers::provision(&self.cache, self.kernel)
    }

    pub(crate) fn module(&self) -> Result<PathBuf> {
        host_packages::provision(&self.cache)?;
        let ko = module::build(&self.cache, &self.checkout, &self.build_root()?)?;
        let target = self.checkout.join("target/pagefusion");
        module::copy(
            &ko,
            &match self.kernel.series {
                USUAL => target,
                series => target.join(series),
            },
        )?;
        Ok(ko)
    }

    /// Writes new pins, of what the mirror has now, into the checkout.
    pub(crate) fn renew_pins(&self, name: Option<&str>) -> Result<()> {
        let mut any = false;
        for set in sets::ALL {
            if name.is_some_and(|name| name != set.name) {
                continue;
            }
            any = true;
            let new = set.resolve(&self.cache)?;
            let path = self.checkout.join(format!("xtask/pins/{}.pins", set.name));
            fs::write(&path, pins::render(set.name, &new))
                .with_context(|| format!("cannot write {}", path.display()))?;
            for line in pins::replacements(&pins::parse(set.pins)?, &new) {
                println!("{}: {line}", set.name);
            }
        }
        let known: Vec<_> = sets::ALL.iter().map(|set| set.name).collect();
        anyhow::ensure!(any, "no such set; there are: {}", known.join(", "));
        Ok(())
    }

    /// Makes everything; returns the path of the file that lists it.
    pub(crate) fn everything(&self) -> Result<PathBuf> {
        let qemu = host_packages::provision(&self.cache)?;
        let kernel = self.kernel.provision(&self.cache)?;
        let guest = images::guest(&self.cache)?;
        let filesystems = images::filesystems(&self.cache)?;
        let lab_kernel = kernel::find(USUAL)?.provision(&self.cache)?;
        let lab = images::lab(&self.cache, &lab_kernel)?;
        let older_qemu = older_qemu::provision(&self.cache)?;
        let module = self.module()?;
        let name = match self.kernel.series {
            USUAL => "artifacts.json".to_owned(),
            series => format!("artifacts-{series}.json"),
        };
        Artifacts {
            kernel_release: kernel.release,
            debug: self.kernel.debug,
            lab_kernel: lab_kernel.image,
            lab_modules_dir: lab_kernel.modules,
            kernel: kernel.image,
            modules_dir: kernel.modules,
            module_ko: module,
            guest_image: guest.image,
            guest_manifest: guest.manifest,
            filesystems,
            lab_image: lab,
            qemu,
            older_qemu,
            bin_dir: self.bin_dir(),
            cache: self.cache.root().to_owned(),
        }
        .write(&self.checkout.join("target/pagefusion"), &name)
    }
}

/// The checkout this program was built from; cargo says where when it runs us.
fn checkout() -> Result<PathBuf> {
    let manifest = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest
        .parent()
        .map(Path::to_owned)
        .context("xtask is not inside a checkout")
}
