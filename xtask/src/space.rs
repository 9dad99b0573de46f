//! Is there room for what is about to be made?

use std::path::Path;

use anyhow::{Context, Result};

use crate::trouble::Trouble;

pub(crate) const MIB: u64 = 1 << 20;

/// Fails with a message that names the shortage if `place` has less than `needed` bytes free.
pub(crate) fn require(place: &Path, needed: u64, what: &str) -> Result<()> {
    let stat = rustix::fs::statvfs(place)
        .with_context(|| format!("cannot ask {} for its free space", place.display()))?;
    Ok(check(
        place,
        stat.f_bavail.saturating_mul(stat.f_frsize),
        needed,
        what,
    )?)
}

fn check(place: &Path, free: u64, needed: u64, what: &str) -> Result<(), Trouble> {
    if free >= needed {
        return Ok(());
    }
    Err(Trouble::DiskTooSmall {
        what: what.to_owned(),
        needed,
        free,
        place: place.to_owned(),
    })
}

/// Bytes in the unit a person would choose.
pub(crate) fn human(bytes: u64) -> String {
    if bytes >= 1 << 30 {
        let tenths = (bytes * 10) >> 30;
        format!("{}.{} GiB", tenths / 10, tenths % 10)
    } else {
        format!("{} MiB", bytes.div_ceil(MIB))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_space_is_told_with_both_sizes_the_place_and_the_cure() {
        let error = check(
            Path::new("/small"),
            300 * MIB,
            (5 << 30) / 2,
            "the guest image",
        )
        .unwrap_err();
        let text = error.to_string();
        for part in [
            "the guest image needs 2.5 GiB",
            "/small has 300 MiB free",
            "PAGEFUSION_CACHE",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
    }

    #[test]
    fn exactly_enough_space_is_enough() {
        assert!(check(Path::new("/"), MIB, MIB, "x").is_ok());
        assert!(check(Path::new("/"), MIB - 1, MIB, "x").is_err());
    }

    #[test]
    fn sizes_round_up_so_that_nothing_is_called_empty() {
        assert_eq!(human(1), "1 MiB");
        assert_eq!(human(3 << 30), "3.0 GiB");
    }
}
