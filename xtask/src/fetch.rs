//! Packages into the store: fetched by apt's own downloader, verified against their pins.
//!
//! A file in the store carries its checksum in its name and was verified before
//! it got that name, so what is there can be used as it is.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::{
    apt::{PrivateApt, mirror, network_trouble},
    cache::Cache,
    key::hex,
    pins::{Pin, decoded, total_size},
    process::{self, Log},
    space,
    trouble::Trouble,
    ui::{Measure, Step},
};

/// How a fetch ended that met no trouble worth stopping for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fetched {
    All,
    /// The mirror no longer has this file (and maybe more).
    Gone(String),
}

pub(crate) fn stored(cache: &Cache, pin: &Pin) -> PathBuf {
    cache.dir("debs").join(pin.store_name())
}

/// Brings all of `pins` into the store. What arrives is kept, whatever happens to the rest.
pub(crate) fn fetch(cache: &Cache, set: &str, pins: &[Pin]) -> Result<Fetched> {
    let missing = |pins: &[Pin]| -> Vec<Pin> {
        pins.iter()
            .filter(|pin| !stored(cache, pin).exists())
            .cloned()
            .collect()
    };
    if missing(pins).is_empty() {
        return Ok(Fetched::All);
    }
    let _lock = cache.lock("debs", "packages")?;
    let wanted = missing(pins);
    if wanted.is_empty() {
        return Ok(Fetched::All);
    }
    let total = total_size(&wanted);
    space::require(
        cache.root(),
        total + 100 * space::MIB,
        &format!("the packages of {set}"),
    )?;

    let scratch = cache.scratch("download")?;
    let step = Step::start(&format!("packages: {set}"), Measure::Bytes(total));
    let mut log = Log::create(&cache.dir("logs").join("download.log"))?;
    let mut command = PrivateApt::new(cache, &["trixie"])?.command("/usr/lib/apt/apt-helper");
    command.arg("download-file");
    for pin in &wanted {
        command
            .arg(format!("{}/{}", mirror(), pin.path))
            .arg(scratch.path().join(pin.store_name()))
            .arg(format!("SHA256:{}", pin.sha256));
    }
    let mut output = String::new();
    let result =
        process::run_watched(
            "apt-helper download-file",
            &mut command,
            &mut log,
            |line| match line {
                Some(line) => {
                    output.push_str(line);
                    output.push('\n');
                }
                None => step.position(bytes_in(scratch.path())),
            },
        );
    let kept = keep(cache, scratch.path(), &wanted);
    if result.is_ok() && kept.is_ok() {
        step.done();
        return Ok(Fetched::All);
    }
    process::stop_if_interrupted()?;
    if let Some(trouble) = network_trouble(&output) {
        return Err(trouble.into());
    }
    if let Some(file) = gone(&output) {
        return Ok(Fetched::Gone(file));
    }
    if let Some(trouble) = mismatch(&output, &wanted) {
        return Err(trouble.into());
    }
    if output.contains("No space left on device") {
        return Err(Trouble::DiskFull {
            what: format!("the packages of {set}"),
            place: cache.root().to_owned(),
        }
        .into());
    }
    kept?;
    result.map(|()| Fetched::All)
}

/// Moves what has arrived whole from `from` into the store.
fn keep(cache: &Cache, from: &Path, wanted: &[Pin]) -> Result<()> {
    let mut wrong = None;
    for pin in wanted {
        let path = from.join(pin.store_name());
        let actual = match file_sha256(&path) {
            Ok(actual) => actual,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).context("cannot read what was fetched"),
        };
        let whole = fs::metadata(&path)?.len() == pin.size;
        if actual == pin.sha256 && whole {
            fs::rename(&path, stored(cache, pin))?;
        } else if whole {
            wrong = Some(Trouble::Checksum {
                file: pin.file_name(),
                expected: pin.sha256.clone(),
                actual,
            });
        }
    }
    wrong.map_or(Ok(()), |trouble| Err(trouble.into()))
}

fn bytes_in(dir: &Path) -> u64 {
    // Only for the progress bar: what cannot be read counts as nothing.
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|entry| Some(entry.metadata().ok()?.len()))
        .sum()
}

pub(crate) fn file_sha256(path: &Path) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..read]);
    }
}

/// The first file that the mirror says it does not have.
fn gone(output: &str) -> Option<String> {
    let line = output
        .lines()
        .find(|line| line.contains("Failed to fetch") && line.contains("404 "))?;
    let url = line.split_whitespace().find(|word| word.contains("://"))?;
    Some(decoded(url.rsplit('/').next().unwrap_or(url)))
}

fn mismatch(output: &str, wanted: &[Pin]) -> Option<Trouble> {
    if !output.contains("Hash Sum mismatch") && !output.contains("File has unexpected size") {
        return None;
    }
    let line = output
        .lines()
        .find(|line| line.contains("Failed to fetch"))?;
    let pin = wanted.iter().find(|pin| line.contains(&pin.path))?;
    let actual = output
        .lines()
        .skip_while(|line| !line.contains("received"))
        .find_map(|line| line.trim().strip_prefix("- SHA256:"))
        .map_or("something else", |sum| {
            sum.split_whitespace().next().unwrap_or(sum)
        });
    Some(Trouble::Checksum {
        file: pin.file_name(),
        expected: pin.sha256.clone(),
        actual: actual.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_the_mirror_does_not_have_is_named_as_it_is_written() {
        let output = "E: Failed to fetch http://m/debian/pool/main/l/linux-x_1%2b2%7e3_all.deb  404  Not Found [IP: 1.2.3.4 80]\n";
        assert_eq!(gone(output).unwrap(), "linux-x_1+2~3_all.deb");
        assert_eq!(gone("E: Failed to fetch http://m/x  503  Busy\n"), None);
    }

    #[test]
    fn a_wrong_checksum_is_told_with_file_and_both_sums() {
        let pin = Pin {
            sha256: "ab".repeat(32),
            size: 3,
            path: "pool/x_1_all.deb".into(),
        };
        let output = "E: Failed to fetch http://m/debian/pool/x_1_all.deb  Hash Sum mismatch\n   Hashes of expected file:\n    - SHA256:abab\n   Hashes of received file:\n    - SHA256:cdcd\n";
        let trouble = mismatch(output, &[pin]).unwrap();
        let Trouble::Checksum { file, actual, .. } = trouble else {
            panic!("{trouble}");
        };
        assert_eq!((file.as_str(), actual.as_str()), ("x_1_all.deb", "cdcd"));
    }

    #[test]
    fn what_arrived_whole_is_kept_and_what_differs_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache")).unwrap();
        let from = dir.path().join("from");
        fs::create_dir(&from).unwrap();
        let pin = |name: &str, content: &[u8]| Pin {
            sha256: hex(&Sha256::digest(content)),
            size: content.len() as u64,
            path: format!("pool/{name}_1_all.deb"),
        };
        let pins = [
            pin("good", b"good"),
            pin("bad", b"bad!"),
            pin("late", b"late"),
        ];
        fs::write(from.join(pins[0].store_name()), "good").unwrap();
        fs::write(from.join(pins[1].store_name()), "evil").unwrap();
        let error = keep(&cache, &from, &pins).unwrap_err();
        assert!(matches!(
            error.downcast_ref(),
            Some(Trouble::Checksum { file, .. }) if file == "bad_1_all.deb"
        ));
        assert!(stored(&cache, &pins[0]).exists());
        assert!(!stored(&cache, &pins[1]).exists());
        assert!(!stored(&cache, &pins[2]).exists());
    }
}
