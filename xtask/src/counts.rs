//! Passed, failed, skipped: read from what test runners print, and added up.

use std::{fmt, ops::AddAssign};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Counts {
    pub(crate) const ONE_FAILED: Self = Self {
        passed: 0,
        failed: 1,
        skipped: 0,
    };
    pub(crate) const ONE_SKIPPED: Self = Self {
        passed: 0,
        failed: 0,
        skipped: 1,
    };

    /// `test result: ok. 3 passed; 0 failed; 1 ignored; …`, as libtest ends each of its runs,
    /// or `3 passed, 0 failed, 1 skipped`, as our own runner ends. `None` for any other line.
    pub(crate) fn of_line(line: &str) -> Option<Self> {
        let line = line.trim();
        if let Some(result) = line.strip_prefix("test result: ") {
            let (_, numbers) = result.split_once(". ")?;
            return Self::parse(numbers, ';', "ignored");
        }
        Self::parse(line, ',', "skipped").filter(|_| line.matches(',').count() == 2)
    }

    fn parse(text: &str, separator: char, skipped: &str) -> Option<Self> {
        let mut parts = text.split(separator).map(str::trim);
        let mut next = |word: &str| -> Option<u64> {
            parts.next()?.strip_suffix(word)?.trim_end().parse().ok()
        };
        Some(Self {
            passed: next("passed")?,
            failed: next("failed")?,
            skipped: next(skipped)?,
        })
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(passed: u64, failed: u64, skipped: u64) -> Counts {
        Counts {
            passed,
            failed,
            skipped,
        }
    }

    #[test]
    fn libtests_results_count_passing_or_not() {
        assert_eq!(
            Counts::of_line(
                "test result: ok. 12 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.01s"
            ),
            Some(counts(12, 0, 2))
        );
        assert_eq!(
            Counts::of_line(
                "test result: FAILED. 1 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s"
            ),
            Some(counts(1, 3, 0))
        );
    }

    #[test]
    fn the_last_line_of_our_own_runner_counts() {
        assert_eq!(
            Counts::of_line("7 passed, 1 failed, 2 skipped\n"),
            Some(counts(7, 1, 2))
        );
        assert_eq!(
            Counts::of_line(&counts(1, 2, 3).to_string()),
            Some(counts(1, 2, 3))
        );
    }

    #[test]
    fn other_lines_do_not_count() {
        for line in [
            "",
            "test engine::difference_in_last_byte ... ok",
            "test result: ok. many passed; 0 failed; 0 ignored",
            "7 passed",
            "7 passed, 1 failed, 2 skipped, 9 lost",
            "of 9: 7 passed, 1 failed, 2 skipped",
        ] {
            assert_eq!(Counts::of_line(line), None, "{line:?}");
        }
    }
}
