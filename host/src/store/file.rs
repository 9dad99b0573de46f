// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The memory of a store: a sparse file on tmpfs, written only by its owner.

use super::PAGE;
use crate::protocol::StorePage;
use rustix::fs::{FallocateFlags, FileType, MemfdFlags, Mode, OFlags, SeekFrom};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// The memory of a store. Pages are written with `pwrite`, never through a mapping: a full
/// tmpfs is an error here and would be a SIGBUS there.
#[derive(Debug)]
pub struct StoreFile {
    fd: OwnedFd,
    /// Pages up to its end, or more. Who maps the file, and cannot write to it, has nothing behind that:
    /// to touch it there is an error.
    end: StorePage,
}

impl StoreFile {
    /// Memory without a name, for a store in one process.
    pub fn anonymous() -> io::Result<Self> {
        let fd = rustix::fs::memfd_create("pagefusion-store", MemfdFlags::CLOEXEC)?;
        // Others may get a descriptor, and only what they get: no second one by /proc.
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
        Ok(Self { fd, end: 0 })
    }

    /// Opens the file at `path`, which is created with mode 0600 if it is not there. One that
    /// another user has made, or has a name for, is refused: they may have it open for writing.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::open_with(path, OFlags::empty())
    }

    /// Creates the file at `path` with mode 0600; an error if there is one.
    pub fn create(path: &Path) -> io::Result<Self> {
        Self::open_with(path, OFlags::EXCL)
    }

    fn open_with(path: &Path, flags: OFlags) -> io::Result<Self> {
        let flags = flags | OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?;
        let found = rustix::fs::fstat(&fd)?;
        let foreign = if found.st_uid != rustix::process::geteuid().as_raw() {
            Some(format!("belongs to user {}", found.st_uid))
        } else if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            Some("is no regular file".into())
        } else if found.st_nlink != 1 {
            Some(format!("has {} names", found.st_nlink))
        } else {
            None
        };
        if let Some(how) = foreign {
            let reason = format!(
                "{} {how}, so that others may write what VMs share; end the VMs of its group and \
                 remove it",
                path.display()
            );
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
        }
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
        let mut file = Self { fd, end: 0 };
        file.end = file.pages()?;
        Ok(file)
    }

    #[cfg(test)]
    pub(super) fn from_descriptor(fd: OwnedFd) -> Self {
        Self {
            fd,
            end: StorePage::MAX,
        }
    }

    /// A descriptor of its own that can only read.
    pub fn read_only(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        Ok(rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }

    /// Memory that the file takes, bytes.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.fd)?.st_blocks as u64 * 512)
    }

    /// Pages up to its end.
    pub(super) fn pages(&self) -> io::Result<StorePage> {
        let bytes = rustix::fs::fstat(&self.fd)?.st_size as u64;
        Ok(StorePage::try_from(bytes.div_ceil(PAGE as u64)).unwrap_or(StorePage::MAX))
    }

    /// The first page from which on nobody can have mapped memory of the file.
    pub(super) fn end(&self) -> StorePage {
        self.end
    }

    /// Reads whole pages into `bytes`. Holes and what lies behind the end read as zeros.
    pub(super) fn read(&self, page: StorePage, bytes: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pread(&self.fd, &mut bytes[done..], offset(page) + done as u64) {
                Ok(0) => {
                    bytes[done..].fill(0);
                    break;
                }
                Ok(read) => done += read,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Writes whole pages from `page` on, at once. On an error, how many of them were written; nothing
    /// is left behind of the others.
    pub(super) fn write(&mut self, page: StorePage, bytes: &[u8]) -> Result<(), (u32, io::Error)> {
        let pages = (bytes.len() / PAGE) as StorePage;
        self.end = self.end.max(page.saturating_add(pages));
        let mut done = 0;
        while done < bytes.len() {
            let error =
                match rustix::io::pwrite(&self.fd, &bytes[done..], offset(page) + done as u64) {
                    Ok(0) => io::ErrorKind::WriteZero.into(),
                    Ok(written) => {
                        done += written;
                        continue;
                    }
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(error) => io::Error::from(error),
                };
            let written = (done / PAGE) as u32;
            let rest = (bytes.len() / PAGE) as u32 - written;
            if let Err(punch) = self.punch(page + written, rest) {
                log::warn!("cannot remove pages that could not be written: {punch}");
            }
            return Err((written, error));
        }
        Ok(())
    }

    /// Gives the memory of pages back to the host.
    pub(super) fn punch(&self, page: StorePage, pages: u32) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let bytes = u64::from(pages) * PAGE as u64;
        Ok(rustix::fs::fallocate(&self.fd, flags, offset(page), bytes)?)
    }

    /// Ranges of pages that take memory, in order.
    pub(super) fn data(&self) -> io::Result<Vec<Range<StorePage>>> {
        let mut ranges = Vec::new();
        let mut at = 0;
        loop {
            let start = match rustix::fs::seek(&self.fd, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(rustix::io::Errno::NXIO) => return Ok(ranges),
                Err(error) => return Err(error.into()),
            };
            let end = rustix::fs::seek(&self.fd, SeekFrom::Hole(start))?;
            let page = |bytes: u64| StorePage::try_from(bytes).unwrap_or(StorePage::MAX);
            ranges.push(page(start / PAGE as u64)..page(end.div_ceil(PAGE as u64)));
            at = end;
        }
    }
}

fn offset(page: StorePage) -> u64 {
    u64::from(page) * PAGE as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, chown};

    fn refusal(path: &Path) -> String {
        StoreFile::open(path).unwrap_err().to_string()
    }

    #[test]
    fn a_file_that_others_may_write_is_refused() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("group.pages");
        StoreFile::create(&path).unwrap();
        // After a restart it is opened again.
        fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        StoreFile::open(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );

        let other = directory.path().join("other");
        fs::hard_link(&path, &other).unwrap();
        assert!(refusal(&path).contains("has 2 names"), "{}", refusal(&path));
        fs::remove_file(&other).unwrap();
        StoreFile::open(&path).unwrap();

        if rustix::process::geteuid().is_root() {
            chown(&path, Some(65534), None).unwrap();
            let reason = refusal(&path);
            assert!(reason.contains("belongs to user 65534"), "{reason}");
            assert!(reason.contains("remove it"), "{reason}");
        }
    }

    #[test]
    fn its_end_is_behind_all_that_was_ever_written() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("group.pages");
        let mut file = StoreFile::create(&path).unwrap();
        assert_eq!(file.end(), 0);
        file.write(4, &[7; 3 * PAGE]).unwrap();
        file.write(1, &[7; PAGE]).unwrap();
        file.punch(4, 3).unwrap();
        assert_eq!(file.end(), 7);
        assert_eq!(StoreFile::open(&path).unwrap().end(), 7);
    }

    #[test]
    fn a_new_file_is_never_one_that_was_there() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("group.pages");
        fs::write(&path, "of somebody").unwrap();
        let error = StoreFile::create(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    }
}
