//! What must hold, one function for each sentence.
//!
//! Scenarios share running guests: booting one takes most of a minute. Each gets a [`Stage`] with as many healthy,
//! sharing guests as it asks for; guests that the scenario before broke are replaced.

mod crowd;
mod detectors;
mod filesystems;
mod hostile;
mod isolation;
mod kernel;
mod kills;
mod knobs;
mod lifecycle;
mod machines;
mod moving;
mod plug;
mod power;
mod quiet;
mod shared_files;
mod sharing;
mod statistics;
mod steps;
mod undo;
mod users;

use std::{path::Path, time::Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::{
    artifacts::Artifacts,
    integrity::Integrity,
    protocol::Op,
    settle::settle,
    world::{Host, Small, World},
};

/// How much is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Tier {
    /// What shows that a further kernel works: load, share, unload.
    Smoke,
    /// What every change must pass.
    Usual,
    /// Everything.
    Deep,
    /// What every change must pass, and what only a kernel with detectors can tell.
    Debug,
}

impl Tier {
    /// Whether what is of tier `other` is part of this one.
    pub fn includes(self, other: Self) -> bool {
        match self {
            Self::Debug => other != Self::Deep,
            _ => other <= self,
        }
    }
}

/// Why a scenario cannot run here, as an error that it ends with.
#[derive(Debug)]
pub struct Skip(String);

impl std::fmt::Display for Skip {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// One scenario.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name, and what it shows.
    pub name: &'static str,
    /// The least tier it belongs to.
    pub tier: Tier,
    /// Sharing guests it needs.
    pub guests: usize,
    /// What it does.
    pub run: fn(&mut Stage) -> Result<()>,
}

/// All of them, in the order that needs the fewest boots.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "qemu_runs_without_a_daemon",
        tier: Tier::Usual,
        guests: 0,
        run: isolation::qemu_runs_without_a_daemon,
    },
    Scenario {
        name: "module_leaves_foreign_ivshmem_alone",
        tier: Tier::Smoke,
        guests: 0,
        run: isolation::module_leaves_foreign_ivshmem,
    },
    Scenario {
        name: "module_refuses_confidential_guests",
        tier: Tier::Usual,
        guests: 0,
        run: isolation::module_refuses_confidential_guests,
    },
    Scenario {
        name: "knobs_are_what_the_manual_says",
        tier: Tier::Usual,
        guests: 0,
        run: knobs::as_in_the_manual,
    },
    Scenario {
        name: "disk_file_systems_share",
        tier: Tier::Usual,
        guests: 0,
        run: filesystems::disk_file_systems_share,
    },
    Scenario {
        name: "stacked_and_memory_file_systems_share",
        tier: Tier::Usual,
        guests: 0,
        run: filesystems::stacked_and_memory_file_systems_share,
    },
    Scenario {
        name: "scopes_see_what_they_name",
        tier: Tier::Usual,
        guests: 0,
        run: filesystems::scopes_see_what_they_name,
    },
    Scenario {
        name: "what_cannot_be_looked_at_stays_reported",
        tier: Tier::Usual,
        guests: 0,
        run: knobs::what_cannot_be_looked_at_stays,
    },
    Scenario {
        name: "nothing_more_is_reported_once_somebody_may_write",
        tier: Tier::Usual,
        guests: 0,
        run: knobs::nothing_more_once_somebody_may_write,
    },
    Scenario {
        name: "names_may_be_kept_from_the_host",
        tier: Tier::Usual,
        guests: 0,
        run: knobs::names_may_be_kept,
    },
    Scenario {
        name: "what_is_kept_out_is_shared_no_more",
        tier: Tier::Usual,
        guests: 0,
        run: knobs::what_is_kept_out_is_shared_no_more,
    },
    Scenario {
        name: "statistics_agree_with_each_other_and_the_host",
        tier: Tier::Usual,
        guests: 0,
        run: statistics::agree,
    },
    Scenario {
        name: "unmounting_is_never_busy",
        tier: Tier::Usual,
        guests: 0,
        run: filesystems::unmounting_is_never_busy,
    },
    Scenario {
        name: "kernels_at_one_address_share",
        tier: Tier::Usual,
        guests: 0,
        run: kernel::kernels_at_one_address_share,
    },
    Scenario {
        name: "kernels_at_two_addresses_share_less",
        tier: Tier::Deep,
        guests: 0,
        run: kernel::kernels_at_two_addresses_share_less,
    },
    Scenario {
        name: "device_taken_away_and_found_again",
        tier: Tier::Usual,
        guests: 0,
        run: plug::device_taken_away_and_found_again,
    },
    Scenario {
        name: "memory_plugged_in_and_pulled_out",
        tier: Tier::Usual,
        guests: 0,
        run: plug::memory_plugged_in_and_pulled_out,
    },
    Scenario {
        name: "a_guest_without_interrupts_shares",
        tier: Tier::Usual,
        guests: 0,
        run: plug::without_interrupts,
    },
    Scenario {
        name: "a_plain_device_shares",
        tier: Tier::Usual,
        guests: 0,
        run: plug::plain_device,
    },
    Scenario {
        name: "machines_of_every_kind_share",
        tier: Tier::Deep,
        guests: 0,
        run: machines::machines_of_every_kind_share,
    },
    Scenario {
        name: "memory_with_a_file_is_left_alone",
        tier: Tier::Deep,
        guests: 0,
        run: machines::memory_with_a_file_is_left_alone,
    },
    Scenario {
        name: "a_balloon_takes_what_was_shared",
        tier: Tier::Usual,
        guests: 0,
        run: machines::a_balloon_takes_what_was_shared,
    },
    Scenario {
        name: "virtio_mem_brings_and_takes_memory",
        tier: Tier::Deep,
        guests: 0,
        run: machines::virtio_mem_brings_and_takes_memory,
    },
    Scenario {
        name: "module_unloads_with_reports_in_flight",
        tier: Tier::Usual,
        guests: 0,
        run: lifecycle::unload_with_reports_in_flight,
    },
    Scenario {
        name: "nothing_is_open_after_unloading",
        tier: Tier::Usual,
        guests: 0,
        run: lifecycle::nothing_is_open_after_unloading,
    },
    Scenario {
        name: "every_address_space_is_visited_once",
        tier: Tier::Usual,
        guests: 0,
        run: crowd::every_address_space_is_visited_once,
    },
    Scenario {
        name: "loaded_again_in_the_same_qemu",
        tier: Tier::Usual,
        guests: 0,
        run: moving::loaded_again_in_the_same_qemu,
    },
    Scenario {
        name: "restored_from_a_file_twice",
        tier: Tier::Deep,
        guests: 0,
        run: moving::restored_from_a_file_twice,
    },
    Scenario {
        name: "migrated_while_it_runs",
        tier: Tier::Usual,
        guests: 0,
        run: moving::migrated_while_it_runs,
    },
    Scenario {
        name: "migrated_before_anything_was_shared",
        tier: Tier::Deep,
        guests: 0,
        run: moving::migrated_before_anything_was_shared,
    },
    Scenario {
        name: "migrated_by_postcopy",
        tier: Tier::Deep,
        guests: 0,
        run: moving::migrated_by_postcopy,
    },
    Scenario {
        name: "an_undo_leaves_no_overlay",
        tier: Tier::Deep,
        guests: 0,
        run: undo::leaves_no_overlay,
    },
    Scenario {
        name: "a_qemu_of_an_ordinary_user_shares",
        tier: Tier::Deep,
        guests: 0,
        run: users::a_qemu_of_an_ordinary_user_shares,
    },
    Scenario {
        name: "a_hostile_guest_beside_good_ones",
        tier: Tier::Deep,
        guests: 0,
        run: hostile::beside_good_ones,
    },
    Scenario {
        name: "whatever_is_killed_the_rest_is_right",
        tier: Tier::Deep,
        guests: 0,
        run: kills::whatever_is_killed_the_rest_is_right,
    },
    Scenario {
        name: "suspended_to_memory",
        tier: Tier::Usual,
        guests: 0,
        run: power::suspended_to_memory,
    },
    Scenario {
        name: "suspended_in_the_middle_of_a_pass",
        tier: Tier::Usual,
        guests: 0,
        run: power::suspended_in_the_middle_of_a_pass,
    },
    Scenario {
        name: "suspended_while_the_host_stands_still",
        tier: Tier::Usual,
        guests: 0,
        run: power::suspended_while_the_host_stands_still,
    },
    Scenario {
        name: "hibernated_and_woken_elsewhere",
        tier: Tier::Deep,
        guests: 0,
        run: power::hibernated_and_woken_elsewhere,
    },
    Scenario {
        name: "another_kernel_by_kexec",
        tier: Tier::Deep,
        guests: 0,
        run: power::another_kernel_by_kexec,
    },
    Scenario {
        name: "two_guests_share",
        tier: Tier::Smoke,
        guests: 2,
        run: sharing::two_guests_share,
    },
    Scenario {
        name: "clean_shares_more_than_readonly",
        tier: Tier::Deep,
        guests: 2,
        run: sharing::clean_shares_more_than_readonly,
    },
    Scenario {
        name: "the_charge_falls_by_what_we_claim",
        tier: Tier::Usual,
        guests: 2,
        run: sharing::the_charge_falls_by_what_we_claim,
    },
    Scenario {
        name: "a_write_is_seen_by_its_guest_alone",
        tier: Tier::Smoke,
        guests: 2,
        run: sharing::a_write_is_seen_by_its_guest_alone,
    },
    Scenario {
        name: "knobs_decide_what_is_reported",
        tier: Tier::Usual,
        guests: 2,
        run: knobs::decide_what_is_reported,
    },
    Scenario {
        name: "knobs_may_change_in_the_middle_of_a_pass",
        tier: Tier::Usual,
        guests: 2,
        run: knobs::in_the_middle_of_a_pass,
    },
    Scenario {
        name: "a_new_file_is_reported_at_once",
        tier: Tier::Usual,
        guests: 2,
        run: quiet::a_new_file_is_reported_at_once,
    },
    Scenario {
        name: "memory_pressure_shrinks_the_tracker",
        tier: Tier::Usual,
        guests: 2,
        run: quiet::memory_pressure_shrinks_the_tracker,
    },
    Scenario {
        name: "an_idle_guest_spends_next_to_nothing",
        tier: Tier::Deep,
        guests: 0,
        run: quiet::an_idle_guest_spends_next_to_nothing,
    },
    Scenario {
        name: "an_idle_guest_without_interrupts_spends_next_to_nothing",
        tier: Tier::Deep,
        guests: 0,
        run: quiet::an_idle_guest_without_interrupts,
    },
    Scenario {
        name: "ten_thousand_processes",
        tier: Tier::Deep,
        guests: 0,
        run: crowd::ten_thousand_processes,
    },
    Scenario {
        name: "any_allocation_may_fail",
        tier: Tier::Debug,
        guests: 0,
        run: detectors::any_allocation_may_fail,
    },
    Scenario {
        name: "loads_and_unloads_under_load",
        tier: Tier::Debug,
        guests: 0,
        run: detectors::loads_and_unloads_under_load,
    },
    Scenario {
        name: "everything_at_once_leaves_no_trace",
        tier: Tier::Debug,
        guests: 0,
        run: detectors::everything_at_once_leaves_no_trace,
    },
    Scenario {
        name: "module_unloads_and_reloads_while_sharing",
        tier: Tier::Smoke,
        guests: 2,
        run: lifecycle::unload_and_reload,
    },
    Scenario {
        name: "module_unloads_at_any_moment_of_a_pass",
        tier: Tier::Usual,
        guests: 2,
        run: lifecycle::unload_at_any_moment_of_a_pass,
    },
    Scenario {
        name: "nothing_is_held_after_unloading",
        tier: Tier::Usual,
        guests: 2,
        run: lifecycle::nothing_is_held_after_unloading,
    },
    Scenario {
        name: "daemon_killed_and_restarted",
        tier: Tier::Usual,
        guests: 2,
        run: lifecycle::daemon_killed_and_restarted,
    },
    Scenario {
        name: "a_third_guest_shares_at_once",
        tier: Tier::Usual,
        guests: 2,
        run: lifecycle::a_third_guest_shares_at_once,
    },
    Scenario {
        name: "a_guest_killed_while_sharing",
        tier: Tier::Usual,
        guests: 2,
        run: lifecycle::a_guest_killed_while_sharing,
    },
    Scenario {
        name: "guest_runs_on_when_the_host_side_is_gone",
        tier: Tier::Usual,
        guests: 1,
        run: isolation::host_side_gone,
    },
];

/// What depends on QEMU, and is played with an older one as well, and of which tier it is there.
pub const WITH_AN_OLDER_QEMU: &[(&str, Tier)] = &[
    ("qemu_runs_without_a_daemon", Tier::Deep),
    ("device_taken_away_and_found_again", Tier::Deep),
    ("memory_plugged_in_and_pulled_out", Tier::Deep),
    ("a_plain_device_shares", Tier::Deep),
    ("machines_of_every_kind_share", Tier::Usual),
    ("memory_with_a_file_is_left_alone", Tier::Deep),
    ("a_balloon_takes_what_was_shared", Tier::Deep),
    ("virtio_mem_brings_and_takes_memory", Tier::Deep),
    ("loaded_again_in_the_same_qemu", Tier::Deep),
    ("migrated_while_it_runs", Tier::Deep),
    ("two_guests_share", Tier::Deep),
];

/// What cannot be played on a kernel with detectors, and why.
pub const NOT_WITH_DETECTORS: &[(&str, &str)] = &[
    (
        "a_balloon_takes_what_was_shared",
        "what it leaves to a guest is less than detectors need",
    ),
    (
        "a_new_file_is_reported_at_once",
        "its time is that of a kernel without detectors",
    ),
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

    /// Plays with two small guests that share; those of other scenarios wait.
    fn with_small_pair(
        &mut self,
        small: &Small,
        play: impl FnOnce(&mut World) -> Result<()>,
    ) -> Result<()> {
        let others = std::mem::take(&mut self.world.guests);
        let played = self.play_with_small_pair(small, play);
        // However it went: the next scenario must not take the small ones for these.
        self.world.guests = others;
        played
    }

    fn play_with_small_pair(
        &mut self,
        small: &Small,
        play: impl FnOnce(&mut World) -> Result<()>,
    ) -> Result<()> {
        let world = &mut self.world;
        world.start_small_sharers(small, 2)?;
        for guest in &mut world.guests {
            guest.load_hurried_module()?;
        }
        play(world)?;
        for guest in &mut world.guests {
            guest.unload_module()?;
            guest.healthy()?;
            guest.kill()?;
        }
        Ok(())
    }

    /// A seed nobody had before.
    fn seed(&mut self) -> u64 {
        self.seed += 1000;
        self.seed
    }

    /// Pages that a guest shares now.
    fn shared_by(&self, guest: usize) -> Result<u64> {
        let guest = self.world.guests.get(guest).context("no such guest")?;
        Ok(self.world.status()?.vm(guest.name())?.pages_shared)
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
