//! Sharing saves memory and changes nothing.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::Stage;
use crate::{changes, integrity::Integrity, proof, settle::settle};

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
    let status = stage.world.status()?;
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
    println!(
        "{} pages shared on {}: {} bytes claimed, the charge rose by {}: {:+.2}%",
        proof.pages_shared,
        proof.store_pages,
        proof.bytes_saved(),
        proof.rise(),
        proof.deviation() * 100.0
    );
    proof.check()?;
    stage.files_are_right()
}

/// Files that are read by `read()`, again and again, are shared in scope `clean` and in no other. Prints what that brings.
pub(super) fn clean_shares_more_than_readonly(stage: &mut Stage) -> Result<()> {
    const READ_TWICE: &str = "for i in 1 2; do find /usr/lib/python3* /usr/share/perl /usr/lib/postgresql \
                              -type f -exec cat {} + > /dev/null; done";
    let world = &mut stage.world;
    for guest in &mut world.guests {
        guest.output(&["sh", "-c", READ_TWICE])?;
    }
    let mut shared = Vec::new();
    for scope in ["readonly", "clean"] {
        for guest in &mut world.guests {
            guest.set("scope", scope)?;
        }
        settle(world, Instant::now())?;
        let status = world.status()?;
        println!(
            "scope {scope}: {} pages shared on {}, {} bytes saved",
            status.pages_shared, status.store_pages, status.bytes_saved
        );
        for guest in &mut world.guests {
            let mut figures = String::new();
            for name in [
                "pages_tracked",
                "files_tracked",
                "tracker_bytes",
                "last_pass_usecs",
            ] {
                figures += &format!(" {name} {}", guest.counter(name)?);
            }
            println!("scope {scope}: {}:{figures}", guest.name());
        }
        shared.push(status.pages_shared);
    }
    for guest in &mut world.guests {
        guest.set("scope", "readonly")?;
    }
    ensure!(
        shared[1] > shared[0] + shared[0] / 4,
        "{} pages are shared in scope clean, {} in readonly",
        shared[1],
        shared[0]
    );
    stage.files_are_right()
}

pub(super) fn a_write_is_seen_by_its_guest_alone(stage: &mut Stage) -> Result<()> {
    let seed = stage.seed();
    let mut integrity = Integrity::default();
    changes::run(&mut stage.world, &mut integrity, seed)?;
    integrity.verdict()
}
