//! What the agent does with files.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::FileExt,
};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use super::held::Held;
use crate::{pattern, protocol::FileSum};

/// Writes `data` in one `write`, as sysfs wants it.
pub(super) fn write_once(path: &str, data: &str) -> Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .open(path)
        .with_context(|| format!("open {path}"))?;
    let written = file
        .write(data.as_bytes())
        .with_context(|| format!("write {data:?} to {path}"))?;
    ensure!(
        written == data.len(),
        "{path} took {written} of {} bytes",
        data.len()
    );
    Ok(())
}

/// The names in a directory, sorted.
pub(super) fn list(path: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).with_context(|| format!("list {path}"))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Every regular file on a disk that some process maps.
pub(super) fn mapped() -> Result<BTreeSet<String>> {
    let mut files = BTreeSet::new();
    for process in fs::read_dir("/proc").context("list /proc")? {
        let maps = process?.path().join("maps");
        // Not a process, or one that has just ended.
        let Ok(maps) = fs::read_to_string(maps) else {
            continue;
        };
        files.extend(maps.lines().filter_map(mapped_path).map(str::to_owned));
    }
    Ok(files)
}

/// The file of one line of `/proc/<pid>/maps`, unless it is a device, deleted, written through the mapping or no file
/// at all.
fn mapped_path(line: &str) -> Option<&str> {
    let mut fields = line.splitn(6, ' ');
    let access = fields.nth(1)?;
    let inode = fields.nth(2)?;
    let path = fields.next()?.trim_start();
    let device = ["/dev/", "/memfd:", "/SYSV", "/proc/", "/sys/", "/run/"];
    let ordinary = inode != "0"
        && access != "rw-s"
        && path.starts_with('/')
        && !path.ends_with(" (deleted)")
        && !device.iter().any(|prefix| path.starts_with(prefix));
    ordinary.then_some(path)
}

/// Hashes one file both ways.
pub(super) fn checksum(path: &str) -> FileSum {
    let mut sum = FileSum {
        path: path.to_owned(),
        bytes: 0,
        by_read: None,
        by_map: None,
        error: None,
    };
    let result = read_sum(path).and_then(|(bytes, hash)| {
        sum.bytes = bytes;
        sum.by_read = Some(hash);
        sum.by_map = Some(Held::map(path)?.sha256());
        Ok(())
    });
    sum.error = result.err().map(|error| format!("{error:#}"));
    sum
}

fn read_sum(path: &str) -> Result<(u64, String)> {
    let mut file = File::open(path).with_context(|| format!("open {path}"))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    let mut bytes = 0;
    loop {
        let read = file
            .read(&mut buffer)
            .with_context(|| format!("read {path}"))?;
        if read == 0 {
            return Ok((bytes, pattern::hex(&hasher.finalize())));
        }
        bytes += read as u64;
        hasher.update(&buffer[..read]);
    }
}

/// Writes pattern bytes and waits until they are on disk, so that the pages are clean.
pub(super) fn write_pattern(path: &str, seed: u64, offset: u64, bytes: u64) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("open {path}"))?;
    fill(&file, seed, offset, bytes).with_context(|| format!("write {path}"))?;
    file.sync_all().with_context(|| format!("fsync {path}"))
}

/// Writes pattern bytes.
pub(super) fn fill(file: &File, seed: u64, offset: u64, bytes: u64) -> Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut position = offset;
    let end = offset + bytes;
    while position < end {
        let length = (end - position).min(buffer.len() as u64) as usize;
        pattern::fill(seed, position, &mut buffer[..length]);
        file.write_all_at(&buffer[..length], position)?;
        position += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ordinary_mapped_files_count() {
        let library = "7f00-7f01 r-xp 00001000 fe:00 1234                       /usr/lib/x86_64-linux-gnu/libc.so.6";
        assert_eq!(
            mapped_path(library),
            Some("/usr/lib/x86_64-linux-gnu/libc.so.6")
        );
        for line in [
            "7f00-7f01 rw-p 00000000 00:00 0 ",
            "7f00-7f01 rw-p 00000000 00:00 0                          [heap]",
            "7f00-7f01 rw-s 00000000 00:01 1024                       /dev/zero (deleted)",
            "7f00-7f01 rw-s 00000000 fe:00 78                         /var/log/journal/1/system.journal",
            "7f00-7f01 rw-s 00000000 00:01 77                         /dev/shm/PostgreSQL.1",
            "7f00-7f01 r-xp 00000000 fe:00 9                          /usr/bin/old (deleted)",
        ] {
            assert_eq!(mapped_path(line), None, "{line}");
        }
    }

    #[test]
    fn both_hashes_agree_on_an_ordinary_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        write_pattern(path, 3, 0, 10_000).unwrap();
        let sum = checksum(path);
        assert_eq!(sum.bytes, 10_000);
        assert_eq!(
            sum.by_read,
            Some(pattern::Expected::new(3, 10_000).sha256())
        );
        assert_eq!(sum.by_read, sum.by_map);
        assert_eq!(sum.error, None);
    }
}
