//! Kernel modules on disk: where they are, what they depend on, how they are compressed.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// All modules below one `lib/modules/<release>`.
#[derive(Debug)]
pub struct ModuleTree {
    paths: BTreeMap<String, PathBuf>,
}

/// One module, ready for `finit_module`.
#[derive(Clone, Debug)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The ELF file.
    pub image: Vec<u8>,
}

impl ModuleTree {
    /// Looks at every file name below `directory`.
    pub fn scan(directory: &Path) -> Result<Self> {
        let mut paths = BTreeMap::new();
        let mut pending = vec![directory.to_owned()];
        while let Some(directory) = pending.pop() {
            for entry in
                fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))?
            {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    pending.push(entry.path());
                } else if let Some(name) = module_name(&entry.file_name().to_string_lossy()) {
                    paths.insert(name, entry.path());
                }
            }
        }
        Ok(Self { paths })
    }

    /// The named modules and all they depend on, each after its dependencies. A name that has no file is taken to be
    /// built into the kernel.
    pub fn in_load_order(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut ordered = Vec::new();
        for name in names {
            self.visit(&name.replace('-', "_"), &mut ordered, 0)?;
        }
        Ok(ordered)
    }

    fn visit(&self, name: &str, ordered: &mut Vec<Module>, depth: usize) -> Result<()> {
        if depth > 32 {
            bail!("the dependencies of module {name} go in circles");
        }
        let Some(path) = self.paths.get(name) else {
            return Ok(());
        };
        if ordered.iter().any(|module: &Module| module.name == name) {
            return Ok(());
        }
        let image = read_image(path)?;
        for dependency in dependencies(&image) {
            self.visit(&dependency, ordered, depth + 1)?;
        }
        ordered.push(Module {
            name: name.to_owned(),
            image,
        });
        Ok(())
    }
}

fn module_name(file: &str) -> Option<String> {
    let stem = file
        .strip_suffix(".ko")
        .or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(stem.replace('-', "_"))
}

fn read_image(path: &Path) -> Result<Vec<u8>> {
    let raw = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    if path.extension().is_some_and(|extension| extension == "xz") {
        let mut image = Vec::new();
        lzma_rs::xz_decompress(&mut raw.as_slice(), &mut image)
            .map_err(|error| anyhow::anyhow!("{error:?}"))
            .with_context(|| format!("decompress {}", path.display()))?;
        return Ok(image);
    }
    Ok(raw)
}

/// The `depends=` entry of the module's `.modinfo`: NUL-terminated `key=value` strings.
fn dependencies(image: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = image.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &image[at + KEY.len()..];
    let end = value
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(value.len());
    let text = String::from_utf8_lossy(&value[..end]);
    text.split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_from_modinfo() {
        let image = b"\x7fELF..\0license=GPL\0depends=kvm,dm-mod\0name=x\0";
        assert_eq!(dependencies(image), ["kvm", "dm_mod"]);
        assert!(dependencies(b"license=GPL\0depends=\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }

    #[test]
    fn every_module_comes_after_what_it_needs() {
        let directory = tempfile::tempdir().unwrap();
        for (name, depends) in [
            ("a.ko", "b,c"),
            ("b.ko", "c"),
            ("c.ko", ""),
            ("unused.ko", ""),
        ] {
            fs::write(
                directory.path().join(name),
                format!("\0depends={depends}\0"),
            )
            .unwrap();
        }
        let tree = ModuleTree::scan(directory.path()).unwrap();
        let order: Vec<_> = tree
            .in_load_order(&["a", "built-in"])
            .unwrap()
            .into_iter()
            .map(|module| module.name)
            .collect();
        assert_eq!(order, ["c", "b", "a"]);
    }

    #[test]
    fn circles_are_an_error() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a.ko"), "\0depends=b\0").unwrap();
        fs::write(directory.path().join("b.ko"), "\0depends=a\0").unwrap();
        assert!(
            ModuleTree::scan(directory.path())
                .unwrap()
                .in_load_order(&["a"])
                .is_err()
        );
    }
}
