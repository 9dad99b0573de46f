//! Root file systems out of pinned packages, by mmdebstrap, without a network.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::{
    cache::{Build, Cache},
    fetch::stored,
    key::hex,
    namespace,
    pins::Pin,
    process,
    sets::PackageSet,
    ui::{Measure, Step},
};

/// Counts as an ingredient of everything made from a root file system.
pub(crate) const RECIPE: &str = "rootfs 1";

/// Makes the root file system of `set` in `build.dir`/root and goes on with `finish`
/// (a script for sh) in the same namespace; `$1` is `build.dir`.
pub(crate) fn make(
    cache: &Cache,
    build: &mut Build<'_>,
    set: &PackageSet,
    pins: &[Pin],
    finish: &str,
) -> Result<()> {
    let repository = build.dir.join("repository");
    let step = Step::start(
        &format!("{} root", set.name),
        // That many lines are printed on each package: fetched, unpacked, set up, triggers.
        Measure::Lines(10 * pins.len() as u64),
    );
    offer(cache, &repository, set, pins)?;
    process::run(
        &format!("mmdebstrap of {}", set.name),
        debootstrap(build.dir, set, finish),
        &step,
        &mut build.log,
    )?;
    namespace::remove_tree(&repository)?;
    step.done();
    Ok(())
}

fn debootstrap(dir: &Path, set: &PackageSet, finish: &str) -> Command {
    const BEGIN: &str = r#"
        dir=$1
        export TMPDIR="$dir"
        mmdebstrap --mode=root --variant=apt --format=directory --architectures=amd64 --verbose \
            --aptopt='APT::Install-Recommends "false"' --aptopt='APT::Sandbox::User "root"' \
            --include="$3" "$2" "$dir/root" "deb [trusted=yes] copy://$dir/repository ./"
    "#;
    namespace::script(
        &format!("{BEGIN}\n{finish}"),
        &[
            dir.as_os_str(),
            OsStr::new(set.suites[0]),
            OsStr::new(&set.requested().join(",")),
        ],
    )
}

/// Lays out a repository that holds exactly `pins`.
fn offer(cache: &Cache, repository: &Path, set: &PackageSet, pins: &[Pin]) -> Result<()> {
    fs::create_dir(repository)?;
    let mut index = String::new();
    for pin in pins {
        process::stop_if_interrupted()?;
        let file: PathBuf = repository.join(pin.store_name());
        let source = stored(cache, pin);
        fs::hard_link(&source, &file)
            .or_else(|_| fs::copy(&source, &file).map(drop))
            .with_context(|| format!("cannot take {} from the store", pin.file_name()))?;
        let control = process::capture("dpkg-deb", Command::new("dpkg-deb").arg("-f").arg(&file))?;
        index.push_str(&format!(
            "{}\nFilename: ./{}\nSize: {}\nSHA256: {}\n\n",
            control.trim_end(),
            pin.store_name(),
            pin.size,
            pin.sha256
        ));
    }
    fs::write(repository.join("Packages"), &index)?;
    // mmdebstrap picks the essential packages of the suite it was asked for, so the repository must say that it is one.
    fs::write(
        repository.join("Release"),
        format!(
            "Suite: {suite}\nCodename: {suite}\nArchitectures: amd64 all\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {} {} Packages\n",
            hex(&Sha256::digest(&index)),
            index.len(),
            suite = set.suites[0],
        ),
    )?;
    Ok(())
}
