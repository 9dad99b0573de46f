//! What the host's crate is to those who put it into a VMM of theirs: without its programs' features, which a build of
//! the whole workspace switches on.

use std::process::Command;

use anyhow::{Context, Result, ensure};

const PACKAGE: [&str; 3] = ["--package", "pagefusion-host", "--no-default-features"];
/// Command lines, screens, signals, users, and whatever sets a logger up: none of it is for a library to have.
const FOREIGN: [&str; 18] = [
    "anyhow",
    "clap",
    "clap_complete",
    "comfy-table",
    "crossterm",
    "ctrlc",
    "env_logger",
    "fern",
    "httparse",
    "nix",
    "prometheus-client",
    "ratatui",
    "sd-notify",
    "signal-hook",
    "simple_logger",
    "simplelog",
    "tracing-subscriber",
    "systemd-journal-logger",
];

/// Clippy for the library and for what its examples need, one by one: together they would share features.
pub(crate) fn lints(cargo: impl Fn() -> Command) -> [(&'static str, Command); 2] {
    let lint = |target: &[&str]| {
        let mut command = cargo();
        command
            .arg("clippy")
            .args(PACKAGE)
            .args(target)
            .args(["--", "-D", "warnings"]);
        command
    };
    [
        ("cargo clippy of the library", lint(&["--lib"])),
        ("cargo clippy of its examples", lint(&["--examples"])),
    ]
}

/// Fails if the library brings something into a VMM that only programs need.
pub(crate) fn check_dependencies(mut cargo: Command) -> Result<()> {
    let output = cargo
        .arg("tree")
        .args(PACKAGE)
        .args(["--edges", "normal", "--prefix", "none"])
        .output()
        .context("cannot start cargo tree")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo tree: {}", errors.trim());
    let tree = String::from_utf8_lossy(&output.stdout);
    ensure!(
        tree.starts_with("pagefusion-host "),
        "cargo tree does not begin with pagefusion-host"
    );
    let foreign = foreign(&tree);
    ensure!(
        foreign.is_empty(),
        "the library depends on {}",
        foreign.join(", ")
    );
    Ok(())
}

/// Crates of a tree that the library must not have.
fn foreign(tree: &str) -> Vec<&str> {
    let names = tree.lines().filter_map(|line| line.split(' ').next());
    names.filter(|name| FOREIGN.contains(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_brings_no_program_along() {
        check_dependencies(Command::new(env!("CARGO"))).unwrap();
    }

    #[test]
    fn a_crate_is_foreign_by_its_whole_name() {
        let tree =
            "pagefusion-host v0.1.0 (/src/host)\nlog v0.4.35\nclap v4.5.1 (*)\nclap-like v1.0.0\n";
        assert_eq!(foreign(tree), ["clap"]);
    }
}
