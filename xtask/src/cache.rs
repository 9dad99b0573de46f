//! The cache: complete entries under names that carry their content's hash.
//!
//! An entry is made in a directory of its own below `tmp/`, under a lock for its
//! key, and renamed into `entries/` when it is complete. So an entry that can be
//! seen is whole, and whatever lies in `tmp/` without a holder of its lock is the
//! remains of a build that died; the next run removes it.

use std::{
    env, fs,
    fs::{File, OpenOptions},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use crate::{
    key::Key,
    namespace, process,
    process::Log,
    trouble::{Trouble, is_disk_full},
    ui,
};

#[derive(Debug, Clone)]
pub(crate) struct Cache {
    root: PathBuf,
}

/// What a build gets: a directory to fill, and a log.
#[derive(Debug)]
pub(crate) struct Build<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) log: Log,
}

impl Cache {
    /// Opens the user's cache and clears away what dead builds left.
    pub(crate) fn open() -> Result<Self> {
        Self::at(location(|name| env::var_os(name).map(PathBuf::from))?)
    }

    pub(crate) fn at(root: PathBuf) -> Result<Self> {
        if root
            .as_os_str()
            .as_encoded_bytes()
            .iter()
            .any(|byte| b":,\\\n".contains(byte))
        {
            bail!(
                "the cache directory {} has a character in its name that overlay mounts do not allow (: , \\)\n  \
                 Set PAGEFUSION_CACHE to another directory.",
                root.display()
            );
        }
        for dir in ["entries", "tmp", "locks", "logs", "debs", "resolved", "apt"] {
            fs::create_dir_all(root.join(dir)).with_context(|| {
                format!(
                    "cannot make the cache in {}; set PAGEFUSION_CACHE to a directory you may write to",
                    root.display()
                )
            })?;
        }
        let root = root.canonicalize()?;
        let cache = Self { root };
        cache.sweep()?;
        Ok(cache)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The entry's path, if it is there.
    pub(crate) fn lookup(&self, key: &Key) -> Option<PathBuf> {
        let path = self.root.join("entries").join(key.as_str());
        // The time of last use, for `remove`. Without write access there is none to keep.
        let found = File::open(&path).ok()?;
        let _ = found.set_modified(SystemTime::now());
        Some(path)
    }

    /// The entry for `key`, made by `build` if it is not there yet.
    pub(crate) fn entry(
        &self,
        key: &Key,
        what: &str,
        build: impl FnOnce(&mut Build<'_>) -> Result<()>,
    ) -> Result<PathBuf> {
        if let Some(path) = self.lookup(key) {
            return Ok(path);
        }
        let _lock = self.lock(key.as_str(), what)?;
        if let Some(path) = self.lookup(key) {
            return Ok(path);
        }
        process::stop_if_interrupted()?;
        let temporary = Temporary::make(&self.root.join("tmp"), key.as_str())?;
        let log = Log::create(&self.root.join("logs").join(format!("{}.log", key.kind())))?;
        let built = build(&mut Build {
            dir: &temporary.path,
            log,
        })
        .and_then(|()| {
            publish(
                &temporary.path,
                &self.root.join("entries").join(key.as_str()),
            )
        });
        match built {
            Ok(path) => Ok(path),
            Err(_) if process::interrupted() => Err(Trouble::Interrupted.into()),
            Err(error) if is_disk_full(&error) => Err(Trouble::DiskFull {
                what: what.to_owned(),
                place: self.root.clone(),
            }
            .into()),
            Err(error) => Err(error.context(format!("{what} could not be made"))),
        }
    }

    /// A directory for passing use, gone when dropped.
    pub(crate) fn scratch(&self, name: &str) -> Result<Scratch> {
        let lock = self.lock_file(&format!("{name}-{}", std::process::id()))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .context("a lock of our own is held by another")?;
        let temporary = Temporary::make(
            &self.root.join("tmp"),
            &format!("{name}-{}", std::process::id()),
        )?;
        Ok(Scratch {
            temporary,
            _lock: lock,
        })
    }

    /// Waits for the lock `name`, saying so when it takes waiting.
    pub(crate) fn lock(&self, name: &str, what: &str) -> Result<File> {
        let mut file = self.lock_file(name)?;
        let mut told = false;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error).context(format!("cannot lock {what}")),
            }
            if !told {
                let mut holder = String::new();
                file.rewind()?;
                file.read_to_string(&mut holder)?;
                ui::notice(&format!(
                    "waiting for {what}, which another xtask (process {}) is making",
                    holder.trim()
                ));
                told = true;
            }
            process::stop_if_interrupted()?;
            std::thread::sleep(Duration::from_millis(100));
        }
        file.rewind()?;
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())?;
        Ok(file)
    }

    fn lock_file(&self, name: &str) -> Result<File> {
        let path = self.root.join("locks").join(name);
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .with_context(|| format!("cannot open the lock {}", path.display()))
    }

    /// Removes entries that were not used for `unused`, or with `None` everything; returns what each held.
    /// What another xtask is making is waited for.
    pub(crate) fn remove(&self, unused: Option<Duration>) -> Result<Vec<(String, u64)>> {
        let mut sizes = Vec::new();
        for entry in sorted(&self.root.join("entries"))? {
            let idle = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
            if unused.is_some_and(|unused| idle < unused) {
                continue;
            }
            let name = entry.file_name().to_string_lossy().into_owned();
            let _lock = self.lock(&name, &name)?;
            sizes.push((name, disk_usage(&entry.path())));
            remove_entry(&entry.path())?;
        }
        if unused.is_some() {
            return Ok(sizes);
        }
        let _packages = self.lock("debs", "packages")?;
        let _lists = self.lock("apt", "package lists")?;
        for part in ["debs", "apt", "resolved", "logs"] {
            let path = self.root.join(part);
            sizes.push((part.to_owned(), disk_usage(&path)));
            remove_entry(&path)?;
        }
        Ok(sizes)
    }

    /// Removes temporary directories whose maker is no more.
    fn sweep(&self) -> Result<()> {
        for entry in fs::read_dir(self.root.join("tmp"))? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let key = name.rsplit_once('.').map_or(&*name, |(key, _)| key);
            let lock = self.lock_file(key)?;
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                namespace::remove_tree(&entry.path()).with_context(|| {
                    format!("cannot remove the remains {}", entry.path().display())
                })?;
            }
        }
        Ok(())
    }
}

/// A directory that is removed when this is dropped, unless it was renamed away.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    fn make(parent: &Path, name: &str) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix(&format!("{name}."))
            .tempdir_in(parent)
            .context("cannot make a temporary directory in the cache")?;
        // Kept, because files of other users in it (guest images) take more than remove_dir_all.
        let path = dir.keep();
        // What is inside is no secret, and services that run as other users in it must get through.
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(Self { path })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Err(error) = namespace::remove_tree(&self.path) {
            ui::notice(&format!(
                "{} could not be removed now ({error:#}); the next run will",
                self.path.display()
            ));
        }
    }
}

#[derive(Debug)]
pub(crate) struct Scratch {
    // Dropped in this order: the directory goes while its lock is still held.
    temporary: Temporary,
    _lock: File,
}

impl Scratch {
    pub(crate) fn path(&self) -> &Path {
        &self.temporary.path
    }
}

fn publish(from: &Path, to: &Path) -> Result<PathBuf> {
    process::stop_if_interrupted()?;
    // The rename must not reach the disk before the content does.
    rustix::fs::syncfs(File::open(from)?)?;
    fs::rename(from, to).with_context(|| format!("cannot put {} in place", to.display()))?;
    Ok(to.to_owned())
}

fn location(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf> {
    let set = |name| variable(name).filter(|path| !path.as_os_str().is_empty());
    if let Some(path) = set("PAGEFUSION_CACHE") {
        return Ok(std::path::absolute(path)?);
    }
    if let Some(path) = set("XDG_CACHE_HOME").filter(|path| path.is_absolute()) {
        return Ok(path.join("pagefusion"));
    }
    match set("HOME") {
        Some(home) => Ok(home.join(".cache/pagefusion")),
        None => bail!(
            "neither PAGEFUSION_CACHE, XDG_CACHE_HOME nor HOME is set: where to keep the cache?"
        ),
    }
}

fn sorted(dir: &Path) -> Result<Vec<fs::DirEntry>> {
    let mut entries = fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

fn remove_entry(path: &Path) -> Result<()> {
    namespace::remove_tree(path).with_context(|| format!("cannot remove {}", path.display()))
}

/// Bytes on disk below `path`; what may not be read counts as nothing.
fn disk_usage(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return 0;
    };
    let below = if metadata.is_dir() {
        fs::read_dir(path)
            .map(|entries| {
                entries
                    .flatten()
                    .map(|entry| disk_usage(&entry.path()))
                    .sum()
            })
            .unwrap_or(0)
    } else {
        0
    };
    below + metadata.blocks() * 512
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Barrier,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;
    use crate::key::KeyBuilder;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache")).unwrap();
        (dir, cache)
    }

    fn key() -> Key {
        KeyBuilder::new("thing").finish()
    }

    fn leftovers(cache: &Cache) -> usize {
        fs::read_dir(cache.dir("tmp")).unwrap().count()
    }

    #[test]
    fn a_build_that_fails_leaves_nothing_and_the_next_one_makes_the_entry() {
        let (_dir, cache) = cache();
        let failed = cache.entry(&key(), "a thing", |build| {
            fs::write(build.dir.join("half"), "x")?;
            bail!("no luck")
        });
        assert!(failed.is_err());
        assert_eq!(leftovers(&cache), 0);
        assert!(cache.lookup(&key()).is_none());

        let path = cache
            .entry(&key(), "a thing", |build| {
                assert!(!build.dir.join("half").exists());
                Ok(fs::write(build.dir.join("whole"), "y")?)
            })
            .unwrap();
        assert_eq!(fs::read_to_string(path.join("whole")).unwrap(), "y");
        assert_eq!(leftovers(&cache), 0);
    }

    #[test]
    fn the_remains_of_a_killed_build_are_swept_and_those_of_a_live_one_are_not() {
        let (_dir, cache) = cache();
        let dead = cache.dir("tmp").join(format!("{}.dead", key()));
        let live = cache.dir("tmp").join("other-0123456789abcdef.live");
        for dir in [&dead, &live] {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("file"), "x").unwrap();
        }
        let _held = cache.lock("other-0123456789abcdef", "other").unwrap();
        let again = Cache::at(cache.root().to_owned()).unwrap();
        assert!(!dead.exists());
        assert!(live.exists());
        again.entry(&key(), "a thing", |_| Ok(())).unwrap();
    }

    #[test]
    fn two_who_want_the_same_entry_at_once_build_it_once() {
        let (_dir, cache) = cache();
        let built = AtomicUsize::new(0);
        let start = Barrier::new(2);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    start.wait();
                    let path = cache.entry(&key(), "a thing", |build| {
                        built.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(150));
                        Ok(fs::write(build.dir.join("whole"), "y")?)
                    });
                    assert!(path.unwrap().join("whole").exists());
                });
            }
        });
        assert_eq!(built.into_inner(), 1);
    }

    #[test]
    fn a_full_disk_is_told_as_such() {
        let (_dir, cache) = cache();
        let error = cache
            .entry(&key(), "a thing", |_| {
                Err(std::io::Error::from(std::io::ErrorKind::StorageFull).into())
            })
            .unwrap_err();
        assert!(matches!(
            error.downcast_ref(),
            Some(Trouble::DiskFull { .. })
        ));
    }

    #[test]
    fn the_cache_is_where_the_user_said_before_where_the_desktop_says() {
        let pick = |set: &[(&str, &str)]| {
            location(|name| {
                set.iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| PathBuf::from(value))
            })
        };
        let all = [
            ("PAGEFUSION_CACHE", "/a"),
            ("XDG_CACHE_HOME", "/b"),
            ("HOME", "/c"),
        ];
        assert_eq!(pick(&all).unwrap(), Path::new("/a"));
        assert_eq!(pick(&all[1..]).unwrap(), Path::new("/b/pagefusion"));
        assert_eq!(pick(&all[2..]).unwrap(), Path::new("/c/.cache/pagefusion"));
        assert_eq!(
            pick(&[("PAGEFUSION_CACHE", ""), ("HOME", "/c")]).unwrap(),
            Path::new("/c/.cache/pagefusion")
        );
        assert!(pick(&[]).is_err());
    }

    #[test]
    fn cleaning_tells_what_each_entry_held_and_spares_what_was_just_used() {
        let (_dir, cache) = cache();
        cache
            .entry(&key(), "a thing", |build| {
                Ok(fs::write(build.dir.join("file"), [1; 10_000])?)
            })
            .unwrap();
        let hour = Duration::from_secs(3600);
        assert!(cache.remove(Some(hour)).unwrap().is_empty());
        assert!(cache.lookup(&key()).is_some());
        let sizes = cache.remove(None).unwrap();
        assert!(
            sizes
                .iter()
                .any(|(name, size)| *name == key().to_string() && *size >= 10_000)
        );
        assert!(cache.lookup(&key()).is_none());
    }

    #[test]
    fn cleaning_what_is_old_removes_only_that() {
        let (_dir, cache) = cache();
        let old = KeyBuilder::new("old").finish();
        for key in [&old, &key()] {
            cache.entry(key, "a thing", |_| Ok(())).unwrap();
        }
        let past = SystemTime::now() - Duration::from_secs(7200);
        File::open(cache.dir("entries").join(old.as_str()))
            .unwrap()
            .set_modified(past)
            .unwrap();
        let removed = cache.remove(Some(Duration::from_secs(3600))).unwrap();
        assert_eq!(removed.len(), 1);
        assert!(cache.lookup(&old).is_none());
        assert!(cache.lookup(&key()).is_some());
    }
}
