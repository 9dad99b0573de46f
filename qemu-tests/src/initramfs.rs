//! Builds the initramfs that every machine boots from.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use cpio::newc;

use crate::{artifacts::Artifacts, kmod::ModuleTree};

/// Drivers a guest needs before it has a root.
const GUEST_MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "ext4", "virtio_rng"];
/// What a guest needs for file systems that the kernel has not built in.
pub const FILESYSTEM_MODULES: [&str; 5] = ["xfs", "btrfs", "erofs", "squashfs", "overlay"];
/// Drivers a lab host needs on top of that.
const LAB_MODULES: [&str; 1] = ["kvm-amd"];

/// For a guest: drivers and `more` modules, `pf-init`, `pf-init` again as the agent, and the module.
pub fn build_guest(artifacts: &Artifacts, more: &[&str], target: &Path) -> Result<()> {
    if let Some(ready) = &artifacts.guest_initramfs {
        fs::copy(ready, target).with_context(|| format!("copy {}", ready.display()))?;
        return Ok(());
    }
    let mut archive = Archive::create(target)?;
    archive.init(artifacts)?;
    let modules: Vec<_> = GUEST_MODULES.iter().chain(more).copied().collect();
    archive.modules(&artifacts.modules_dir, &modules)?;
    archive.directory("run")?;
    archive.directory("run/pagefusion")?;
    // The same program is the agent when it is not the first process.
    archive.file(
        "run/pagefusion/agent",
        0o755,
        &read(&artifacts.program("pf-init")?)?,
    )?;
    if let Some(module) = &artifacts.module_ko {
        archive.file("run/pagefusion/pagefusion.ko", 0o644, &read(module)?)?;
    }
    archive.finish()
}

/// For a lab host: drivers and `pf-init`; everything else is on its second disk.
pub fn build_lab(artifacts: &Artifacts, target: &Path) -> Result<()> {
    let mut archive = Archive::create(target)?;
    archive.init(artifacts)?;
    let modules: Vec<_> = GUEST_MODULES.into_iter().chain(LAB_MODULES).collect();
    let directory = artifacts.lab_modules_dir.as_ref();
    archive.modules(directory.unwrap_or(&artifacts.modules_dir), &modules)?;
    archive.finish()
}

struct Archive {
    output: BufWriter<File>,
    inode: u32,
}

impl Archive {
    fn create(target: &Path) -> Result<Self> {
        let file = File::create(target).with_context(|| format!("create {}", target.display()))?;
        Ok(Self {
            output: BufWriter::new(file),
            inode: 1,
        })
    }

    fn init(&mut self, artifacts: &Artifacts) -> Result<()> {
        let path = artifacts.program("pf-init")?;
        let image = read(&path)?;
        ensure!(
            !names_interpreter(&image),
            "{} is dynamically linked; build it with `cargo rustc --release -p qemu-tests --bin pf-init -- -C \
             target-feature=+crt-static`",
            path.display()
        );
        for directory in ["dev", "proc", "sys", "tmp", "newroot"] {
            self.directory(directory)?;
        }
        self.device("dev/console", 5, 1)?;
        self.file("init", 0o755, &image)
    }

    fn modules(&mut self, directory: &Path, names: &[&str]) -> Result<()> {
        let tree = ModuleTree::scan(directory)?;
        self.directory("modules")?;
        let mut order = String::new();
        for module in tree.in_load_order(names)? {
            let name = format!("{}.ko", module.name);
            self.file(&format!("modules/{name}"), 0o644, &module.image)?;
            order.push_str(&name);
            order.push('\n');
        }
        self.file("modules/order", 0o644, order.as_bytes())
    }

    fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(self.header(name).mode(0o040_755), &[])
    }

    fn device(&mut self, name: &str, major: u32, minor: u32) -> Result<()> {
        self.entry(
            self.header(name)
                .mode(0o020_600)
                .rdev_major(major)
                .rdev_minor(minor),
            &[],
        )
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(self.header(name).mode(0o100_000 | mode), content)
    }

    fn header(&self, name: &str) -> newc::Builder {
        newc::Builder::new(name).ino(self.inode).nlink(1)
    }

    fn entry(&mut self, header: newc::Builder, content: &[u8]) -> Result<()> {
        self.inode += 1;
        let mut writer = header.write(&mut self.output, u32::try_from(content.len())?);
        writer.write_all(content).context("write the initramfs")?;
        writer.finish().context("write the initramfs")?;
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        newc::trailer(&mut self.output).context("write the initramfs")?;
        self.output.flush().context("write the initramfs")
    }
}

/// A dynamically linked program cannot run in an initramfs that holds nothing else.
fn names_interpreter(elf: &[u8]) -> bool {
    let word = |at: usize| {
        elf.get(at..at + 8)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u64::from_le_bytes)
    };
    let half = |at: usize| {
        elf.get(at..at + 2)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u16::from_le_bytes)
    };
    let (table, size, count) = (word(32), half(54), half(56));
    (0..count).any(|index| {
        let at = table as usize + usize::from(index) * usize::from(size);
        elf.get(at..at + 4) == Some(&3_u32.to_le_bytes())
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_recognised() {
        // The test program itself is linked dynamically on every machine these tests run on.
        assert!(names_interpreter(&fs::read("/proc/self/exe").unwrap()));
        assert!(!names_interpreter(b"\x7fELF"));
    }
}
