//! The kernel module, built from a copy of its sources, so that the checkout stays clean.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    cache::{Build, Cache},
    headers::BuildRoot,
    key::{KeyBuilder, files_under},
    process,
    trouble::Trouble,
    ui::{Measure, Step},
};

/// All that the module is built from, relative to the checkout.
const SOURCES: &[&str] = &["Kbuild", "Makefile", "module", "abi/src"];

const MAKE: &str = r#"
    make -C "/usr/src/linux-headers-$1" M=/source -j"$(nproc)" CC="$2" modules
    cp /source/pagefusion.ko /out/pagefusion.debug.ko
    strip -g -o /out/pagefusion.ko /source/pagefusion.ko
"#;

const LINT: &str = r#"
    make -C "/usr/src/linux-headers-$1" M=/source -j"$(nproc)" CC="$2" CLIPPY=1 KRUSTFLAGS=-Dwarnings KCFLAGS=-Werror modules
"#;

/// Builds `pagefusion.ko`; the same sources give the same file.
pub(crate) fn build(cache: &Cache, checkout: &Path, root: &BuildRoot) -> Result<PathBuf> {
    let key = KeyBuilder::new("module")
        .with(MAKE)
        .with(&root.key)
        .with_files(checkout, SOURCES)?
        .finish();
    let entry = cache.entry(&key, "the kernel module", |build| {
        make(build, checkout, root, MAKE)?;
        fs::remove_dir_all(build.dir.join("source"))?;
        Ok(())
    })?;
    Ok(entry.join("pagefusion.ko"))
}

/// Copies the module into `dir`; readers see the old file or the new one.
pub(crate) fn copy(ko: &Path, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    let partial = dir.join(format!("pagefusion.ko.{}", std::process::id()));
    fs::copy(ko, &partial)?;
    fs::rename(&partial, dir.join("pagefusion.ko"))?;
    Ok(())
}

/// Runs the kernel's clippy over the module; any warning is an error.
pub(crate) fn lint(cache: &Cache, checkout: &Path, root: &BuildRoot) -> Result<()> {
    let scratch = cache.scratch("lint")?;
    let mut build = Build {
        dir: scratch.path(),
        log: process::Log::create(&cache.dir("logs").join("lint.log"))?,
    };
    make(&mut build, checkout, root, LINT)
}

fn make(build: &mut Build<'_>, checkout: &Path, root: &BuildRoot, script: &str) -> Result<()> {
    let source = build.dir.join("source");
    copy_sources(checkout, &source)?;
    let step = Step::start("kernel module", Measure::Unknown);
    let sandbox = root
        .sandbox()
        .writable(&source, "/source")
        .writable(build.dir, "/out");
    let mut lines = Vec::new();
    let built = process::run_watched(
        "the module's build",
        &mut sandbox.command(script, &[&root.release, root.cc]),
        &mut build.log,
        |line| {
            if let Some(line) = line {
                step.line(line);
                lines.push(line.to_owned());
            }
        },
    );
    match built {
        Ok(()) => {
            step.done();
            if lines.iter().any(|line| line.contains("warning:")) {
                eprintln!("{}", lines.join("\n"));
            }
            Ok(())
        }
        // A compiler's message is worth more than its last lines.
        Err(error) if matches!(error.downcast_ref(), Some(Trouble::Command { .. })) => {
            drop(step);
            eprintln!("{}", lines.join("\n"));
            anyhow::bail!("the module does not build")
        }
        Err(error) => Err(error),
    }
}

fn copy_sources(checkout: &Path, to: &Path) -> Result<()> {
    for file in files_under(checkout, SOURCES)? {
        let target = to.join(&file);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(checkout.join(&file), &target)
            .with_context(|| format!("cannot copy {}", file.display()))?;
    }
    Ok(())
}
