//! Files that two small guests share, through whatever happens to one of them.

use anyhow::{Context, Result, ensure};

use super::{
    filesystems::{image, sums},
    steps::{all_same, each, hold, release, spec, unit, write},
};
use crate::{
    guest::Guest,
    integrity::Integrity,
    pattern::Expected,
    protocol::Op,
    world::{Small, World},
};

/// Size of a file of our own; the last page of it has a tail.
const BYTES: u64 = (2 << 20) + 777;
/// Where the disk is mounted.
pub(super) const DISK: &str = "/fs/disk";
/// Files of the image.
const IMAGE: [&str; 2] = ["library", "program"];

/// What both guests hold mapped.
#[derive(Clone, Debug)]
pub(super) struct SharedFiles {
    files: Vec<File>,
    seed: u64,
}

#[derive(Clone, Debug)]
struct File {
    path: String,
    sum: String,
    /// Of a file of our own, in memory.
    seed: Option<u64>,
}

/// A guest that can hold them.
pub(super) fn with_disk(world: &World) -> Result<Small> {
    Ok(Small {
        disks: vec![image(world, "ext4")?],
        ..Small::default()
    })
}

impl SharedFiles {
    /// Files of the guests' first disk, which holds ext4 and is not written, and one in memory.
    pub(super) fn hold(world: &mut World, seed: u64) -> Result<Self> {
        let of_image = sums(world)?;
        let mut this = Self {
            files: Vec::new(),
            seed,
        };
        for (name, sum) in of_image {
            if IMAGE.contains(&&*name) {
                let path = format!("{DISK}/{name}");
                let seed = None;
                this.files.push(File { path, sum, seed });
            }
        }
        ensure!(this.files.len() == IMAGE.len(), "files of the image");
        each(world, |guest| this.hold_in(guest))?;
        this.add(world)?;
        this.are_shared(world)?;
        Ok(this)
    }

    /// Has them all in a guest that has none.
    pub(super) fn hold_in(&self, guest: &mut Guest) -> Result<()> {
        unit(guest, Op::Mount(spec("ext4", "/dev/vda", DISK, "ro")))?;
        self.files.iter().try_for_each(|file| file.hold_in(guest))
    }

    /// One more file, in memory, and its name. That it is shared shows that everything works.
    pub(super) fn add(&mut self, world: &mut World) -> Result<String> {
        let path = self.add_unshared(world)?;
        all_same(world, &path)?;
        Ok(path)
    }

    /// The same, which nobody has had time to share.
    pub(super) fn add_unshared(&mut self, world: &mut World) -> Result<String> {
        self.seed += 1;
        let file = File {
            path: format!("/tmp/pf-{}", self.seed),
            sum: Expected::new(self.seed, BYTES).sha256(),
            seed: Some(self.seed),
        };
        each(world, |guest| file.hold_in(guest))?;
        let path = file.path.clone();
        self.files.push(file);
        Ok(path)
    }

    /// One of the files that were added is not the first guest's any more.
    pub(super) fn remove(&mut self, world: &mut World, path: &str) -> Result<()> {
        self.forget(path);
        release(&mut world.guests[0], path)?;
        let path = path.into();
        unit(&mut world.guests[0], Op::Delete { path })
    }

    /// Writes the beginning of one of the files that were added, in one guest, and looks at it no more. What it is there
    /// from now on, and what it is elsewhere.
    pub(super) fn rewrite(
        &mut self,
        guest: &mut Guest,
        path: &str,
        seed: u64,
        bytes: u64,
    ) -> Result<[String; 2]> {
        let file = self.files.iter().find(|file| file.path == path);
        let before = file.and_then(|file| file.seed).context("no such file")?;
        let mut expected = Expected::new(before, BYTES);
        let elsewhere = expected.sha256();
        write(guest, path, seed, 0, bytes)?;
        expected.rewrite(seed, 0, bytes);
        self.forget(path);
        Ok([expected.sha256(), elsewhere])
    }

    /// A file is not looked at any more.
    pub(super) fn forget(&mut self, path: &str) {
        self.files.retain(|file| file.path != path);
    }

    /// Every file is the same memory in both guests.
    pub(super) fn are_shared(&self, world: &mut World) -> Result<()> {
        self.files
            .iter()
            .try_for_each(|file| all_same(world, &file.path))
    }

    /// Every file is what it was, read, mapped anew and mapped since before.
    pub(super) fn are_right(&self, world: &mut World) -> Result<()> {
        each(world, |guest| self.are_right_in(guest))
    }

    /// The same in one guest.
    pub(super) fn are_right_in(&self, guest: &mut Guest) -> Result<()> {
        let mut integrity = Integrity::default();
        for File { path, sum, .. } in &self.files {
            integrity.file(guest, path, sum)?;
            integrity.held(guest, path, sum)?;
        }
        integrity.verdict()
    }

    /// Undone by the operator and let be shared again.
    pub(super) fn are_undone_and_shared_again(&self, world: &mut World) -> Result<()> {
        world.site.ctl(&["undo", "--all"])?;
        self.are_right(world)?;
        world.site.ctl(&["resume", "--all"])?;
        self.are_shared(world)
    }
}

impl File {
    fn hold_in(&self, guest: &mut Guest) -> Result<()> {
        if let Some(seed) = self.seed {
            write(guest, &self.path, seed, 0, BYTES)?;
        }
        hold(guest, &self.path)
    }
}
