// SPDX-License-Identifier: Apache-2.0 OR MIT

//! VMMs of ordinary users.

use crate::support::{Daemon, Host};
use pagefusion_host::protocol::AdminClient;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

const NOBODY: u32 = 65534;

#[test]
fn a_vmm_runs_as_the_user_who_then_owns_its_sockets() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: becoming another user takes root");
        return;
    }
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let home = host.runtime().parent().unwrap().to_owned();
    fs::set_permissions(home, PermissionsExt::from_mode(0o755)).unwrap();
    // Any library does: this is no VMM, and says only who it is and what it may do.
    let script = "id -u; id -g; cd ${PAGEFUSION_ENGINE_SOCKET%/*} && for i in *.sock; do test -w $i && echo $i; done";
    let output = Command::new(env!("CARGO_BIN_EXE_pagefusionctl"))
        .arg("--runtime-dir")
        .arg(host.runtime())
        .args(["run", "--user", "65534", "--name", "one", "--preload"])
        .arg(a_library())
        .args(["--", "sh", "-c", script])
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (said, errors) = (text(output.stdout), text(output.stderr));
    assert_eq!(
        said, "65534\n65534\nengine.sock\nivshmem.sock\n",
        "{errors}"
    );
    daemon.expect_end("one");
    // What the group shares is not given away with it.
    let store = fs::metadata(host.store()).unwrap();
    assert_eq!((store.uid(), store.mode() & 0o077), (0, 0));
}

/// One that is loaded here as well.
fn a_library() -> String {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.contains("/libc.so")).unwrap();
    line[line.find('/').unwrap()..].to_owned()
}

#[test]
fn a_vm_of_another_user_is_roots_to_give() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let mut client = AdminClient::connect(&host.runtime()).unwrap();
    let own = rustix::process::geteuid();
    let given = client.create_vm_for(Some("one".into()), None, Some(NOBODY));
    if own.is_root() {
        let directory = given.unwrap().directory;
        assert_eq!(fs::metadata(&directory).unwrap().uid(), NOBODY);
        let socket = fs::metadata(directory.join("engine.sock")).unwrap();
        assert_eq!((socket.uid(), socket.mode() & 0o777), (NOBODY, 0o600));
    } else {
        assert!(given.unwrap_err().to_string().contains("only root"));
    }
}
