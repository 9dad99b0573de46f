//! Sharing saves memory and changes nothing.

use anyhow::{Result, ensure};

use super::Stage;
use crate::{changes, integrity::Integrity, proof};

/// What two freshly booted guests must share at least; a bare system maps more than three times that.
const FEWEST: u64 = 2000;

pub(super) fn two_guests_share(stage: &mut Stage) -> Result<()> {
    for guest in 0..2 {
        let shared = stage.shared_by(guest)?;
        ensure!(
            shared >= FEWEST,
            "guest {guest} shares {shared} pages, at least {FEWEST} were expected"
        );
    }
    let status = stage.world.site.status()?;
    let (pages, store) = (status.pages_shared, status.store_pages);
    ensure!(
        pages > store,
        "{pages} guest pages on {store} canonical ones save nothing"
    );
    for guest in &mut stage.world.guests {
        let (said, counted) = (
            guest.counter("pages_shared")?,
            status.vm(guest.name())?.pages_shared,
        );
        ensure!(
            said > 0,
            "{}: the module says it shares nothing, the host {counted}",
            guest.name()
        );
    }
    stage.files_are_right()
}

pub(super) fn the_charge_falls_by_what_we_claim(stage: &mut Stage) -> Result<()> {
    let proof = proof::take(&mut stage.world)?;
    proof.check()?;
    stage.files_are_right()
}

pub(super) fn a_write_is_seen_by_its_guest_alone(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let mut integrity = Integrity::default();
    changes::run(&mut stage.world, &mut integrity, seed)?;
    integrity.verdict()
}
