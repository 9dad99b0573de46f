//! What the guests do.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::{
    bench::image::{self, Content, FILE_MIB},
    guest::Mode,
    protocol::{FolioCount, MountSpec, Op},
    services,
    world::World,
};

/// Where a guest mounts the disk of files.
const DISK: &str = "/tmp/disk";
/// For what takes a guest long.
const LONG: Duration = Duration::from_secs(1800);

/// One of them.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Workload {
    /// (a) Two guests map the same files read-only and touch every page of them.
    Files {
        /// MiB of files.
        mib: u32,
    },
    /// (b) Debian guests that boot from one image and run its services.
    Boot {
        /// How many.
        guests: u32,
    },
    /// (c) Two of them, the second of which boots from an image of its own with the same packages in it.
    Mixed,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files { mib } if mib % 1024 == 0 => write!(f, "{} GiB of files", mib / 1024),
            Self::Files { mib } => write!(f, "{mib} MiB of files"),
            Self::Boot { guests } => write!(f, "{guests} Debian guests"),
            Self::Mixed => write!(f, "2 Debian guests, different images"),
        }
    }
}

impl Workload {
    /// How many guests there are.
    pub(super) fn guests(self) -> u32 {
        match self {
            Self::Boot { guests } => guests,
            _ => 2,
        }
    }

    /// A guest's memory.
    pub(super) fn memory_mib(self) -> u32 {
        match self {
            // What the kernel takes for the files, and itself, and enough to be free that it reclaims nothing.
            Self::Files { mib } => mib + mib / 16 + 448,
            _ => 1024,
        }
    }
}

/// The disks of all workloads, each made when it is needed first.
#[derive(Debug)]
pub(super) struct Disks {
    directory: tempfile::TempDir,
}

impl Disks {
    pub(super) fn new() -> Result<Self> {
        let directory = crate::workdir::create()?;
        Ok(Self { directory })
    }

    fn files(&self, mib: u32) -> Result<PathBuf> {
        let path = self.directory.path().join(format!("files-{mib}.ext4"));
        if !path.exists() {
            let files = u64::from(mib) / FILE_MIB;
            image::make(self.directory.path(), &path, files, Content::Random)?;
        }
        Ok(path)
    }

    /// The guest's image made anew: the same files in another order, in a file system of another identity.
    fn other(&self, image: &Path) -> Result<PathBuf> {
        let path = self.directory.path().join("other.ext4");
        if !path.exists() {
            super::remade::remake(image, self.directory.path(), &path)?;
        }
        Ok(path)
    }
}

impl Workload {
    /// Starts the guests and waits until they are ready for sharing to be prepared.
    pub(super) fn boot(self, world: &mut World, disks: &Disks) -> Result<()> {
        match self {
            Self::Files { mib } => {
                let disk = disks.files(mib)?;
                for _ in 0..self.guests() {
                    world.start(Mode::Agent, self.memory_mib(), vec![disk.clone()])?;
                }
                let limit = world.limits.boot;
                for guest in &mut world.guests {
                    guest.wait_agent(limit)?;
                    guest.request::<()>(Op::Mount(MountSpec {
                        source: "/dev/vda".into(),
                        kind: "ext4".into(),
                        target: DISK.into(),
                        data: String::new(),
                    }))?;
                }
                Ok(())
            }
            Self::Boot { .. } | Self::Mixed => {
                let image = world.artifacts.guest_image.clone();
                cached(&image)?;
                for number in 0..self.guests() {
                    if self == Self::Mixed && number == 1 {
                        let other = disks.other(&image)?;
                        cached(&other)?;
                        world.artifacts.guest_image = other;
                    }
                    world.start_guest()?;
                }
                world.artifacts.guest_image = image;
                world.wait_booted(0)?;
                // Whether they come to rest or not: all systems get what they are then.
                services::wait_quiet(&mut world.guests)?;
                Ok(())
            }
        }
    }

    /// Brings into the guests' memory what is to be shared.
    pub(super) fn load(self, world: &mut World) -> Result<()> {
        let Self::Files { mib } = self else {
            return Ok(());
        };
        // Else 4,096 pages move every ten seconds until all are in huge pages, and there is no end to be measured.
        services::stop_joining_pages(&mut world.guests)?;
        for path in paths(mib) {
            let mut pending = Vec::new();
            for guest in &mut world.guests {
                pending.push(guest.begin(Op::Hold { path: path.clone() })?);
            }
            for (guest, pending) in world.guests.iter_mut().zip(pending) {
                guest.finish::<()>(pending, LONG, &mut |_| {})?;
            }
        }
        Ok(())
    }

    /// How the files lie in the memory of the first guest.
    pub(super) fn folios(self, world: &mut World) -> Result<Option<FolioCount>> {
        let (Self::Files { mib }, Some(guest)) = (self, world.guests.first_mut()) else {
            return Ok(None);
        };
        let mut all = FolioCount::default();
        for path in paths(mib) {
            let one: FolioCount = guest.request_for(Op::Folios { path }, LONG, |_| {})?;
            all.pages += one.pages;
            all.folios += one.folios;
            all.runs += one.runs;
        }
        Ok(Some(all))
    }
}

/// The files on their disk.
fn paths(mib: u32) -> impl Iterator<Item = String> {
    let files = u64::from(mib) / FILE_MIB;
    (0..files).map(|number| format!("{DISK}/{}", image::file_name(number)))
}

/// Reads a disk, so that what the host keeps of it is charged to this program and not to the guests, and stays as it
/// is.
fn cached(image: &Path) -> Result<()> {
    let mut file = fs::File::open(image).with_context(|| format!("open {}", image.display()))?;
    std::io::copy(&mut file, &mut std::io::sink())
        .with_context(|| format!("read {}", image.display()))?;
    Ok(())
}
