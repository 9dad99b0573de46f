//! What Debian's header packages lack for a Rust module: the metadata of the kernel's own crates.
//!
//! Only that part of the kernel is built again, by the very tools Debian used,
//! and comes out with the same crate hashes; that is checked, symbol by symbol.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    cache::{Build, Cache},
    debug_kernel,
    fetch::stored,
    kernel::{Kernel, chosen},
    key::{Key, KeyBuilder},
    namespace::Sandbox,
    pins::Pin,
    process::{self, bound_command},
    rootfs,
    sets::{kernel_release, package_name},
    space,
    trouble::Trouble,
    ui::{Measure, Step},
};

/// The layers of a root in which modules for one kernel can be built.
#[derive(Debug, Clone)]
pub(crate) struct BuildRoot {
    /// The name of the headers' entry, which stands for the content of both layers.
    pub(crate) key: String,
    pub(crate) release: String,
    /// Debian's headers with what they lacked.
    pub(crate) headers: PathBuf,
    pub(crate) tools: PathBuf,
    /// The C compiler.
    pub(crate) cc: &'static str,
}

impl BuildRoot {
    pub(crate) fn sandbox(&self) -> Sandbox {
        Sandbox::new([self.headers.clone(), self.tools.clone()])
    }
}

/// The root with the compilers, and the name of its entry.
pub(crate) fn tools(cache: &Cache, kernel: &Kernel) -> Result<(Key, PathBuf)> {
    const FINISH: &str = r#"rm -rf "$dir"/root/var/cache/apt/*.bin "$dir"/root/usr/share/doc/*"#;
    let set = kernel.tools;
    let key = |pins: &[Pin]| -> Key {
        pins.iter()
            .fold(
                KeyBuilder::new("tools").with(rootfs::RECIPE).with(FINISH),
                |key, pin| key.with(&pin.sha256),
            )
            .finish()
    };
    let pins = set.available(cache, key)?;
    let key = key(&pins);
    let entry = cache.entry(&key, "the root with the kernel's tools", |build| {
        space::require(
            cache.root(),
            2500 * space::MIB,
            "the root with the kernel's tools",
        )?;
        rootfs::make(cache, build, set, &pins, FINISH)
    })?;
    Ok((key, entry.join("root")))
}

pub(crate) fn provision(cache: &Cache, kernel: &Kernel) -> Result<BuildRoot> {
    if kernel.debug {
        return Ok(debug_kernel::provision(cache, kernel)?.root);
    }
    stock(cache, kernel)
}

/// Of the kernel as Debian builds it.
pub(crate) fn stock(cache: &Cache, kernel: &Kernel) -> Result<BuildRoot> {
    let (tools_key, tools) = tools(cache, kernel)?;
    let key = |pins: &[Pin]| {
        chosen(pins, HEADER_PACKAGES)
            .iter()
            .fold(
                KeyBuilder::new("headers")
                    .with(PREPARE)
                    .with(kernel.cc)
                    .with(tools_key.as_str()),
                |key, pin| key.with(&pin.sha256),
            )
            .finish()
    };
    let pins = kernel.packages.available(cache, key)?;
    let release = kernel_release(&pins)?;
    let key = key(&pins);
    let entry = cache.entry(&key, "the kernel's headers", |build| {
        space::require(cache.root(), 3500 * space::MIB, "the kernel's headers")?;
        make(cache, build, kernel, &tools, &release, &pins)
    })?;
    Ok(BuildRoot {
        key: key.to_string(),
        release,
        headers: entry.join("tree"),
        tools,
        cc: kernel.cc,
    })
}

const HEADER_PACKAGES: &[&str] = &["linux-headers-", "linux-kbuild-", "linux-source-"];

/// In the tools root: builds what is missing into /scratch/out.
const PREPARE: &str = r#"
    release=$1 version=$2 source=$3 cc=$4
    headers=/usr/src/linux-headers-$release
    echo "unpacking the source"
    tar -C /usr/src -xJf "/scratch/package/usr/src/$source.tar.xz" --exclude="$source/drivers/gpu/drm/amd/include"
    rm -rf /scratch/package
    cp "$headers/.config" /build/.config
    cd "/usr/src/$source"
    make -j"$(nproc)" O=/build CC="$cc" KERNELRELEASE="$release" olddefconfig modules_prepare

    out=/scratch/out/usr/src/linux-headers-$release
    mkdir -p "$out/rust" "/scratch/out/usr/lib/linux-kbuild-$version/scripts"
    cp /build/rust/*.rmeta /build/rust/*.so "$out/rust/"
    cp /build/scripts/target.json "/scratch/out/usr/lib/linux-kbuild-$version/scripts/"
    # For modules that generate bindings of their own, and for clippy.
    common=/scratch/out/usr/src/linux-headers-$version-common
    mkdir -p "$common/rust"
    cp rust/bindgen_parameters "$common/rust/"
    if [ -e .clippy.toml ]; then cp .clippy.toml "$common/"; fi

    echo "comparing crate hashes with Debian's"
    cat /build/rust/exports_*_generated.h | grep -o '_R[A-Za-z0-9_]*' | LC_ALL=C sort -u > /scratch/ours
    awk '$2 ~ /^_R/ && $3 == "vmlinux" { print $2 }' "$headers/Module.symvers" | LC_ALL=C sort -u > /scratch/debians
    missing=$(LC_ALL=C comm -13 /scratch/ours /scratch/debians | wc -l)
    echo "$(wc -l < /scratch/debians) symbols of Debian's kernel, $missing of them not in ours"
    if [ "$missing" -ne 0 ] || [ ! -s /scratch/debians ]; then
        echo "the rebuilt Rust metadata does not fit Debian's kernel: its crate hashes differ"
        exit 1
    fi
"#;

fn make(
    cache: &Cache,
    build: &mut Build<'_>,
    kernel: &Kernel,
    tools: &Path,
    release: &str,
    pins: &[Pin],
) -> Result<()> {
    let step = Step::start("kernel headers for Rust", Measure::Lines(240));
    let (tree, work) = (build.dir.join("tree"), build.dir.join("work"));
    let package = work.join("package");
    fs::create_dir_all(&package)?;
    fs::create_dir(&tree)?;
    for pin in chosen(pins, HEADER_PACKAGES) {
        let to = if pin.name().starts_with("linux-source-") {
            &package
        } else {
            &tree
        };
        let mut unpack = bound_command("dpkg-deb");
        unpack.arg("-x").arg(stored(cache, pin)).arg(to);
        process::run("dpkg-deb", unpack, &step, &mut build.log)?;
    }
    let version = package_name("{version}", release);
    let source = package_name("linux-source-{series}", release);
    let sources = work.join("source");
    let objects = work.join("build");
    fs::create_dir(&sources)?;
    fs::create_dir(&objects)?;
    let sandbox = Sandbox::new([tree.clone(), tools.to_owned()])
        .writable(&work, "/scratch")
        .writable(&sources, &format!("/usr/src/{source}"))
        .writable(&objects, "/build");
    check_rustc(&sandbox, &tree, kernel, release)?;
    process::run(
        "the build of the kernel's Rust metadata",
        sandbox.command(PREPARE, &[release, &version, &source, kernel.cc]),
        &step,
        &mut build.log,
    )?;
    let mut merge = bound_command("cp");
    merge.arg("-r").arg(work.join("out/.")).arg(&tree);
    process::run("cp", merge, &step, &mut build.log)?;
    fs::remove_dir_all(&work)?;
    step.done();
    Ok(())
}

/// Every crate hash depends on the very compiler, so this is asked before anything is built.
fn check_rustc(sandbox: &Sandbox, tree: &Path, kernel: &Kernel, release: &str) -> Result<()> {
    let path = tree.join(format!("usr/src/linux-headers-{release}/.config"));
    let config =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let wanted = rustc_version_text(&config)
        .with_context(|| format!("the kernel {release} was built without Rust"))?;
    let found = process::capture("rustc", &mut sandbox.command("rustc --version", &[]))?;
    if found.trim() == wanted {
        return Ok(());
    }
    Err(Trouble::RustcDiffers {
        set: kernel.packages.name.to_owned(),
        wanted: wanted.to_owned(),
        found: found.trim().to_owned(),
    }
    .into())
}

fn rustc_version_text(config: &str) -> Option<&str> {
    config
        .lines()
        .find_map(|line| line.strip_prefix("CONFIG_RUSTC_VERSION_TEXT="))
        .map(|text| text.trim_matches('"'))
        .filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compiler_of_a_kernel_is_read_from_its_configuration() {
        assert_eq!(
            rustc_version_text("CONFIG_X=y\nCONFIG_RUSTC_VERSION_TEXT=\"rustc 1.85.1 (x) (y)\"\n"),
            Some("rustc 1.85.1 (x) (y)")
        );
        assert_eq!(rustc_version_text("CONFIG_RUSTC_VERSION_TEXT=\"\"\n"), None);
        assert_eq!(rustc_version_text("CONFIG_X=y\n"), None);
    }

    #[test]
    fn a_different_compiler_is_told_with_both_versions() {
        let text = Trouble::RustcDiffers {
            set: "kernel-7.3".into(),
            wanted: "rustc 1.85.1".into(),
            found: "rustc 1.85.0".into(),
        }
        .to_string();
        assert!(
            text.contains("1.85.1") && text.contains("1.85.0") && text.contains("cargo xtask pins")
        );
    }
}
