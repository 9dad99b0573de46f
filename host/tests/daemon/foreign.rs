// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Directories and files that others have made before the daemon, and may write to.

use crate::hostile::become_vm_of;
use crate::support::{Daemon, Host};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

const NOBODY: u32 = 65534;

fn make(path: &Path, mode: u32) {
    fs::create_dir_all(path).unwrap();
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

/// All directories that a daemon keeps for itself.
fn own_directories(host: &Host) -> Vec<PathBuf> {
    let below = |name| host.runtime().join(name);
    let own = vec![host.store(), host.runtime()];
    own.into_iter()
        .chain(["vms", "records", "staging"].map(below))
        .collect()
}

#[test]
fn a_directory_that_others_may_write_is_refused() {
    for path in own_directories(&Host::new()) {
        let host = Host::new();
        let path = own_directories(&host)
            .into_iter()
            .find(|it| it.file_name() == path.file_name())
            .unwrap();
        for mode in [0o777, 0o1777, 0o770, 0o702] {
            make(&path, mode);
            let said = host.refused_start();
            let named = format!(
                "{} may be written by others (mode {mode:04o})",
                path.display()
            );
            let cure = format!("chmod go-w {}", path.display());
            assert!(said.contains(&named) && said.contains(&cure), "{said}");
        }
        if rustix::process::geteuid().is_root() {
            make(&path, 0o755);
            chown(&path, Some(NOBODY), None).unwrap();
            let said = host.refused_start();
            let named = format!("{} belongs to user {NOBODY}", path.display());
            assert!(said.contains(&named), "{said}");
            chown(&path, Some(0), None).unwrap();
        }
        make(&path, 0o755);
        let _daemon = Daemon::start(&host);
    }
}

#[test]
fn a_link_in_the_place_of_a_directory_is_not_followed() {
    for of in [Host::store, Host::runtime] {
        let host = Host::new();
        let real = host.runtime().with_file_name("real");
        make(&real, 0o700);
        let link = of(&host);
        symlink(&real, &link).unwrap();
        let said = host.refused_start();
        assert!(said.contains(&*link.to_string_lossy()), "{said}");
    }
}

#[test]
fn what_has_the_name_of_a_new_groups_pages_is_not_used_for_them() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let pages = host.store().join("group-g.pages");
    fs::write(&pages, vec![1; 4096]).unwrap();
    let before = fs::File::open(&pages).unwrap();
    become_vm_of(&host, "g");
    let (before, after) = (before.metadata().unwrap(), fs::metadata(&pages).unwrap());
    assert_ne!(before.ino(), after.ino());
    assert_eq!((before.nlink(), after.len()), (0, 0));
    assert_eq!(after.mode() & 0o777, 0o600);
}
