//! apt with a configuration of its own: our sources, our lists, nothing of the machine's but its proxy.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{
    cache::Cache,
    pins::{self, Pin},
    process::{self, Log, bound_command},
    trouble::Trouble,
    ui::{Measure, Step},
};

pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The Debian mirror everything comes from; `PAGEFUSION_MIRROR` names another.
pub(crate) fn mirror() -> String {
    env::var("PAGEFUSION_MIRROR")
        .ok()
        .filter(|mirror| !mirror.is_empty())
        .unwrap_or_else(|| "http://deb.debian.org/debian".to_owned())
        .trim_end_matches('/')
        .to_owned()
}

/// A set of suites with lists of packages, apart from the machine's.
#[derive(Debug)]
pub(crate) struct PrivateApt {
    dir: PathBuf,
    log: PathBuf,
}

impl PrivateApt {
    pub(crate) fn new(cache: &Cache, suites: &[&str]) -> Result<Self> {
        let apt = Self {
            dir: cache.dir("apt").join(suites.join("+")),
            log: cache.dir("logs").join("apt.log"),
        };
        for dir in ["sources", "lists/partial", "archives/partial"] {
            fs::create_dir_all(apt.dir.join(dir))?;
        }
        fs::write(
            apt.dir.join("sources/pagefusion.sources"),
            sources(&mirror(), suites),
        )?;
        fs::write(apt.dir.join("status"), "")?;
        fs::write(
            apt.dir.join("apt.conf"),
            configuration(&apt.dir, &apt.dir.join("status")),
        )?;
        Ok(apt)
    }

    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = bound_command(program);
        command.arg("-c").arg(self.dir.join("apt.conf"));
        command
    }

    pub(crate) fn update(&self) -> Result<()> {
        let step = Step::start("package lists", Measure::Unknown);
        let mut log = Log::create(&self.log)?;
        let mut command = self.command("apt-get");
        command.args(["update", "--error-on=any"]);
        process::run("apt-get update", command, &step, &mut log).map_err(explain)?;
        step.done();
        Ok(())
    }

    /// What `arguments` of `apt-get` would download. With dependencies it is all that an empty root would need.
    pub(crate) fn uris(&self, arguments: &[&str]) -> Result<Vec<Pin>> {
        let mut command = self.command("apt-get");
        command.args(["--print-uris", "--yes"]).args(arguments);
        let text = process::capture("apt-get --print-uris", &mut command)?;
        pins::parse_uris(&text, &mirror())
    }

    /// The names of all packages that begin with `prefix`.
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let mut command = self.command("apt-cache");
        command.args(["pkgnames", prefix]);
        let text = process::capture("apt-cache pkgnames", &mut command)?;
        Ok(text.lines().map(str::to_owned).collect())
    }
}

fn sources(mirror: &str, suites: &[&str]) -> String {
    format!(
        "Types: deb\nURIs: {mirror}\nSuites: {}\nComponents: main\nSigned-By: {KEYRING}\n",
        suites.join(" ")
    )
}

fn configuration(dir: &Path, status: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "{dir}/sources";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State::Lists "{dir}/lists";
Dir::State::status "{}";
Dir::State::extended_states "{dir}/extended_states";
Dir::Cache::Archives "{dir}/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Log "{dir}";
#clear APT::Default-Release;
#clear APT::Architectures;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::ForceHash "SHA256";
Acquire::Retries "2";
Acquire::http::Timeout "20";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
"#,
        status.display()
    )
}

/// The private configuration as options of a command line, for an apt that works on the real machine.
pub(crate) fn machine_options(sources_dir: &Path, lists: &str) -> Vec<String> {
    [
        "Dir::Etc::SourceList=/dev/null".to_owned(),
        format!("Dir::Etc::SourceParts={}", sources_dir.display()),
        "Dir::Etc::PreferencesParts=/dev/null".to_owned(),
        format!("Dir::State::Lists={lists}"),
    ]
    .into_iter()
    .flat_map(|option| ["-o".to_owned(), option])
    .collect()
}

/// Sources for the machine itself: `suites`, and the security updates of `codename`, without
/// which packages may not fit what is already installed.
pub(crate) fn write_sources(dir: &Path, codename: &str, suites: &[&str]) -> Result<()> {
    let mirror = mirror();
    let security = format!("{codename}-security");
    let text = format!(
        "{}\n{}",
        sources(&mirror, suites),
        sources(&format!("{mirror}-security"), &[&security])
    );
    fs::create_dir_all(dir)?;
    fs::write(dir.join("pagefusion.sources"), text)
        .with_context(|| format!("cannot write to {}", dir.display()))
}

/// Turns a failed apt into the trouble behind it, if its output tells.
pub(crate) fn explain(error: anyhow::Error) -> anyhow::Error {
    if let Some(Trouble::Command { tail, .. }) = error.downcast_ref() {
        if let Some(trouble) = network_trouble(tail) {
            return trouble.into();
        }
    }
    error
}

pub(crate) fn network_trouble(output: &str) -> Option<Trouble> {
    const SIGNS: [&str; 9] = [
        "Could not resolve",
        "Temporary failure resolving",
        "Could not connect",
        "Unable to connect",
        "Cannot initiate the connection",
        "Connection failed",
        "Connection timed out",
        "Network is unreachable",
        "Something wicked happened resolving",
    ];
    let line = output
        .lines()
        .find(|line| SIGNS.iter().any(|sign| line.contains(sign)))?;
    Some(Trouble::NoNetwork {
        host: mirror(),
        detail: line
            .trim()
            .trim_start_matches("E: ")
            .trim_start_matches("W: ")
            .to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_sources_have_its_security_updates() {
        let dir = tempfile::tempdir().unwrap();
        write_sources(dir.path(), "bookworm", &["bookworm", "bookworm-backports"]).unwrap();
        let text = fs::read_to_string(dir.path().join("pagefusion.sources")).unwrap();
        let stanzas: Vec<_> = text.split("\n\n").collect();
        assert_eq!(stanzas.len(), 2, "{text}");
        assert!(stanzas[0].contains("Suites: bookworm bookworm-backports\n"));
        assert!(stanzas[1].contains("-security\nSuites: bookworm-security\n"));
    }

    #[test]
    fn an_apt_that_cannot_reach_its_mirror_is_told_as_no_network() {
        let output = "Ign:1 http://x/debian trixie InRelease\nE: Failed to fetch http://x/debian  Temporary failure resolving 'x'\n";
        let trouble = network_trouble(output).unwrap();
        assert!(
            matches!(trouble, Trouble::NoNetwork { ref detail, .. } if detail.contains("resolving 'x'"))
        );
        assert!(network_trouble("E: Unable to locate package qemu").is_none());
    }
}
