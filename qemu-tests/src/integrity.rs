//! Looks for bytes that are wrong.

use anyhow::{Context, Result, ensure};

use crate::{
    guest::Guest,
    manifest::Manifest,
    protocol::{FileSum, Op},
    services::Load,
};

/// What was looked at and what was wrong.
#[derive(Clone, Debug, Default)]
pub struct Integrity {
    /// Comparisons made.
    pub checks: u64,
    /// Those that failed.
    pub errors: Vec<String>,
}

impl Integrity {
    /// Counts one comparison.
    pub fn check(&mut self, right: bool, what: impl FnOnce() -> String) {
        self.checks += 1;
        if !right {
            self.errors.push(what());
        }
    }

    /// Counts one comparison of two values.
    pub fn equal(&mut self, what: &str, found: &str, expected: &str) {
        self.check(found == expected, || {
            format!("{what}: found {found}, expected {expected}")
        });
    }

    /// Fails when anything was wrong.
    pub fn verdict(&self) -> Result<()> {
        ensure!(self.checks > 0, "nothing was checked");
        let shown: Vec<_> = self.errors.iter().take(5).map(String::as_str).collect();
        ensure!(
            self.errors.is_empty(),
            "{} of {} checks failed: {}",
            self.errors.len(),
            self.checks,
            shown.join("; ")
        );
        Ok(())
    }

    /// Every file that a process in the guest maps, by `read` and through a mapping.
    pub fn mapped_files(&mut self, guest: &mut Guest, manifest: &Manifest) -> Result<()> {
        let mut paths: Vec<String> = guest.request(Op::MappedFiles)?;
        paths.retain(|path| manifest.has(path));
        ensure!(
            paths.len() >= 20,
            "{}: only {} files of the image are mapped",
            guest.name(),
            paths.len()
        );
        for sum in sums(guest, paths)? {
            let verdict = manifest.compare(&sum);
            // Both ways of reading were compared.
            self.checks += 1;
            self.check(verdict.is_ok(), || {
                format!("{}: {}", guest.name(), verdict.err().unwrap_or_default())
            });
        }
        Ok(())
    }

    /// What runs in the guest does its work.
    pub fn services(&mut self, guest: &mut Guest, load: Load) -> Result<()> {
        if load == Load::Whole {
            self.database(guest)?;
        }
        const FETCH: &str = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:80/', timeout=60).status)";
        let status = guest.output(&["python3", "-c", FETCH])?;
        self.equal(
            &format!("{}: nginx's answer", guest.name()),
            status.trim(),
            "200",
        );
        Ok(())
    }

    fn database(&mut self, guest: &mut Guest) -> Result<()> {
        const SQL: &str = "drop table if exists pagefusion; create table pagefusion(x bigint); \
                           insert into pagefusion select generate_series(1, 10000); checkpoint; \
                           select sum(x) from pagefusion";
        let sum = guest.output(&["runuser", "-u", "postgres", "--", "psql", "-qAtc", SQL])?;
        self.equal(
            &format!("{}: PostgreSQL's sum", guest.name()),
            sum.trim(),
            "50005000",
        );
        Ok(())
    }

    /// One file must have this hash, read and mapped.
    pub fn file(&mut self, guest: &mut Guest, path: &str, expected: &str) -> Result<()> {
        let sum = sums(guest, vec![path.to_owned()])?
            .pop()
            .context("no hash came back")?;
        for (how, hash) in [("read", &sum.by_read), ("mapped", &sum.by_map)] {
            let found = hash
                .as_deref()
                .or(sum.error.as_deref())
                .unwrap_or("nothing");
            self.equal(&format!("{}: {path}, {how}", guest.name()), found, expected);
        }
        Ok(())
    }

    /// A mapping that has been there all the time must show this.
    pub fn held(&mut self, guest: &mut Guest, path: &str, expected: &str) -> Result<()> {
        let found: String = guest.request(Op::HeldSum {
            path: path.to_owned(),
        })?;
        self.equal(
            &format!("{}: {path}, mapped since before", guest.name()),
            &found,
            expected,
        );
        Ok(())
    }
}

/// The hashes of files in a guest.
pub(crate) fn sums(guest: &mut Guest, paths: Vec<String>) -> Result<Vec<FileSum>> {
    guest.request(Op::Checksum { paths })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_checks_are_no_success() {
        assert!(Integrity::default().verdict().is_err());
    }

    #[test]
    fn one_wrong_byte_is_a_failure() {
        let mut integrity = Integrity::default();
        integrity.equal("a", "1", "1");
        assert!(integrity.verdict().is_ok());
        integrity.equal("b", "1", "2");
        let text = integrity.verdict().unwrap_err().to_string();
        assert!(
            text.contains("1 of 2") && text.contains("b: found 1, expected 2"),
            "{text}"
        );
    }
}
