//! Names for cache entries that carry a hash of everything the entry is made of.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

/// The name of a cache entry: what it is, and 16 hexadecimal digits over its ingredients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key(String);

impl Key {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The entry's kind: the name without the hash.
    pub(crate) fn kind(&self) -> &str {
        self.0.rsplit_once('-').map_or(&self.0, |(kind, _)| kind)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Collects ingredients. Each is framed by its length, so that moving a byte
/// from one ingredient to the next changes the key.
#[derive(Debug, Clone)]
pub(crate) struct KeyBuilder {
    kind: String,
    hash: Sha256,
}

impl KeyBuilder {
    pub(crate) fn new(kind: &str) -> Self {
        let mut builder = Self {
            kind: kind.to_owned(),
            hash: Sha256::new(),
        };
        builder.add(kind.as_bytes());
        builder
    }

    fn add(&mut self, bytes: &[u8]) {
        self.hash.update((bytes.len() as u64).to_le_bytes());
        self.hash.update(bytes);
    }

    pub(crate) fn with(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.add(bytes.as_ref());
        self
    }

    /// Adds the names and contents of all files under `paths`, which are relative to `base`.
    /// A path that does not exist counts as empty.
    pub(crate) fn with_files(mut self, base: &Path, paths: &[&str]) -> io::Result<Self> {
        for file in files_under(base, paths)? {
            self.add(file.as_os_str().as_encoded_bytes());
            self.add(&fs::read(base.join(file))?);
        }
        Ok(self)
    }

    pub(crate) fn finish(self) -> Key {
        let digest = hex(&self.hash.finalize());
        Key(format!("{}-{}", self.kind, &digest[..16]))
    }
}

/// All regular files under `paths`, sorted, relative to `base`. Build products and hidden files are left out.
pub(crate) fn files_under(base: &Path, paths: &[&str]) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut todo: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
    while let Some(path) = todo.pop() {
        let metadata = match fs::metadata(base.join(&path)) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if metadata.is_file() {
            found.push(path);
            continue;
        }
        for entry in fs::read_dir(base.join(&path))? {
            let name = entry?.file_name();
            if !is_build_product(&name.to_string_lossy()) {
                todo.push(path.join(name));
            }
        }
    }
    found.sort();
    Ok(found)
}

fn is_build_product(name: &str) -> bool {
    const ENDINGS: [&str; 6] = [".o", ".ko", ".mod", ".mod.c", ".rmeta", ".cmd"];
    name.starts_with('.') || name == "target" || ENDINGS.iter().any(|end| name.ends_with(end))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_ingredients_give_equal_keys() {
        let key = || KeyBuilder::new("guest").with("a").with("b").finish();
        assert_eq!(key(), key());
        assert_eq!(key().kind(), "guest");
    }

    #[test]
    fn any_change_of_an_ingredient_changes_the_key() {
        let key = |parts: &[&str]| {
            parts
                .iter()
                .fold(KeyBuilder::new("guest"), KeyBuilder::with)
                .finish()
        };
        let base = key(&["ab", "c"]);
        assert_ne!(base, key(&["ab", "d"]));
        assert_ne!(base, key(&["a", "bc"]));
        assert_ne!(base, key(&["ab", "c", ""]));
        assert_ne!(
            base,
            KeyBuilder::new("lab").with("ab").with("c").finish(),
            "the kind is an ingredient too"
        );
    }

    #[test]
    fn sources_count_by_name_and_content_and_build_products_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let key = || {
            KeyBuilder::new("module")
                .with_files(dir.path(), &["src", "Kbuild"])
                .unwrap()
                .finish()
        };
        fs::create_dir(dir.path().join("src")).unwrap();
        fs::write(dir.path().join("src/a.rs"), "1").unwrap();
        let first = key();
        fs::write(dir.path().join("src/a.o"), "object").unwrap();
        fs::write(dir.path().join("src/.a.o.cmd"), "command").unwrap();
        assert_eq!(first, key());
        fs::write(dir.path().join("src/a.rs"), "2").unwrap();
        let second = key();
        assert_ne!(first, second);
        fs::rename(dir.path().join("src/a.rs"), dir.path().join("src/b.rs")).unwrap();
        assert_ne!(second, key());
    }
}
