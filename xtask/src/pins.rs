//! Pins: exact packages by checksum, and the text files that keep them.
//!
//! A line is `sha256 size path`, the path below the mirror's root. Name and
//! version of a package are those in its file name.

use std::fmt;

use anyhow::{Context, Result, bail};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pin {
    pub(crate) sha256: String,
    pub(crate) size: u64,
    /// Below the mirror's root, percent-encoded as in a URL.
    pub(crate) path: String,
}

impl Pin {
    /// `name_version_arch.deb`
    pub(crate) fn file_name(&self) -> String {
        decoded(self.path.rsplit('/').next().unwrap_or(&self.path))
    }

    pub(crate) fn name(&self) -> String {
        self.part(0)
    }

    /// As in the file name, so without an epoch.
    pub(crate) fn version(&self) -> String {
        self.part(1)
    }

    fn part(&self, index: usize) -> String {
        self.file_name()
            .split('_')
            .nth(index)
            .unwrap_or_default()
            .to_owned()
    }

    /// What the file is called in the store of packages: content first.
    pub(crate) fn store_name(&self) -> String {
        format!("{}-{}", &self.sha256[..16], self.file_name())
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.sha256, self.size, self.path)
    }
}

/// Undoes the percent-encoding of what occurs in names of packages.
pub(crate) fn decoded(name: &str) -> String {
    name.replace("%2b", "+")
        .replace("%3a", ":")
        .replace("%7e", "~")
}

/// Reads a pins file: one pin per line, `#` begins a comment line.
pub(crate) fn parse(text: &str) -> Result<Vec<Pin>> {
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'))
        .map(|(number, line)| {
            parse_line(line).with_context(|| format!("line {} of the pins: {line:?}", number + 1))
        })
        .collect()
}

fn parse_line(line: &str) -> Result<Pin> {
    let mut words = line.split_whitespace();
    let (Some(sha256), Some(size), Some(path), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        bail!("wanted: sha256 size path");
    };
    new_pin(sha256, size, path)
}

fn new_pin(sha256: &str, size: &str, path: &str) -> Result<Pin> {
    if sha256.len() != 64 || !sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
        bail!("{sha256:?} is no SHA-256");
    }
    let size = size
        .parse()
        .with_context(|| format!("{size:?} is no size"))?;
    if path.split('/').any(|part| part == "..") || !path.ends_with(".deb") {
        bail!("{path:?} is no package");
    }
    Ok(Pin {
        sha256: sha256.to_ascii_lowercase(),
        size,
        path: path.to_owned(),
    })
}

/// Reads what `apt-get --print-uris` prints: `'http://…/pool/…' name size SHA256:…`.
pub(crate) fn parse_uris(text: &str, mirror: &str) -> Result<Vec<Pin>> {
    let mut pins = text
        .lines()
        .filter(|line| line.starts_with('\''))
        .map(|line| {
            let mut words = line.split_whitespace();
            let (Some(url), Some(_), Some(size), Some(hash)) =
                (words.next(), words.next(), words.next(), words.next())
            else {
                bail!("apt printed {line:?}");
            };
            let path = url
                .trim_matches('\'')
                .strip_prefix(mirror)
                .with_context(|| format!("{url} is not on {mirror}"))?;
            let sha256 = hash
                .strip_prefix("SHA256:")
                .with_context(|| format!("apt gave no SHA-256 for {path}"))?;
            new_pin(sha256, size, path.trim_start_matches('/'))
        })
        .collect::<Result<Vec<_>>>()?;
    pins.sort_by_key(Pin::file_name);
    Ok(pins)
}

pub(crate) fn render(set: &str, pins: &[Pin]) -> String {
    let mut text = format!(
        "# Packages of the set \"{set}\": sha256, size, path on the mirror. Made by `cargo xtask pins`.\n"
    );
    for pin in pins {
        text.push_str(&format!("{pin}\n"));
    }
    text
}

pub(crate) fn total_size(pins: &[Pin]) -> u64 {
    pins.iter().map(|pin| pin.size).sum()
}

/// What a reader should know about new pins that had to take the place of `old` ones.
pub(crate) fn replacements(old: &[Pin], new: &[Pin]) -> Vec<String> {
    // A version may be part of a name too: linux-binary-7.3.4+deb13-cloud-amd64.
    let stem = |pin: &Pin| pin.name().replace(|c: char| c.is_ascii_digit(), "");
    let full = |pin: &Pin| format!("{} {}", pin.name(), pin.version());
    let mut lines = Vec::new();
    for pin in new {
        if old.iter().any(|was| was.sha256 == pin.sha256) {
            continue;
        }
        let was = old
            .iter()
            .find(|was| was.name() == pin.name())
            .or_else(|| old.iter().find(|was| stem(was) == stem(pin)));
        match was {
            Some(was) => lines.push(format!("{} instead of {}", full(pin), full(was))),
            None => lines.push(format!("{} is new", full(pin))),
        }
    }
    for was in old {
        if !new.iter().any(|pin| stem(pin) == stem(was)) {
            lines.push(format!("{} is gone", full(was)));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUM: &str = "c4fbc8e404958693b28825474c20742d70594d65ca58aea7be6a279c81eb6fa0";

    fn pin(path: &str, sum: &str) -> Pin {
        Pin {
            sha256: sum.to_owned(),
            size: 7,
            path: path.to_owned(),
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let pins = vec![
            pin("pool/main/a/apt/apt_3.0.3_amd64.deb", SUM),
            pin("pool/main/z/z_1%2b2_all.deb", SUM),
        ];
        assert_eq!(parse(&render("x", &pins)).unwrap(), pins);
    }

    #[test]
    fn name_and_version_come_from_the_file_name() {
        let pin = pin(
            "pool/main/l/linux/linux-binary-7.3.4%2bdeb13-cloud-amd64_7.3.4-1%7ebpo13%2b1_amd64.deb",
            SUM,
        );
        assert_eq!(pin.name(), "linux-binary-7.3.4+deb13-cloud-amd64");
        assert_eq!(pin.version(), "7.3.4-1~bpo13+1");
    }

    #[test]
    fn a_line_that_is_no_pin_is_refused_with_its_number() {
        for bad in [
            "deadbeef 7 pool/a_1_all.deb".to_owned(),
            format!("{SUM} seven pool/a_1_all.deb"),
            format!("{SUM} 7 ../../etc/passwd.deb"),
            format!("{SUM} 7 pool/a_1_all.tar"),
            format!("{SUM} 7"),
            format!("{SUM} 7 pool/a_1_all.deb more"),
        ] {
            let error = parse(&format!("# comment\n{bad}\n")).unwrap_err();
            assert!(error.to_string().starts_with("line 2 "), "{error}");
        }
    }

    #[test]
    fn apts_list_of_uris_becomes_pins() {
        let text = format!(
            "Reading package lists...\n'http://m/debian/pool/main/k/kmod/kmod_34.2-2_amd64.deb' kmod_34.2-2_amd64.deb 95704 SHA256:{SUM}\n"
        );
        let pins = parse_uris(&text, "http://m/debian").unwrap();
        assert_eq!(pins.len(), 1);
        assert_eq!(pins[0].path, "pool/main/k/kmod/kmod_34.2-2_amd64.deb");
        assert_eq!(pins[0].size, 95704);
        assert!(
            parse_uris(&text, "http://other").is_err(),
            "a package from elsewhere"
        );
        assert!(parse_uris(&text.replace("SHA256", "MD5Sum"), "http://m/debian").is_err());
    }

    #[test]
    fn replacements_name_old_and_new_version() {
        let other = SUM.replace('c', "d");
        let old = [
            pin("p/a_1_all.deb", SUM),
            pin("p/b_1_all.deb", SUM),
            pin("p/linux-7.3.4-x_7.3.4_all.deb", SUM),
        ];
        let new = [
            pin("p/a_2_all.deb", &other),
            pin("p/c_1_all.deb", &other),
            pin("p/linux-7.3.10-x_7.3.10_all.deb", &other),
        ];
        assert_eq!(
            replacements(&old, &new),
            [
                "a 2 instead of a 1",
                "c 1 is new",
                "linux-7.3.10-x 7.3.10 instead of linux-7.3.4-x 7.3.4",
                "b 1 is gone"
            ]
        );
        assert!(replacements(&old, &old).is_empty());
    }
}
