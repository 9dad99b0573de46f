//! Running things in a mount and process namespace of their own.
//!
//! Mounts and processes in it end with it, and it ends with us: nothing can be
//! left behind, not even by SIGKILL. Without root a user namespace gives the
//! same rights over our own files, with the help of the user's subordinate ids.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::process::bound_command;

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// `script` (for sh) in namespaces of its own, as root of at least its own files. `/proc` fits the namespace.
pub(crate) fn script(script: &str, arguments: &[&OsStr]) -> Command {
    let mut command = bound_command("unshare");
    command.args([
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "--propagation",
        "private",
    ]);
    if !is_root() {
        command.args(["--user", "--map-root-user", "--map-auto"]);
    }
    command
        .args(["sh", "-euc", script, "pagefusion"])
        .args(arguments)
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
    command
}

/// A root made of read-only layers, with what is written to it kept in memory and thrown away.
#[derive(Debug)]
pub(crate) struct Sandbox {
    layers: Vec<PathBuf>,
    binds: Vec<(PathBuf, String)>,
}

impl Sandbox {
    /// The first layer is the uppermost.
    pub(crate) fn new(layers: impl IntoIterator<Item = PathBuf>) -> Self {
        Self {
            layers: layers.into_iter().collect(),
            binds: Vec::new(),
        }
    }

    /// Shows the directory `outside` as `inside`, and lets it be written to.
    pub(crate) fn writable(mut self, outside: &Path, inside: &str) -> Self {
        self.binds.push((outside.to_owned(), inside.to_owned()));
        self
    }

    /// `inner`, a script for sh, in this root.
    pub(crate) fn command(&self, inner: &str, arguments: &[&str]) -> Command {
        const ENTER: &str = r#"
            scratch=/run
            mount -t tmpfs -o mode=0755 pagefusion "$scratch"
            mkdir "$scratch/upper" "$scratch/workdir" "$scratch/root"
            mount -t overlay -o "lowerdir=$1,upperdir=$scratch/upper,workdir=$scratch/workdir" pagefusion "$scratch/root"
            inner=$2 binds=$3
            shift 3
            root=$scratch/root
            while [ "$binds" -gt 0 ]; do
                mkdir -p "$root$2"
                mount --bind "$1" "$root$2"
                binds=$((binds - 1))
                shift 2
            done
            for node in null zero full random urandom; do
                [ -e "$root/dev/$node" ] || : > "$root/dev/$node"
                mount --bind "/dev/$node" "$root/dev/$node"
            done
            mount -t proc proc "$root/proc"
            exec chroot "$root" sh -euc "$inner" pagefusion "$@"
        "#;
        let mut lower = OsString::new();
        for layer in &self.layers {
            if !lower.is_empty() {
                lower.push(":");
            }
            lower.push(layer);
        }
        let count = self.binds.len().to_string();
        let mut all: Vec<&OsStr> = vec![&lower, inner.as_ref(), count.as_ref()];
        for (outside, inside) in &self.binds {
            all.extend([outside.as_os_str(), OsStr::new(inside)]);
        }
        all.extend(arguments.iter().map(OsStr::new));
        script(ENTER, &all)
    }
}

/// Removes `path` and all below it, also where files belong to subordinate ids.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) if is_root() => return Err(error.into()),
        Err(_) => {}
    }
    let output = script("rm -rf -- \"$1\"", &[path.as_os_str()])
        .output()
        .context("cannot start unshare")?;
    anyhow::ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
