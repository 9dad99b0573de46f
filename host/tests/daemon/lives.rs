// SPDX-License-Identifier: Apache-2.0 OR MIT

//! VMs and daemons begin and end, in every order.

use crate::support::{Daemon, Host, Vmm};
use pagefusion_host::protocol::{AdminClient, Scope, Selection};
use rustix::mount::MountFlags;
use std::process::{Command, Stdio};
use std::time::Duration;

fn connected(host: &Host, name: &str, group: &str) -> Vmm {
    let mut vmm = Vmm::start(host, name, group);
    assert_eq!(vmm.tell("connect"), "device=true paused=false");
    assert_eq!(vmm.tell("listen"), "listening");
    vmm
}

fn reconnect(vmm: &mut Vmm) {
    assert_eq!(vmm.tell("connect"), "device=false paused=false");
    assert_eq!(vmm.tell("announce"), "done");
    assert_eq!(vmm.tell("listen"), "listening");
}

#[test]
fn two_vms_share_and_leave_nothing_behind() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let mut one = connected(&host, "one", "g");
    let mut two = connected(&host, "two", "g");
    assert_eq!(one.tell("share 1 0 20"), "0");
    assert_eq!(host.stored_pages(), 0);
    assert_eq!(two.tell("share 1 0 20"), "20");
    let mut pages = 0;
    while pages < 20 {
        let report = one.tell("report");
        let numbers: Vec<u64> = report
            .split(' ')
            .map(|word| word.parse().unwrap())
            .collect();
        assert_eq!((numbers[0], numbers[1]), (1, pages), "{report}");
        pages += numbers[2];
    }
    assert_eq!(one.tell("share 1 0 20"), "20");
    assert_eq!(host.stored_pages(), 20);
    assert_eq!(
        (one.tell("check"), two.tell("check")),
        ("20 of 20".into(), "20 of 20".into())
    );

    let status = host.status();
    assert_eq!((status.pages_shared, status.store_pages), (40, 20));
    assert!(status.vms.iter().all(|vm| vm.connected));
    assert_eq!(status.bytes_saved, 20 * 4096 - status.bytes_metadata as i64);

    two.kill();
    daemon.expect_end("two");
    assert_eq!(host.stored_pages(), 20);
    assert_eq!(one.tell("check"), "20 of 20");
    one.kill();
    daemon.expect_end("one");
    assert!(host.is_clean());
}

#[test]
fn a_full_tmpfs_keeps_what_fits_and_takes_more_when_there_is_room_again() {
    let Some(host) = Host::with_room_for(64) else {
        eprintln!("skipped: mounting a tmpfs needs root");
        return;
    };
    let daemon = Daemon::start(&host);
    let mut one = connected(&host, "one", "g");
    let mut two = connected(&host, "two", "g");
    assert_eq!(one.tell("share 1 0 100"), "0");
    let fit: u64 = two.tell("share 1 0 100").parse().unwrap();
    assert!((32..=64).contains(&fit), "{fit} of 100 pages fit into 64");
    assert_eq!(two.tell("check"), format!("{fit} of {fit}"));
    assert_eq!(host.stored_pages(), fit);
    // Another file finds no room, and nothing that is held suffers.
    assert_eq!(one.tell("share 2 0 8"), "0");
    assert_eq!(two.tell("share 2 0 8"), fit.to_string());
    assert_eq!(two.tell("check"), format!("{fit} of {fit}"));

    for page in 0..fit {
        assert_eq!(two.tell(&format!("release 1 {page}")), "done");
    }
    assert_eq!(host.stored_pages(), 0);
    assert_eq!(two.tell("share 2 0 8"), "8");
    assert_eq!(two.tell("check"), "8 of 8");
    two.kill();
    daemon.expect_end("two");
    one.kill();
    daemon.expect_end("one");
    assert!(host.is_clean());
}

#[test]
fn groups_share_nothing_with_each_other() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let mut vms =
        [("a1", "a"), ("b1", "b"), ("p1", ""), ("p2", "")].map(|(n, g)| connected(&host, n, g));
    for vm in &mut vms {
        assert_eq!(vm.tell("share 1 0 5"), "0");
    }
    assert_eq!(host.stored_pages(), 0);
    assert_eq!(host.store_files().len(), 4);
}

#[test]
fn a_killed_daemon_is_followed_by_one_that_goes_on() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let mut one = connected(&host, "one", "g");
    let mut two = connected(&host, "two", "g");
    one.tell("share 1 0 30");
    two.tell("share 1 0 30");
    one.tell("share 1 0 20");
    daemon.kill();

    assert_eq!(
        (one.tell("check"), two.tell("check")),
        ("20 of 20".into(), "30 of 30".into())
    );
    let daemon = Daemon::start(&host);
    // Before anybody has announced anything, a third VM finds what is there.
    let mut three = connected(&host, "three", "g");
    assert_eq!(three.tell("share 1 0 10"), "10");
    reconnect(&mut one);
    reconnect(&mut two);
    assert_eq!(host.stored_pages(), 30);
    assert_eq!(three.tell("share 1 0 30"), "30");
    assert_eq!(host.stored_pages(), 30);
    for (vmm, name) in [(one, "one"), (two, "two")] {
        vmm.kill();
        daemon.expect_end(name);
    }
    assert_eq!(three.tell("check"), "30 of 30");
    three.kill();
    daemon.expect_end("three");
    assert!(host.is_clean());
}

#[test]
fn a_stopped_daemon_leaves_vms_sharing() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let mut one = connected(&host, "one", "");
    one.tell("share 1 0 5");
    // The same content under another name of the same VM: duplicates within it count.
    daemon.terminate();
    let daemon = Daemon::start(&host);
    reconnect(&mut one);
    one.kill();
    daemon.expect_end("one");
    assert!(host.is_clean());
}

#[test]
fn what_ends_while_no_daemon_runs_is_cleaned_up_later() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let mut one = connected(&host, "one", "g");
    let mut two = connected(&host, "two", "g");
    one.tell("share 1 0 8");
    two.tell("share 1 0 8");
    daemon.kill();
    two.kill();
    let daemon = Daemon::start(&host);
    reconnect(&mut one);
    assert_eq!(host.stored_pages(), 0);
    daemon.kill();
    one.kill();
    let daemon = Daemon::start(&host);
    assert!(host.is_clean());
    // Numbers are not used again.
    let three = connected(&host, "three", "g");
    assert!(three.directory.ends_with("vms/3"), "{:?}", three.directory);
    drop(daemon);
}

/// Two VMs that share 8 pages, of which one has 4 more alone, and a daemon that was killed.
fn left_alone(host: &Host) -> [Vmm; 2] {
    let daemon = Daemon::start(host);
    let mut vms = ["one", "two"].map(|name| connected(host, name, "g"));
    for vm in [0, 1, 0] {
        vms[vm].tell("share 1 0 12");
    }
    for page in 8..12 {
        vms[0].tell(&format!("release 1 {page}"));
    }
    daemon.kill();
    vms
}

fn check_left_alone(vms: &mut [Vmm; 2]) {
    assert_eq!(vms[0].tell("check"), "8 of 8");
    assert_eq!(vms[1].tell("check"), "12 of 12");
}

#[test]
fn a_daemon_without_file_descriptors_takes_no_vm_for_ended() {
    let host = Host::new();
    let mut vms = left_alone(&host);
    let mut could_not_tell = 0;
    for files in 3.. {
        let daemon = host.daemon_command();
        let mut child = Command::new("sh")
            .args(["-c", &format!("ulimit -n {files}; exec \"$@\""), "sh"])
            .arg(daemon.get_program())
            .args(daemon.get_args())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let status = loop {
            let status = child.try_wait().unwrap();
            if status.is_some() || AdminClient::connect(&host.runtime()).is_ok() {
                break status;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(host.records(), ["1.json", "2.json"], "{files} files");
        check_left_alone(&mut vms);
        let Some(status) = status else {
            child.kill().unwrap();
            child.wait().unwrap();
            break;
        };
        assert!(!status.success());
        let text = std::io::read_to_string(child.stderr.unwrap()).unwrap();
        could_not_tell += usize::from(text.contains("cannot tell whether process"));
        assert!(files < 100, "{text}");
    }
    assert!(could_not_tell > 0);
    let _daemon = Daemon::start(&host);
    vms.iter_mut().for_each(reconnect);
    check_left_alone(&mut vms);
    assert_eq!(host.stored_pages(), 12);
}

#[test]
fn a_daemon_without_proc_takes_no_vm_for_ended() {
    let Some(host) = Host::with_room_for(100) else {
        eprintln!("skipped: mounting takes root");
        return;
    };
    let mut vms = left_alone(&host);
    // Only for this thread and what it starts.
    rustix::mount::mount("none", "/proc", "tmpfs", MountFlags::empty(), None).unwrap();
    let text = host.refused_start();
    rustix::mount::unmount("/proc", rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(text.contains("of VM 1 (one) is running: /proc/"), "{text}");
    let _daemon = Daemon::start(&host);
    vms.iter_mut().for_each(reconnect);
    check_left_alone(&mut vms);
}

/// Has a VM's user make what is in `made` of its directory.
fn in_directory(vmm: &Vmm, script: &str) {
    let mut command = Command::new("sh");
    let command = command.current_dir(&vmm.directory).args(["-c", script]);
    assert!(command.status().unwrap().success());
}

/// In a VM's directory, 5000 directories in each other.
const DEEP: &str = "for i in 1 2 3 4 5; do n=$(printf 'd/%.0s' $(seq 1000)); mkdir -p $n x; \
                    [ -d bottom ] && mv bottom $n; mv d bottom; done";

#[test]
fn directories_in_the_place_of_sockets_keep_no_daemon_from_starting() {
    let host = Host::new();
    let mut vms = left_alone(&host);
    in_directory(&vms[0], "touch qmp.sock; rm *e*.sock");
    in_directory(
        &vms[0],
        "mkdir engine.sock ivshmem.sock; touch engine.sock/x",
    );
    in_directory(&vms[0], &format!("cd ivshmem.sock && {DEEP}"));
    let daemon = Daemon::start(&host);
    vms.iter_mut().for_each(reconnect);
    check_left_alone(&mut vms);
    assert!(vms[0].directory.join("qmp.sock").exists());
    in_directory(&vms[0], DEEP);
    let [one, two] = vms;
    one.kill();
    daemon.expect_end("one");
    drop(daemon);
    in_directory(&two, DEEP);
    two.kill();
    let _daemon = Daemon::start(&host);
    assert!(host.is_clean());
    let staging = host.runtime().join("staging");
    let begin = std::time::Instant::now();
    while std::fs::read_dir(&staging).unwrap().next().is_some() {
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_vm_whose_directory_cannot_be_used_is_cut_off_alone() {
    let Some(host) = Host::with_room_for(100) else {
        eprintln!("skipped: mounting takes root");
        return;
    };
    let [mut one, mut two] = left_alone(&host);
    // As good as what a user can mount: nothing can be made there.
    let directory = one.directory.clone();
    rustix::mount::mount("none", &directory, "tmpfs", MountFlags::RDONLY, None).unwrap();
    let daemon = Daemon::start(&host);
    daemon.expect("vms/1/engine.sock: ");
    reconnect(&mut two);
    // Its pages are kept for as long as it lives.
    assert_eq!(one.tell("check"), "8 of 8");
    assert_eq!(two.tell("check"), "12 of 12");
    assert_eq!(host.records(), ["1.json", "2.json"]);
    one.kill();
    daemon.expect_end("one");
    assert_eq!(host.records(), ["2.json"]);
    drop(daemon);
    // What is mounted cannot be moved away either.
    let daemon = Daemon::start(&host);
    daemon.expect("cannot remove");
    rustix::mount::unmount(&directory, rustix::mount::UnmountFlags::DETACH).unwrap();
}

#[test]
fn a_record_that_nobody_understands_is_not_of_a_vm_that_has_ended() {
    let host = Host::new();
    let mut vms = left_alone(&host);
    let path = host.runtime().join("records/1.json");
    let record = std::fs::read_to_string(&path).unwrap();
    let other_number = record.replace("\"number\":1", "\"number\":7");
    for damaged in ["", &record[..record.len() / 2], &other_number] {
        std::fs::write(&path, damaged).unwrap();
        let text = host.refused_start();
        assert!(text.contains("records/1.json is"), "{text}");
        assert!(text.contains("remove the file"), "{text}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), damaged);
    }
    std::fs::write(&path, &record).unwrap();
    // What a daemon had only begun to write is nothing to worry about.
    std::fs::write(path.with_extension("new"), &record[..9]).unwrap();
    let _daemon = Daemon::start(&host);
    vms.iter_mut().for_each(reconnect);
    check_left_alone(&mut vms);
    assert_eq!(host.records(), ["1.json", "2.json"]);
}

#[test]
fn a_vm_that_does_not_answer_keeps_nobody_else_waiting() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let mut hung = Vmm::start(&host, "hung", "g");
    hung.tell("connect");
    assert_eq!(hung.tell("hang"), "hanging");
    let mut good = connected(&host, "good", "g");
    good.tell("share 1 0 3");
    let begin = std::time::Instant::now();
    let status = host.status();
    assert!(begin.elapsed().as_secs() < 10);
    assert!(!status.vms[0].connected);
    assert_eq!(
        status.vms[0].engine.disabled.as_deref(),
        Some("the engine does not answer")
    );
    assert!(status.vms[1].connected);
    // A report for the hung one does not hold up the publisher.
    hung.tell("share 2 0 3");
    assert_eq!(good.tell("share 2 0 3"), "3");
}

#[test]
fn a_vm_that_does_not_answer_keeps_no_other_from_being_tidied_up() {
    let host = Host::new();
    let _daemon = Daemon::start_with(&host, &["--tidy-interval", "1"]);
    let mut hung = Vmm::start(&host, "hung", "g");
    hung.tell("connect");
    assert_eq!(hung.tell("hang"), "hanging");
    let mut good = connected(&host, "good", "g");
    assert_eq!(good.tell("listen"), "listening");
    // Again and again.
    for _ in 0..2 {
        assert!(good.tell("await").starts_with("tidy"));
    }
}

#[test]
fn what_an_operator_pauses_stays_paused() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let mut one = connected(&host, "one", "g");
    let mut admin = AdminClient::connect(&host.runtime()).unwrap();
    let outcome = admin
        .undo(Scope::Group("g".into()), Selection::All)
        .unwrap();
    assert_eq!((outcome.vms, outcome.failed.len()), (1, 0));
    assert!(
        admin
            .undo(Scope::Vm("nobody".into()), Selection::All)
            .is_err()
    );
    daemon.kill();
    let daemon = Daemon::start(&host);
    assert_eq!(one.tell("connect"), "device=false paused=true");
    let mut two = Vmm::start(&host, "two", "g");
    assert_eq!(two.tell("connect"), "device=true paused=true");
    let mut three = Vmm::start(&host, "three", "other");
    assert_eq!(three.tell("connect"), "device=true paused=false");
    let mut admin = AdminClient::connect(&host.runtime()).unwrap();
    assert_eq!(admin.resume(Scope::All, None).unwrap().vms, 3);
    assert!(host.status().vms.iter().all(|vm| !vm.paused));
    drop(daemon);
}

#[test]
fn the_vmm_gets_its_device_once() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let mut one = Vmm::start(&host, "one", "g");
    assert_eq!(one.tell("device"), "[0, 0, -1, 1, 0]");
    assert_eq!(one.tell("device"), "failed to fill whole buffer");
}

#[test]
fn a_daemon_gives_way_to_vms_as_much_as_it_is_told() {
    let own = rustix::process::getpriority_process(None).unwrap();
    for (arguments, nice) in [(&[][..], 5), (&["--nice", "0"], 0), (&["--nice", "19"], 19)] {
        let host = Host::new();
        let daemon = Daemon::start_with(&host, arguments);
        let _vmm = connected(&host, "one", "g");
        let wanted = (own + nice).min(19);
        let niceness = daemon.niceness();
        assert!(niceness.len() > 1, "{niceness:?}");
        assert!(niceness.iter().all(|it| *it == wanted), "{niceness:?}");
    }
    let host = Host::new();
    let output = host.daemon_command().args(["--nice=-5"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_second_daemon_says_who_is_in_its_way() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let output = host.daemon_command().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("another pagefusiond uses"), "{text}");
}

/// Daemons and VMMs are killed at points that differ from run to run of the loop; what is
/// left must be right every time.
#[test]
fn killing_anybody_at_any_point_loses_no_page_and_keeps_none() {
    let host = Host::new();
    let mut daemon = Daemon::start(&host);
    let mut vmms: Vec<(String, Vmm)> = Vec::new();
    let mut seed = 0x5eed_u64;
    let mut random = move |below: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for round in 0..40 {
        if vmms.len() < 4 {
            let name = format!("vm-{round}");
            let vmm = connected(&host, &name, "g");
            vmms.push((name, vmm));
        }
        // All are busy when somebody dies.
        for (_, vmm) in &mut vmms {
            vmm.order(&format!(
                "share {} {} {}",
                random(3),
                random(50),
                1 + random(60)
            ));
        }
        match random(3) {
            0 => {
                let (name, vmm) = vmms.swap_remove(random(vmms.len() as u64) as usize);
                vmm.kill();
                daemon.expect_end(&name);
                vmms.iter().for_each(|(_, vmm)| drop(vmm.answer()));
            }
            1 => {
                daemon.kill();
                vmms.iter().for_each(|(_, vmm)| drop(vmm.answer()));
                daemon = Daemon::start(&host);
                vmms.iter_mut().for_each(|(_, vmm)| reconnect(vmm));
            }
            _ => vmms.iter().for_each(|(_, vmm)| drop(vmm.answer())),
        }
        for (name, vmm) in &mut vmms {
            let answer = vmm.tell("check");
            let (good, held) = answer.split_once(" of ").unwrap();
            assert_eq!(good, held, "{name} in round {round}");
        }
        // Three files of at most 110 pages: more would be stored twice.
        assert!(host.stored_pages() <= 330, "round {round}");
    }
    for (name, vmm) in vmms {
        vmm.kill();
        daemon.expect_end(&name);
    }
    assert!(host.is_clean());
}
