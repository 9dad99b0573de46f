//! What the guests do.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    bench::image::{self, Content, FILE_MIB},
    guest::{Guest, Mode},
    protocol::{FolioCount, MountSpec, Op, RunOutcome},
    services,
    world::World,
};

/// Where a guest mounts the disk of files.
const DISK: &str = "/tmp/disk";
/// For what takes a guest long.
const LONG: Duration = Duration::from_secs(1800);
const AGE: &str = include_str!("aged.py");
const COMPILER: &str = include_str!("compiler.py");
const PROGRAM: &str = include_str!("program.c");
/// For how long guests work before memory is shared, and by how many times as often as usual their kernels join small
/// pages into huge ones meanwhile: an hour, compressed.
const WORK: Duration = Duration::from_secs(180);
const COMPRESSED: u64 = 3600 / WORK.as_secs();

/// One of them.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Workload {
    /// (a) Two guests map the same files read-only and touch every page of them.
    Files {
        /// MiB of files.
        mib: u32,
    },
    /// (b) Debian guests that boot from one image, run its services and have a compiler in use.
    Boot {
        /// How many.
        guests: u32,
    },
    /// (e) Two of those, after minutes in which memory was used as in hours.
    Aged,
    /// (c) Two of them, the second of which boots from an image of its own with the same packages in it.
    Mixed,
    /// (c) The same, with some packages of another version in the second one's image.
    Apart,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Files { mib } if mib % 1024 == 0 => write!(f, "{} GiB of files", mib / 1024),
            Self::Files { mib } => write!(f, "{mib} MiB of files"),
            Self::Boot { guests } => write!(f, "{guests} Debian guests"),
            Self::Aged => write!(f, "2 Debian guests that have worked for long"),
            Self::Mixed => write!(f, "2 Debian guests, different images"),
            Self::Apart => write!(f, "2 Debian guests, some packages of another version"),
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

/// Guests that boot side by side; more of them would each take longer than a guest may.
const AT_A_TIME: usize = 8;

/// The disks of all workloads, each made when it is needed first.
#[derive(Debug)]
pub(super) struct Disks {
    directory: tempfile::TempDir,
    /// Packages of another version, for one guest's image.
    packages: Vec<PathBuf>,
}

impl Disks {
    pub(super) fn new(packages: Vec<PathBuf>) -> Result<Self> {
        let directory = crate::workdir::create()?;
        Ok(Self {
            directory,
            packages,
        })
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
            super::remade::remake(image, self.directory.path(), &[], &path)?;
        }
        Ok(path)
    }

    /// What these packages are called.
    pub(super) fn packages(&self) -> Vec<String> {
        let names = self.packages.iter().filter_map(|path| path.file_name());
        names
            .map(|name| name.to_string_lossy().into_owned())
            .collect()
    }

    /// The same, with the files of other packages in place of its own.
    fn apart(&self, image: &Path) -> Result<PathBuf> {
        let path = self.directory.path().join("apart.ext4");
        if !path.exists() {
            super::remade::remake(image, self.directory.path(), &self.packages, &path)?;
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
            Self::Boot { .. } | Self::Aged | Self::Mixed | Self::Apart => {
                let image = world.artifacts.guest_image.clone();
                cached(&image)?;
                let mut booted = 0;
                for number in 0..self.guests() {
                    let other = match self {
                        Self::Mixed if number == 1 => Some(disks.other(&image)?),
                        Self::Apart if number == 1 => Some(disks.apart(&image)?),
                        _ => None,
                    };
                    if let Some(other) = other {
                        cached(&other)?;
                        world.artifacts.guest_image = other;
                    }
                    world.start_guest()?;
                    if world.guests.len() - booted == AT_A_TIME {
                        world.wait_booted(booted)?;
                        booted = world.guests.len();
                    }
                }
                world.artifacts.guest_image = image;
                world.wait_booted(booted)?;
                everybody(&mut world.guests, COMPILER, |_| vec![PROGRAM.to_owned()])?;
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

    /// Lets guests work that are to have worked for long.
    pub(super) fn age(self, world: &mut World) -> Result<()> {
        if self != Self::Aged {
            return Ok(());
        }
        services::join_pages_often(&mut world.guests, COMPRESSED)?;
        let seconds = WORK.as_secs().to_string();
        everybody(&mut world.guests, AGE, |guest| {
            vec![seconds.clone(), guest.to_string()]
        })?;
        // What they would move meanwhile is no part of what is measured.
        services::stop_joining_pages(&mut world.guests)
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

/// Runs a program of Python's in all guests at once, with arguments for each, and says how many seconds it took.
pub(super) fn everybody(
    guests: &mut [Guest],
    program: &str,
    arguments: impl Fn(usize) -> Vec<String>,
) -> Result<f64> {
    let began = Instant::now();
    let mut pending = Vec::new();
    for (index, guest) in guests.iter_mut().enumerate() {
        let mut argv = ["python3", "-c", program].map(str::to_owned).to_vec();
        argv.extend(arguments(index));
        pending.push(guest.begin(Op::Run {
            argv,
            timeout_ms: LONG.as_millis() as u64,
            stream: false,
        })?);
    }
    for (guest, pending) in guests.iter_mut().zip(pending) {
        let outcome: RunOutcome = guest.finish(pending, 2 * LONG, &mut |_| {})?;
        ensure!(
            outcome.status == Some(0),
            "{}: {:?}: {}",
            guest.name(),
            outcome.status,
            outcome.stderr.trim()
        );
    }
    Ok(began.elapsed().as_secs_f64())
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
