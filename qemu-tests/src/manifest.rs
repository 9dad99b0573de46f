//! What the files of the guest image must contain.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result, ensure};

use crate::protocol::FileSum;

/// SHA-256 by path.
#[derive(Clone, Debug)]
pub struct Manifest {
    sums: BTreeMap<String, String>,
}

impl Manifest {
    /// Reads what `sha256sum` wrote.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> Result<Self> {
        let mut sums = BTreeMap::new();
        for (number, line) in text.lines().enumerate() {
            let (sum, path) = line
                .split_once("  ")
                .with_context(|| format!("line {} has no path", number + 1))?;
            let hash = sum.len() == 64 && sum.bytes().all(|byte| byte.is_ascii_hexdigit());
            ensure!(hash, "line {} has no SHA-256", number + 1);
            // Paths are absolute in the guest, whatever they were relative to when the manifest was made.
            let path = format!("/{}", path.trim_start_matches("./").trim_start_matches('/'));
            sums.insert(path, sum.to_owned());
        }
        ensure!(!sums.is_empty(), "the manifest is empty");
        Ok(Self { sums })
    }

    /// Whether the image has this file.
    pub fn has(&self, path: &str) -> bool {
        self.sums.contains_key(path)
    }

    /// What is wrong with a file, if anything. A file the image does not have needs only to read as it maps.
    pub fn compare(&self, sum: &FileSum) -> Result<(), String> {
        let (Some(by_read), Some(by_map)) = (&sum.by_read, &sum.by_map) else {
            return Err(format!(
                "{}: {}",
                sum.path,
                sum.error.as_deref().unwrap_or("no hash")
            ));
        };
        if by_read != by_map {
            return Err(format!(
                "{}: read gives {by_read}, its mapping {by_map}",
                sum.path
            ));
        }
        match self.sums.get(&sum.path) {
            Some(expected) if expected != by_read => Err(format!(
                "{}: is {by_read}, in the image {expected}",
                sum.path
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest::parse(&format!(
            "{}  /usr/bin/a\n{}  ./usr/bin/with  two blanks\n",
            "a".repeat(64),
            "b".repeat(64)
        ))
        .unwrap()
    }

    fn sum(path: &str, read: char, map: char) -> FileSum {
        let hash = |digit: char| Some(digit.to_string().repeat(64));
        FileSum {
            path: path.into(),
            bytes: 1,
            by_read: hash(read),
            by_map: hash(map),
            error: None,
        }
    }

    #[test]
    fn lines_are_parsed() {
        assert!(manifest().has("/usr/bin/a") && manifest().has("/usr/bin/with  two blanks"));
        assert!(!manifest().has("/usr/bin/c"));
        for wrong in [
            "",
            "abc  /x",
            &"a".repeat(64),
            &format!("{}  /x", "g".repeat(64)),
        ] {
            assert!(Manifest::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn differences_are_found() {
        let manifest = manifest();
        assert_eq!(manifest.compare(&sum("/usr/bin/a", 'a', 'a')), Ok(()));
        assert!(
            manifest
                .compare(&sum("/usr/bin/a", 'b', 'b'))
                .unwrap_err()
                .contains("in the image")
        );
        assert!(
            manifest
                .compare(&sum("/usr/bin/a", 'a', 'b'))
                .unwrap_err()
                .contains("its mapping")
        );
        assert_eq!(manifest.compare(&sum("/var/new", 'c', 'c')), Ok(()));
        let unread = FileSum {
            by_read: None,
            error: Some("gone".into()),
            ..sum("/usr/bin/a", 'a', 'a')
        };
        assert!(manifest.compare(&unread).unwrap_err().contains("gone"));
    }
}
