//! What must hold, one function for each sentence.
//!
//! Scenarios share running guests: booting one takes most of a minute. Each gets a [`Stage`] with as many healthy,
//! sharing guests as it asks for; guests that the scenario before broke are replaced.

mod isolation;
mod lifecycle;
mod sharing;

use std::{path::Path, time::Instant};

use anyhow::{Context, Result};

use crate::{
    artifacts::Artifacts,
    integrity::Integrity,
    protocol::Op,
    settle::settle,
    world::{Host, World},
};

/// One scenario.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name, and what it shows.
    pub name: &'static str,
    /// Sharing guests it needs.
    pub guests: usize,
    /// What it does.
    pub run: fn(&mut Stage) -> Result<()>,
}

/// All of them, in the order that needs the fewest boots.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "qemu_runs_without_a_daemon",
        guests: 0,
        run: isolation::qemu_runs_without_a_daemon,
    },
    Scenario {
        name: "module_leaves_foreign_ivshmem_alone",
        guests: 0,
        run: isolation::module_leaves_foreign_ivshmem,
    },
    Scenario {
        name: "two_guests_share",
        guests: 2,
        run: sharing::two_guests_share,
    },
    Scenario {
        name: "the_charge_falls_by_what_we_claim",
        guests: 2,
        run: sharing::the_charge_falls_by_what_we_claim,
    },
    Scenario {
        name: "a_write_is_seen_by_its_guest_alone",
        guests: 2,
        run: sharing::a_write_is_seen_by_its_guest_alone,
    },
    Scenario {
        name: "module_unloads_and_reloads_while_sharing",
        guests: 2,
        run: lifecycle::unload_and_reload,
    },
    Scenario {
        name: "module_unloads_with_a_batch_in_flight",
        guests: 2,
        run: lifecycle::unload_with_a_batch_in_flight,
    },
    Scenario {
        name: "daemon_killed_and_restarted",
        guests: 2,
        run: lifecycle::daemon_killed_and_restarted,
    },
    Scenario {
        name: "a_third_guest_shares_at_once",
        guests: 2,
        run: lifecycle::a_third_guest_shares_at_once,
    },
    Scenario {
        name: "a_guest_killed_while_sharing",
        guests: 2,
        run: lifecycle::a_guest_killed_while_sharing,
    },
    Scenario {
        name: "guest_runs_on_when_the_host_side_is_gone",
        guests: 1,
        run: isolation::host_side_gone,
    },
];

/// What scenarios play on.
#[derive(Debug)]
pub struct Stage {
    world: World,
    seed: u64,
}

impl Stage {
    /// An empty one.
    pub fn new(artifacts: &Artifacts, host: Host, logs: Option<&Path>) -> Result<Self> {
        Ok(Self {
            world: World::new(artifacts, host, logs)?,
            seed: 1000,
        })
    }

    /// Makes sure of `guests` healthy guests that share.
    pub fn prepare(&mut self, guests: usize) -> Result<()> {
        let world = &mut self.world;
        if let Some(daemon) = &mut world.daemon {
            if daemon.healthy().is_err() {
                world.daemon = None;
            }
        }
        if world.daemon.is_none() {
            world.daemon = Some(world.site.start(&world.cgroup)?);
        }
        // What a scenario broke or added is no business of the next one.
        world.guests.retain_mut(|guest| guest.healthy().is_ok());
        world.guests.truncate(guests.max(2));
        let from = world.guests.len();
        while world.guests.len() < guests {
            world.start_guest()?;
        }
        world.wait_booted(from)?;
        for guest in &mut world.guests {
            let loaded: Vec<String> = guest.request(Op::List {
                path: "/sys/kernel".into(),
            })?;
            if !loaded.iter().any(|name| name == "pagefusion") {
                guest.load_hurried_module()?;
            }
            guest.set("run", "1")?;
        }
        if guests > 0 {
            world.site.ctl(&["resume", "--all"])?;
            settle(world, Instant::now()).context("before the scenario")?;
        }
        Ok(())
    }

    /// Plays one scenario; everything must be well afterwards.
    pub fn play(&mut self, scenario: &Scenario) -> Result<()> {
        self.prepare(scenario.guests)?;
        (scenario.run)(self)?;
        self.world.healthy()
    }

    /// Takes everything down.
    pub fn close(self) -> Result<()> {
        self.world.close()
    }

    /// A seed nobody had before.
    fn seed(&mut self) -> u64 {
        self.seed += 1000;
        self.seed
    }

    /// Pages that a guest shares now.
    fn shared_by(&self, guest: usize) -> Result<u64> {
        let guest = self.world.guests.get(guest).context("no such guest")?;
        Ok(self.world.site.status()?.vm(guest.name())?.pages_shared)
    }

    /// Every mapped file in every guest is what it is in the image.
    fn files_are_right(&mut self) -> Result<()> {
        let mut integrity = Integrity::default();
        for guest in &mut self.world.guests {
            integrity.mapped_files(guest, &self.world.manifest)?;
        }
        integrity.verdict()
    }
}
