//! Proof from outside: what the memory cgroup says with sharing and without it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{cgroup::uncertainty, frames, guest::Guest, khugepaged, world::World};

/// The charge and our own counters may differ by this fraction.
const AGREEMENT: f64 = 0.02;
/// The longest the counters may go on moving once the guests stand still.
const STILL_LIMIT: Duration = Duration::from_secs(60);

/// What the host uses at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// Bytes charged to the memory cgroup.
    pub charge: u64,
    /// Distinct frames mapped by QEMU processes and the daemon.
    pub frames: u64,
}

/// The same guests, at the same instruction, with and without sharing.
#[derive(Clone, Copy, Debug)]
pub struct Proof {
    /// With sharing.
    pub shared: Reading,
    /// After `undo --all`.
    pub unshared: Reading,
    /// What our counters claimed before the undo, all metadata subtracted.
    pub net_shared: i64,
    /// What they claimed after it: nothing, less the metadata that stays.
    pub net_unshared: i64,
    /// Pages that were shared then.
    pub pages_shared: u64,
    /// Canonical pages there were then.
    pub store_pages: u64,
}

impl Proof {
    /// By how much the charge rose.
    pub fn rise(&self) -> i64 {
        self.unshared.charge as i64 - self.shared.charge as i64
    }

    /// By how much our counters fell. Metadata that an undo keeps (what each guest has, so that sharing can be built
    /// again) is in both readings of the charge, and so it must be in both of the counters.
    pub fn bytes_saved(&self) -> i64 {
        self.net_shared - self.net_unshared
    }

    /// How far the claim is from the charge, as a fraction of the charge's rise.
    pub fn deviation(&self) -> f64 {
        (self.bytes_saved() - self.rise()) as f64 / self.rise() as f64
    }

    /// As [`Self::check`] for few pages on the nested host, whose kernel keeps what the mappings took: the charge then
    /// rises by more than is claimed, but by no more than the pages come to without any metadata. With so few, it counts
    /// how exactly the two readings can be known.
    pub fn check_nested(&self) -> Result<()> {
        self.check_nested_readings(2 * uncertainty() as i64)
    }

    /// The same where two readings may be off by so many bytes.
    fn check_nested_readings(&self, readings: i64) -> Result<()> {
        let pages = self.pages_shared.saturating_sub(self.store_pages);
        let gross = pages as i64 * 4096;
        let most = gross + (gross as f64 * AGREEMENT) as i64 + readings;
        if self.net_shared > 0 && (self.bytes_saved() - readings..=most).contains(&self.rise()) {
            return Ok(());
        }
        self.check()
    }

    /// Fails unless memory was saved, and as much as claimed.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.rise() > 0,
            "no memory was saved: the charge changed by {} bytes on undo",
            self.rise()
        );
        ensure!(
            self.net_shared > 0,
            "the metadata costs more than sharing saves: {} bytes net",
            self.net_shared
        );
        let deviation = self.deviation();
        ensure!(
            deviation.abs() <= AGREEMENT,
            "the counters claim {} bytes saved, the charge rose by {} on undo: {:+.2}%, allowed {:.0}% \
             ({} guest pages on {} canonical ones, {} frames more after the undo)",
            self.bytes_saved(),
            self.rise(),
            deviation * 100.0,
            AGREEMENT * 100.0,
            self.pages_shared,
            self.store_pages,
            self.unshared.frames as i64 - self.shared.frames as i64
        );
        Ok(())
    }
}

/// Takes both readings with the guests paused. Afterwards the guests run and sharing may start again.
pub fn take(world: &mut World) -> Result<Proof> {
    world.guests.iter_mut().try_for_each(Guest::pause)?;
    let proof = readings(world);
    // Whatever the readings were: paused guests would fail everything that follows for a reason of their own.
    world.guests.iter_mut().try_for_each(Guest::resume)?;
    let proof = proof?;
    world.site.ctl(&["resume", "--all"])?;
    Ok(proof)
}

fn readings(world: &mut World) -> Result<Proof> {
    let _asleep = khugepaged::Asleep::now()?;
    let (shared, status) = still(world).context("the reading with sharing")?;
    world.site.ctl(&["undo", "--all"])?;
    let (unshared, after) = still(world).context("the reading without sharing")?;
    ensure!(
        after.pages_shared == 0,
        "{} pages are still shared after the undo",
        after.pages_shared
    );
    Ok(Proof {
        shared,
        unshared,
        net_shared: status.bytes_saved,
        net_unshared: after.bytes_saved,
        pages_shared: status.pages_shared,
        store_pages: status.store_pages,
    })
}

/// A reading during which our counters did not move.
fn still(world: &World) -> Result<(Reading, crate::daemon::Status)> {
    let deadline = Instant::now() + STILL_LIMIT;
    loop {
        let before = world.status()?;
        let reading = Reading {
            frames: frames::distinct(&world.pids())?,
            charge: world.cgroup.charge()?,
        };
        let after = world.status()?;
        if before.pages_shared == after.pages_shared && before.store_pages == after.store_pages {
            return Ok((reading, after));
        }
        ensure!(
            Instant::now() < deadline,
            "the counters still move though the guests stand still"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proof(rise: i64, claim: i64) -> Proof {
        let reading = |charge| Reading { charge, frames: 0 };
        let shared = 1 << 30;
        Proof {
            shared: reading(shared as u64),
            unshared: reading((shared + rise) as u64),
            net_shared: claim - 5000,
            net_unshared: -5000,
            pages_shared: 0,
            store_pages: 0,
        }
    }

    #[test]
    fn a_claim_within_two_percent_holds() {
        assert!(proof(100_000_000, 100_000_000).check().is_ok());
        assert!(proof(100_000_000, 98_000_000).check().is_ok());
        assert!(proof(100_000_000, 102_000_000).check().is_ok());
    }

    #[test]
    fn a_claim_beyond_does_not() {
        assert!(proof(100_000_000, 97_900_000).check().is_err());
        assert!(proof(100_000_000, 102_100_000).check().is_err());
        assert!(proof(100_000_000, -1).check().is_err());
    }

    #[test]
    fn on_the_nested_host_the_charge_may_rise_by_the_metadata_too() {
        let nested = |rise, claim| {
            let proof = Proof {
                pages_shared: 20_000,
                store_pages: 10_000,
                ..proof(rise, claim)
            };
            proof.check_nested_readings(1 << 20).is_ok()
        };
        assert!(nested(40_000_000, 38_000_000));
        assert!(
            !nested(43_000_000, 38_000_000),
            "more than the pages come to"
        );
        assert!(!nested(36_000_000, 38_000_000), "less than was claimed");
        assert!(!nested(0, -5), "nothing saved");
    }

    #[test]
    fn nothing_saved_is_a_failure_whatever_is_claimed() {
        assert!(proof(0, 0).check().is_err());
        assert!(proof(-4096, -4096).check().is_err());
    }
}
