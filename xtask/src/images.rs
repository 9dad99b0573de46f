//! Disk images: the guest that shares its pages, file systems it may have besides, and the lab host with real KVM.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::Result;

use crate::{
    cache::Cache,
    kernel::Unpacked,
    key::{Key, KeyBuilder},
    pins::Pin,
    rootfs,
    sets::{FILESYSTEMS, GUEST, LAB},
    space,
};

#[derive(Debug)]
pub(crate) struct GuestImage {
    pub(crate) image: PathBuf,
    /// `sha256sum`'s list of every regular file below /usr.
    pub(crate) manifest: PathBuf,
}

/// A file put into an image beside the packages.
struct Asset {
    path: &'static str,
    mode: u32,
    content: &'static str,
}

const GUEST_ASSETS: &[Asset] = &[
    Asset {
        path: "opt/pagefusion/server.py",
        mode: 0o644,
        content: include_str!("../assets/guest/server.py"),
    },
    Asset {
        path: "etc/systemd/system/pagefusion-python.service",
        mode: 0o644,
        content: include_str!("../assets/guest/pagefusion-python.service"),
    },
    Asset {
        path: "etc/systemd/system/pagefusion-agent.service",
        mode: 0o644,
        content: include_str!("../assets/guest/pagefusion-agent.service"),
    },
    Asset {
        path: "customize.sh",
        mode: 0o755,
        content: include_str!("../assets/guest/customize.sh"),
    },
];

const GUEST_FINISH: &str = r#"
    echo "I: customizing"
    cp -r "$dir/assets/." "$dir/root/"
    chroot "$dir/root" sh /customize.sh
    rm "$dir/root/customize.sh"
    echo "I: checksums of /usr"
    chroot "$dir/root" find /usr -xdev -type f -exec sha256sum {} + > "$dir/unsorted"
    LC_ALL=C sort -k 2 "$dir/unsorted" > "$dir/image.sha256"
    rm "$dir/unsorted"
    echo "I: making the file system"
    mkfs.ext4 -q -L guest -U 7d1c2f60-3c53-4c0e-9a2c-70616765667e -m 0 \
        -E lazy_itable_init=0,lazy_journal_init=0,hash_seed=7d1c2f60-3c53-4c0e-9a2c-70616765667e \
        -d "$dir/root" "$dir/image.ext4" 2560M
    rm -rf "$dir/root" "$dir/assets"
"#;

const LAB_FINISH: &str = r#"
    echo "I: adding the kernel's modules"
    mkdir -p "$dir/root/usr/lib/modules"
    cp -r "$dir/modules/." "$dir/root/usr/lib/modules/"
    printf 'lab\n' > "$dir/root/etc/hostname"
    echo "I: making the file system"
    mkfs.ext4 -q -L lab -m 0 -E lazy_itable_init=0,lazy_journal_init=0 -d "$dir/root" "$dir/image.ext4" 2560M
    rm -rf "$dir/root" "$dir/modules"
"#;

/// The same real files in a file system of each kind, in images called after it.
const FILESYSTEMS_FINISH: &str = r#"
    echo "I: choosing files"
    mkdir "$dir/root/tree" "$dir/root/images"
    # Nothing is mounted in there, and mkfs.btrfs wants to read that.
    mkdir "$dir/root/proc/self"
    touch "$dir/root/proc/mounts" "$dir/root/proc/self/mounts"
    cp "$dir/root/usr/bin/perl" "$dir/root/tree/program"
    cp "$dir/root/usr/lib/x86_64-linux-gnu/libc.so.6" "$dir/root/tree/library"
    cp "$dir/root/usr/bin/bash" "$dir/root/tree/shell"
    (cd "$dir/root/tree" && sha256sum library program shell) > "$dir/files.sha256"
    cat > "$dir/root/prototype" <<END
/none
0 0
d--755 0 0
library ---755 0 0 /tree/library
program ---755 0 0 /tree/program
shell ---755 0 0 /tree/shell
$
END
    echo "I: making the file systems"
    uuid=7d1c2f60-3c53-4c0e-9a2c-70616765667
    chroot "$dir/root" sh -euxc '
        PATH=/usr/sbin:/usr/bin:/sbin:/bin
        uuid=$1
        cd /images
        truncate -s 48M ext4
        mkfs.ext4 -q -m 0 -U ${uuid}0 -E lazy_itable_init=0,lazy_journal_init=0,hash_seed=${uuid}0 -d /tree ext4
        truncate -s 320M xfs
        mkfs.xfs -q -m uuid=${uuid}1 -p /prototype xfs
        truncate -s 160M btrfs
        mkfs.btrfs -q -U ${uuid}2 --rootdir /tree btrfs
        mkfs.erofs -T 0 -U ${uuid}3 -z lz4 erofs /tree
        mksquashfs /tree squashfs -noappend -no-progress -all-time 0 -comp zstd
    ' sh "$uuid"
    mv "$dir/root/images" "$dir/images"
    rm -rf "$dir/root"
"#;

/// A directory: `images/`, with `ext4`, `xfs`, `btrfs`, `erofs` and `squashfs` in it, and `files.sha256`, what `sha256sum` says of
/// the files in each of them.
pub(crate) fn filesystems(cache: &Cache) -> Result<PathBuf> {
    let key = |pins: &[Pin]| key("filesystems", pins, &[], FILESYSTEMS_FINISH, "");
    let pins = FILESYSTEMS.available(cache, key)?;
    cache.entry(&key(&pins), "the file system images", |build| {
        space::require(cache.root(), 700 * space::MIB, "the file system images")?;
        rootfs::make(cache, build, &FILESYSTEMS, &pins, FILESYSTEMS_FINISH)
    })
}

pub(crate) fn guest(cache: &Cache) -> Result<GuestImage> {
    let key = |pins: &[Pin]| key("guest", pins, GUEST_ASSETS, GUEST_FINISH, "");
    let pins = GUEST.available(cache, key)?;
    let entry = cache.entry(&key(&pins), "the guest image", |build| {
        space::require(cache.root(), 3000 * space::MIB, "the guest image")?;
        write_assets(&build.dir.join("assets"), GUEST_ASSETS)?;
        rootfs::make(cache, build, &GUEST, &pins, GUEST_FINISH)
    })?;
    Ok(GuestImage {
        image: entry.join("image.ext4"),
        manifest: entry.join("image.sha256"),
    })
}

/// The lab host needs no services: the tests bring their own first process.
pub(crate) fn lab(cache: &Cache, kernel: &Unpacked) -> Result<PathBuf> {
    let key = |pins: &[Pin]| key("lab", pins, &[], LAB_FINISH, &kernel.key);
    let pins = LAB.available(cache, key)?;
    let entry = cache.entry(&key(&pins), "the lab host's image", |build| {
        space::require(cache.root(), 3000 * space::MIB, "the lab host's image")?;
        std::os::unix::fs::symlink(
            kernel.modules.parent().unwrap_or(Path::new("/")),
            build.dir.join("modules"),
        )?;
        rootfs::make(cache, build, &LAB, &pins, LAB_FINISH)
    })?;
    Ok(entry.join("image.ext4"))
}

fn key(kind: &str, pins: &[Pin], assets: &[Asset], finish: &str, more: &str) -> Key {
    let mut key = KeyBuilder::new(kind)
        .with(rootfs::RECIPE)
        .with(finish)
        .with(more);
    for asset in assets {
        key = key
            .with(asset.path)
            .with(asset.mode.to_le_bytes())
            .with(asset.content);
    }
    for pin in pins {
        key = key.with(&pin.sha256);
    }
    key.finish()
}

fn write_assets(dir: &Path, assets: &[Asset]) -> Result<()> {
    for asset in assets {
        let path = dir.join(asset.path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, asset.content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(asset.mode))?;
    }
    Ok(())
}
