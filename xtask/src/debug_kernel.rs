//! The debug kernel: Debian's source with Debian's configuration, and every detector of misuse that there is.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};

use crate::{
    cache::{Build, Cache},
    fetch::stored,
    headers::{self, BuildRoot},
    kernel::{self, Kernel, USUAL, Unpacked, chosen},
    key::KeyBuilder,
    pins::Pin,
    process::{self, bound_command},
    sets::{kernel_release, package_name},
    space,
    ui::{Measure, Step},
};

/// What `scripts/config` is told, beyond Debian's configuration.
const OPTIONS: &str = include_str!("../assets/debug-kernel/options");
/// The modules that are built of it, as `lsmod` would list them.
const MODULES: &str = include_str!("../assets/debug-kernel/modules");

/// In the tools root: a kernel in /scratch/out, and a tree in which modules for it can be built.
const MAKE: &str = r#"
    stock=$1 release=$2 source=$3 cc=$4
    objects=/usr/src/linux-headers-$release
    make="make -j$(nproc) O=$objects CC=$cc KERNELRELEASE=$release"
    echo "unpacking the source"
    tar -C /usr/src -xJf "/scratch/package/usr/src/$source.tar.xz" --exclude="$source/drivers/gpu/drm/amd/include"
    cd "/usr/src/$source"
    cp "/usr/src/linux-headers-$stock/.config" "$objects/.config"
    # It asks about options that this compiler brings; the defaults will do.
    yes '' | $make LSMOD=/scratch/modules localmodconfig
    while read -r option value; do
        case "$option" in ''|'#'*) continue ;; esac
        case "$value" in
            n) scripts/config --file "$objects/.config" --disable "$option" ;;
            *) scripts/config --file "$objects/.config" --set-val "$option" "$value" ;;
        esac
    done < /scratch/options
    $make olddefconfig
    while read -r option value; do
        case "$option" in ''|'#'*) continue ;; esac
        case "$value" in
            n) if grep -q "^CONFIG_$option=" "$objects/.config"; then echo "$option is still there"; exit 1; fi ;;
            *) if ! grep -qx "CONFIG_$option=$value" "$objects/.config"; then echo "$option is not $value"; exit 1; fi ;;
        esac
    done < /scratch/options
    $make bzImage modules
    $make INSTALL_MOD_PATH=/scratch/out modules_install
    cp "$objects/arch/x86/boot/bzImage" "/scratch/out/lib/modules/$release/vmlinuz"
    rm -f "/scratch/out/lib/modules/$release/build" "/scratch/out/lib/modules/$release/source"

    echo "keeping what modules are built with"
    cd "$objects"
    find . -path ./scripts -prune -o -path ./tools/objtool -prune -o -type f \
        '(' -name '*.o' -o -name '*.a' -o -name '*.ko' -o -name '*.cmd' -o -name 'vmlinux*' -o -name 'bzImage' ')' \
        -exec rm -f '{}' +
    cd "/usr/src/$source"
    rm -rf Documentation block certs crypto drivers fs init io_uring ipc kernel lib mm net samples security sound usr virt
    find tools -mindepth 1 -maxdepth 1 ! -name objtool ! -name include ! -name scripts ! -name build ! -name lib -exec rm -rf '{}' +
    find arch -mindepth 1 -maxdepth 1 -type d ! -name x86 -exec rm -rf '{}' +
"#;

/// The kernel, and the root in which modules for it are built.
#[derive(Debug)]
pub(crate) struct DebugKernel {
    pub(crate) kernel: Unpacked,
    pub(crate) root: BuildRoot,
}

/// Builds it, from the source and the configuration of the usual kernel.
pub(crate) fn provision(cache: &Cache, kernel: &Kernel) -> Result<DebugKernel> {
    let stock = headers::stock(cache, kernel::find(USUAL)?)?;
    let (tools_key, tools) = headers::tools(cache, kernel)?;
    let key = |pins: &[Pin]| {
        chosen(pins, &["linux-source-"])
            .iter()
            .fold(
                KeyBuilder::new("debug-kernel")
                    .with(MAKE)
                    .with(OPTIONS)
                    .with(MODULES)
                    .with(kernel.cc)
                    .with(&stock.key)
                    .with(tools_key.as_str()),
                |key, pin| key.with(&pin.sha256),
            )
            .finish()
    };
    let pins = kernel.packages.available(cache, key)?;
    let release = format!(
        "{}-debug-amd64",
        package_name("{version}", &kernel_release(&pins)?)
    );
    let key = key(&pins);
    let entry = cache.entry(&key, "the debug kernel", |build| {
        space::require(cache.root(), 9000 * space::MIB, "the debug kernel")?;
        let root = BuildRoot {
            tools: tools.clone(),
            ..stock.clone()
        };
        make(cache, build, kernel, &root, &release, &pins)
    })?;
    let modules = entry.join("lib/modules").join(&release);
    Ok(DebugKernel {
        kernel: Unpacked {
            key: key.to_string(),
            image: modules.join("vmlinuz"),
            modules,
            release: release.clone(),
        },
        root: BuildRoot {
            key: key.to_string(),
            release,
            headers: entry.join("tree"),
            tools,
            cc: kernel.cc,
        },
    })
}

fn make(
    cache: &Cache,
    build: &mut Build<'_>,
    kernel: &Kernel,
    stock: &BuildRoot,
    release: &str,
    pins: &[Pin],
) -> Result<()> {
    let step = Step::start("debug kernel", Measure::Lines(4000));
    let work = build.dir.join("work");
    let package = work.join("package");
    fs::create_dir_all(&package)?;
    for pin in chosen(pins, &["linux-source-"]) {
        let mut unpack = bound_command("dpkg-deb");
        unpack.arg("-x").arg(stored(cache, pin)).arg(&package);
        process::run("dpkg-deb", unpack, &step, &mut build.log)?;
    }
    for (name, content) in [("options", OPTIONS), ("modules", MODULES)] {
        fs::write(work.join(name), content)?;
    }
    let source = package_name("linux-source-{series}", release);
    let tree = build.dir.join("tree/usr/src");
    let directory = |name: &str| -> Result<PathBuf> {
        let path = tree.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    };
    let objects = format!("linux-headers-{release}");
    let inside = |name: &str| format!("/usr/src/{name}");
    let sandbox = stock
        .sandbox()
        .writable(&work, "/scratch")
        .writable(&directory(&source)?, &inside(&source))
        .writable(&directory(&objects)?, &inside(&objects));
    process::run(
        "the debug kernel's build",
        sandbox.command(MAKE, &[&stock.release, release, &source, kernel.cc]),
        &step,
        &mut build.log,
    )?;
    let modules = work.join("out/lib");
    fs::rename(&modules, build.dir.join("lib"))
        .with_context(|| format!("cannot move {}", modules.display()))?;
    kernel::depmod(build, release, &step)?;
    fs::remove_dir_all(&work)?;
    step.done();
    Ok(())
}
