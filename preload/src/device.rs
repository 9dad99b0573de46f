// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whether the VMM has the device that its guest reports through. It need not: what
//! `pagefusionctl run` adds to a command line, a script may leave out. Nobody would ring then, and
//! nothing else would tell of it.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::fs::{major, minor};

/// A VMM that has the device maps it while it starts, which takes longer the more memory is
/// prepared before.
const PATIENCE: Duration = Duration::from_secs(30);

/// Looks for a mapping of the device's memory besides the engine's own.
#[derive(Debug)]
pub(crate) struct Device {
    /// Device and inode, as `/proc/self/maps` has them.
    memory: String,
    since: Instant,
    settled: bool,
}

impl Device {
    pub(crate) fn new(memory: impl AsFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(memory)?;
        let (major, minor) = (major(stat.st_dev), minor(stat.st_dev));
        Ok(Self {
            memory: format!("{major:02x}:{minor:02x} {}", stat.st_ino),
            since: Instant::now(),
            settled: false,
        })
    }

    /// Whether the VMM has not got it in all that time; said once.
    pub(crate) fn is_missing(&mut self, now: Instant) -> bool {
        if self.settled {
            return false;
        }
        let mapped = match fs::read_to_string("/proc/self/maps") {
            Ok(maps) => self.mappings(&maps) > 1,
            Err(e) => {
                log::debug!("mappings cannot be read: {e}");
                return false;
            }
        };
        let missing = !mapped && now >= self.since + PATIENCE;
        self.settled = mapped || missing;
        missing
    }

    fn mappings(&self, maps: &str) -> usize {
        let is_ours = |line: &&str| {
            let mut words = line.split_ascii_whitespace().skip(3);
            let place = words.next().zip(words.next());
            place == self.memory.split_once(' ')
        };
        maps.lines().filter(is_ours).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pagefusion_host::device::PagefusionDevice;
    use pagefusion_host::engine::SharedMemory;

    #[test]
    fn a_device_that_only_the_engine_maps_is_missing_after_a_while_and_told_of_once() {
        let device = PagefusionDevice::new().unwrap();
        let other = PagefusionDevice::new().unwrap();
        let mut watched = Device::new(device.memory()).unwrap();
        let later = Instant::now() + PATIENCE;
        let _engines = SharedMemory::map(device.memory()).unwrap();
        let _others = SharedMemory::map(other.memory()).unwrap();
        assert!(!watched.is_missing(Instant::now()), "it may yet come");
        assert!(watched.is_missing(later));
        assert!(!watched.is_missing(later));
    }

    #[test]
    fn a_device_that_the_vmm_maps_is_there() {
        let device = PagefusionDevice::new().unwrap();
        let mut watched = Device::new(device.memory()).unwrap();
        let later = Instant::now() + PATIENCE;
        let _engines = SharedMemory::map(device.memory()).unwrap();
        let vmms = SharedMemory::map(device.memory()).unwrap();
        assert!(!watched.is_missing(later));
        // One that is unplugged was there.
        drop(vmms);
        assert!(!watched.is_missing(later));
    }
}
