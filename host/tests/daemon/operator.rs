// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What an operator sees and does, through `pagefusionctl`.

use crate::support::{Daemon, Host, Vmm};
use pagefusion_host::protocol::{
    AdminReply, Connection, Encoding, FileStatus, GroupStatus, Outcome, Scope, Selection, VERSION,
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

fn connected(host: &Host, name: &str, group: &str) -> Vmm {
    let mut vmm = Vmm::start(host, name, group);
    vmm.tell("connect");
    assert_eq!(vmm.tell("listen"), "listening");
    vmm
}

/// Two VMs that share 20 pages of file 1 and 5 of file 2.
fn sharing(host: &Host) -> [Vmm; 2] {
    let mut vms = ["one", "two"].map(|name| connected(host, name, "g"));
    for file in ["share 1 0 20", "share 2 0 5"] {
        // The first again, when the second has made it worth while.
        for vm in [0, 1, 0] {
            vms[vm].tell(file);
        }
    }
    vms
}

fn json<T: serde::de::DeserializeOwned>(host: &Host, words: &str) -> T {
    let (status, text, errors) = host.ctl(&format!("{words} --json"));
    assert_eq!(status, 0, "{words}: {errors}");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{words}: {error} in {text}"))
}

#[test]
fn files_are_shown_by_what_they_save() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let _vms = sharing(&host);
    let files: Vec<FileStatus> = json(&host, "files");
    let shown: Vec<_> = files
        .iter()
        .map(|it| (it.name.as_str(), it.vms, it.pages_shared, it.store_pages))
        .collect();
    assert_eq!(
        shown,
        [
            ("/usr/lib/lib1.so", 2, 40, 20),
            ("/usr/lib/lib2.so", 2, 10, 5)
        ]
    );
    // Net, and adding up to what the group saves, but for what is lost in division.
    let groups: Vec<GroupStatus> = json(&host, "groups");
    let sum: i64 = files.iter().map(|it| it.bytes_saved).sum();
    assert!((sum - groups[0].bytes_saved).abs() <= 2, "{sum} {groups:?}");
    assert!(groups[0].bytes_metadata > 0);

    assert_eq!(json::<Vec<FileStatus>>(&host, "files --limit 1").len(), 1);
    assert_eq!(json::<Vec<FileStatus>>(&host, "files --group g").len(), 2);
    let (status, _, errors) = host.ctl("files --group nobody");
    assert_eq!(status, 1);
    assert!(errors.contains("no VM of the group nobody"), "{errors}");
    let (_, text, _) = host.ctl("files");
    assert!(text.contains("/usr/lib/lib1.so"), "{text}");
}

#[test]
fn an_undone_file_stays_unshared_until_it_is_resumed() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let [mut one, mut two] = sharing(&host);
    let outcome: Outcome = json(&host, "undo --group g --file lib1.so");
    assert_eq!((outcome.vms, outcome.failed.len()), (2, 0));
    assert_eq!(one.tell("told"), "undo files 1");
    for page in 0..20 {
        for vm in [&mut one, &mut two] {
            vm.tell(&format!("release 1 {page}"));
        }
    }
    let nothing_of_it = |one: &mut Vmm, two: &mut Vmm| {
        for vm in [one, two] {
            assert_eq!(vm.tell("share 1 0 20"), "5");
            assert_eq!(vm.tell("share 2 0 5"), "5");
        }
    };
    nothing_of_it(&mut one, &mut two);
    let mut three = connected(&host, "three", "g");
    assert_eq!(three.tell("share 1 0 20"), "0");
    assert_eq!(host.status().vms[2].files_undone, 1);

    daemon.kill();
    let _daemon = Daemon::start(&host);
    for vm in [&mut one, &mut two] {
        vm.tell("connect");
        vm.tell("announce");
        vm.tell("listen");
    }
    nothing_of_it(&mut one, &mut two);
    assert_eq!(host.stored_pages(), 5);

    let (status, _, errors) = host.ctl("resume --group g --file lib7.so");
    assert_eq!(
        (status, errors.contains("was undone")),
        (1, true),
        "{errors}"
    );
    let _: Outcome = json(&host, "resume --group g --file lib1.so");
    // Behind what was asked for when the pages became worth sharing.
    loop {
        match one.tell("report").as_str() {
            "1 0 0" => break,
            report => assert_ne!(report, "none"),
        }
    }
    one.tell("share 1 0 20");
    assert_eq!(two.tell("share 1 0 20"), "25");
}

#[test]
fn a_file_that_only_some_undid_is_shared_by_the_others() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let [mut one, two] = sharing(&host);
    let id = json::<Vec<FileStatus>>(&host, "files --limit 1")
        .remove(0)
        .id;
    let _: Outcome = json(&host, &format!("undo --vm one --file {id}"));
    one.tell("release 1 3");
    assert_eq!(one.tell("share 1 3 1"), "24");
    let mut three = connected(&host, "three", "g");
    assert_eq!(three.tell("share 1 0 20"), "20");
    drop(two);
}

#[test]
fn a_pause_keeps_what_is_shared_and_an_undo_does_not() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let [mut one, two] = sharing(&host);
    let _: Outcome = json(&host, "pause --all");
    assert_eq!(one.tell("told"), "pause");
    drop(daemon);
    let daemon = Daemon::start(&host);
    assert_eq!(one.tell("connect"), "device=false paused=true");
    one.tell("announce");
    one.tell("listen");
    // Told again when it connects, whatever the order was.
    assert_eq!(one.tell("await"), "pause");
    let _: Outcome = json(&host, "undo --vm one");
    assert_eq!(one.tell("await"), "undo all");
    // Only to be paused does not mean to be shared again.
    let _: Outcome = json(&host, "pause --vm one");
    assert_eq!(one.tell("await"), "pause");
    drop(daemon);
    let _daemon = Daemon::start(&host);
    one.tell("connect");
    one.tell("announce");
    one.tell("listen");
    assert_eq!(one.tell("await"), "undo all");
    drop(two);
}

#[test]
fn guest_frames_are_undone_in_one_vm() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let [mut one, mut two] = sharing(&host);
    let _: Outcome = json(&host, "undo --vm two --gfn 0x10+3");
    assert_eq!(two.tell("told"), "undo frames 16+3");
    assert_eq!(one.tell("told"), "");
}

#[test]
fn a_vm_is_explained() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let one = Vmm::start(&host, "one", "");
    let pid = one.pid();
    for which in ["one", "1", &pid.to_string()] {
        let (status, text, errors) = host.ctl(&format!("explain {which}"));
        assert_eq!(status, 0, "{errors}");
        assert!(text.contains("no-device") && text.contains("→"), "{text}");
    }
    let value: serde_json::Value = json(&host, "explain one");
    assert_eq!(value["causes"][0]["cause"], "no-device");
    assert_eq!(host.ctl("explain two").0, 1);
}

#[test]
fn the_exit_status_says_what_is_wrong() {
    let host = Host::new();
    for words in ["status", "files", "explain x", "undo --all", "top"] {
        let (status, _, errors) = host.ctl(words);
        assert_eq!(status, 3, "{words}: {errors}");
        assert!(errors.contains("systemctl start pagefusiond"), "{errors}");
    }
    assert_eq!(host.ctl("undo").0, 2);
    assert_eq!(host.ctl("nonsense").0, 2);
    // There is no QEMU of this name.
    let (status, text, _) = host.ctl("doctor --qemu /nowhere/qemu");
    assert_eq!(status, 1);
    assert!(text.contains("apt install qemu-system-x86"), "{text}");
    let (_, text, _) = host.ctl("doctor --qemu /nowhere/qemu --json");
    let findings: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let bad = |check: &str| {
        findings
            .iter()
            .any(|it| it["check"] == check && it["verdict"] == "bad")
    };
    assert!(bad("QEMU") && bad("pagefusiond"), "{text}");
}

#[test]
fn metrics_are_given_out_on_a_socket_and_on_tcp() {
    use std::io::{Read, Write};
    let host = Host::new();
    // Free a moment ago.
    let address = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let _daemon = Daemon::start_with(&host, &["--metrics", &address.to_string()]);
    let _vms = sharing(&host);
    let question = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut texts = [String::new(), String::new()];
    let path = host.runtime().join("metrics.sock");
    let mut socket = std::os::unix::net::UnixStream::connect(path).unwrap();
    socket.write_all(question).unwrap();
    socket.read_to_string(&mut texts[0]).unwrap();
    let mut tcp = std::net::TcpStream::connect(address).unwrap();
    tcp.write_all(question).unwrap();
    tcp.read_to_string(&mut texts[1]).unwrap();
    for text in texts {
        let shared = "pagefusion_vm_shared_bytes{vm=\"one\",group=\"g\"} 102400.0";
        assert!(text.contains(shared), "{text}");
        assert!(
            text.contains("pagefusion_group_store_bytes{group=\"g\"} 102400.0"),
            "{text}"
        );
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}

#[test]
fn clients_that_say_nothing_do_not_keep_others_from_metrics_for_long() {
    use std::io::{Read, Write};
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let path = host.runtime().join("metrics.sock");
    let connect = || std::os::unix::net::UnixStream::connect(&path).unwrap();
    let mut silent: Vec<_> = (0..8).map(|_| connect()).collect();
    // One too many: closed without a word.
    assert_eq!(connect().read(&mut [0; 1]).unwrap(), 0);
    // The daemon closes them by and by.
    assert_eq!(silent[0].read(&mut [0; 1]).unwrap(), 0);
    drop(silent);
    let mut text = String::new();
    let mut client = connect();
    client.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    client.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
}

#[test]
fn a_log_for_programs_is_json() {
    let host = Host::new();
    let daemon = Daemon::start_with(&host, &["--log-format", "json"]);
    let line = daemon.line("ready");
    let event: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (event["level"].as_str(), event["message"].as_str()),
        (Some("INFO"), Some("ready"))
    );
}

#[test]
fn shells_complete_the_commands() {
    let host = Host::new();
    for shell in ["bash", "zsh", "fish"] {
        let (status, text, _) = host.ctl(&format!("completions {shell}"));
        assert_eq!(status, 0);
        assert!(
            text.contains("doctor") && text.contains("explain"),
            "{shell}"
        );
        assert!(
            text.contains("would-save") && text.contains("inherit"),
            "{shell}"
        );
    }
}

#[test]
fn of_a_vm_that_does_not_answer_the_last_figures_are_shown() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let [mut one, _two] = sharing(&host);
    let before = host.status();
    assert_eq!(before.vms[0].engine.pages_shared, 25);
    assert_eq!(one.tell("hang"), "hanging");
    let after = host.status();
    let engine = &after.vms[0].engine;
    assert!(!after.vms[0].connected);
    assert_eq!(
        engine.disabled.as_deref(),
        Some("the engine does not answer")
    );
    assert_eq!(engine.pages_shared, 25);
    assert_eq!(after.bytes_saved, before.bytes_saved);
}

#[test]
fn a_vm_without_a_name_gets_one_that_is_free() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let _first = Vmm::start(&host, "vm2", "g");
    let _others = ["", ""].map(|name| Vmm::start(&host, name, "g"));
    let names: Vec<_> = host.status().vms.into_iter().map(|vm| vm.name).collect();
    assert_eq!(names, ["vm2", "vm3", "vm4"]);
}

#[test]
fn a_name_that_is_anothers_number_is_a_name() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let _vms = ["one", "1"].map(|name| Vmm::start(&host, name, "g"));
    let outcome: Outcome = json(&host, "pause --vm 1");
    assert_eq!(outcome.vms, 1);
    let paused: Vec<_> = host.status().vms.iter().map(|vm| vm.paused).collect();
    assert_eq!(paused, [false, true]);
    let _: Outcome = json(&host, "pause --vm 2");
    assert_eq!(host.ctl("pause --vm 3").0, 1);
}

#[test]
fn a_vm_without_a_group_and_the_group_of_its_name_are_two() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let mut alone = connected(&host, "g", "");
    let [_one, mut two] = sharing(&host);
    alone.tell("share 8 0 7");
    assert_eq!(alone.tell("copy 9 8 7"), "7");

    let groups: Vec<GroupStatus> = json(&host, "groups");
    let shown: Vec<_> = groups
        .iter()
        .map(|it| {
            (
                it.name.as_str(),
                it.vm,
                it.vms,
                it.pages_shared,
                it.store_pages,
            )
        })
        .collect();
    assert_eq!(shown, [("g", None, 2, 50, 25), ("g", Some(1), 1, 7, 7)]);
    let files: Vec<FileStatus> = json(&host, "files");
    for group in &groups {
        let of_group = files
            .iter()
            .filter(|it| (&it.group, it.vm) == (&group.name, group.vm));
        let saved: i64 = of_group.clone().map(|it| it.bytes_saved).sum();
        let stored: u64 = of_group.map(|it| it.store_pages).sum();
        assert!((saved - group.bytes_saved).abs() <= 2, "{saved} {group:?}");
        assert_eq!(stored, group.store_pages, "{files:?}");
    }
    assert_eq!(json::<Vec<FileStatus>>(&host, "files --group g").len(), 2);

    // Each is called by what it is.
    let paused = |host: &Host| -> Vec<_> { host.status().vms.iter().map(|vm| vm.paused).collect() };
    let _: Outcome = json(&host, "pause --vm g");
    assert_eq!(paused(&host), [true, false, false]);
    let _: Outcome = json(&host, "resume --vm g");
    let _: Outcome = json(&host, "pause --group g");
    assert_eq!(paused(&host), [false, true, true]);
    assert_eq!(two.tell("told"), "pause");
    for (words, hint) in [
        ("pause --group one", "; one is a VM"),
        ("files --group one", "; one is a VM"),
    ] {
        let (status, _, errors) = host.ctl(words);
        assert!(status == 1 && errors.contains(hint), "{words}: {errors}");
    }
    drop(alone);
    let _third = Vmm::start(&host, "three", "other");
    for (words, hint) in [
        ("undo --vm other", "other is a group: --group other"),
        ("explain other", "; other is a group; pagefusionctl vms"),
    ] {
        let (status, _, errors) = host.ctl(words);
        assert!(status == 1 && errors.contains(hint), "{words}: {errors}");
    }
}

#[test]
fn a_group_is_resumed_when_its_vms_have_ended() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let [one, two] = sharing(&host);
    let _: Outcome = json(&host, "undo --group g --file lib2.so");
    let _: Outcome = json(&host, "pause --group g");
    // One after the other: the daemon may see two that end at once in any order.
    for (vmm, name) in [(one, "one"), (two, "two")] {
        vmm.kill();
        daemon.expect_end(name);
    }
    let (status, text, errors) = host.ctl("resume --group g --file lib2.so");
    assert_eq!(
        (status, text.as_str()),
        (0, "resumed for 0 of 0 VMs\n"),
        "{errors}"
    );
    let (status, text, errors) = host.ctl("resume --group g");
    assert_eq!(
        (status, text.as_str()),
        (0, "resumed for 0 of 0 VMs\n"),
        "{errors}"
    );
    let mut next = Vmm::start(&host, "next", "g");
    assert_eq!(next.tell("connect"), "device=true paused=false");
    next.kill();
    daemon.expect_end("next");
    // Nothing is noted for it any more, nor was anything ever for another.
    for group in ["g", "other"] {
        let (status, _, errors) = host.ctl(&format!("resume --group {group}"));
        assert!(
            status == 1 && errors.contains("no VM of the group"),
            "{errors}"
        );
    }
}

/// What an operator's program of version 6 says and its daemon understands.
#[derive(Debug, Deserialize)]
#[expect(dead_code, reason = "only read from messages")]
enum Version6 {
    Status { version: u32 },
    Undo { scope: Scope, selection: Selection },
    Pause { scope: Scope },
    Resume { scope: Scope, file: Option<String> },
    Set { scope: Scope, policy: Value },
}

fn spoken(stream: UnixStream) -> Connection {
    Connection::new(stream, Encoding::Json, Duration::from_secs(10)).unwrap()
}

#[test]
fn a_program_of_another_version_is_told_both_and_not_obeyed() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let mut one = connected(&host, "one", "g");
    let none = json!({"max_store": null, "max_overlays": null, "publish_rate": null});
    let set = json!({"scope": "All", "each_vm": false, "changes": none, "policy": {"mode": "would-save"}});
    let of_6 = [
        json!({"Undo": {"scope": "All", "selection": "All"}}),
        json!({"Pause": {"scope": "All"}}),
        json!({"Resume": {"scope": "All", "file": null}}),
        json!({"Set": set}),
    ];
    let of_6 = of_6.map(|request| {
        // As it was understood then.
        serde_json::from_value::<Version6>(request.clone()).unwrap();
        (request, "6 or earlier".to_owned())
    });
    let next = VERSION + 1;
    let of_next = [
        json!({"Order": {"version": next, "scope": "All", "order": "Pause"}}),
        json!({"Order": {"version": next, "scope": "All", "order": {"Burn": 1}}}),
        json!({"Dance": {"version": next}}),
    ]
    .map(|request| (request, next.to_string()));
    // One refusal is not the connection's end.
    let mut connection = spoken(UnixStream::connect(host.runtime().join("admin.sock")).unwrap());
    for (request, version) in of_6.into_iter().chain(of_next) {
        connection.send(&request).unwrap();
        let AdminReply::Error(reason) = connection.receive().unwrap() else {
            panic!("{request} was done");
        };
        let both = format!(
            "version {version} of the protocol and the daemon version {VERSION}; use the two"
        );
        assert!(reason.contains(&both), "{request}: {reason}");
    }
    assert_eq!(one.tell("told"), "");
    let status = host.status();
    assert!(!status.vms[0].paused && status.groups[0].pages_would_share.is_none());
}

#[test]
fn a_daemon_of_another_version_is_named_with_ours_and_does_nothing() {
    let host = Host::new();
    std::fs::create_dir(host.runtime()).unwrap();
    let listener = UnixListener::bind(host.runtime().join("admin.sock")).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut connection = spoken(stream.unwrap());
            // It ends the connection when it does not understand.
            while let Ok(request) = connection.receive::<Version6>() {
                let reply = match request {
                    Version6::Status { version } if version != 6 => AdminReply::Error(format!(
                        "pagefusionctl speaks version {version} and the daemon version 6"
                    )),
                    _ => AdminReply::Done(Outcome::default()),
                };
                connection.send(&reply).unwrap();
            }
        }
    });
    for words in [
        "undo --all",
        "undo --vm a --gfn 1",
        "pause --all",
        "resume --group g",
        "resume --all --file f",
        "set --all --mode share",
        "set --vm a --max-store 1G",
        "status",
    ] {
        let (status, _, errors) = host.ctl(words);
        let both = format!("version {VERSION} and the daemon version 6");
        assert!(
            status == 1 && errors.contains(&both),
            "{words}: {status} {errors}"
        );
    }
}

#[test]
fn words_that_mean_nothing_are_refused() {
    let host = Host::new();
    for words in [
        "--pressure-waiting nan",
        "--pressure-available=-5",
        "--pressure-available 101",
        "--max-store 4",
    ] {
        let mut command = host.daemon_command();
        let output = command.args(words.split(' ')).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{words}");
    }
    let _daemon = Daemon::start(&host);
    let (status, _, errors) = host.ctl("set --group a/b --max-store 1G");
    assert!(status == 1 && errors.contains("is no name"), "{errors}");
}

#[test]
fn a_daemon_has_as_many_open_files_as_it_may() {
    let host = Host::new();
    let mut command = std::process::Command::new("sh");
    let daemon = host.daemon_command();
    let script = "ulimit -S -n 64; exec \"$0\" \"$@\"";
    command.args(["-c", script]).arg(daemon.get_program());
    let mut daemon = command
        .args(daemon.get_args())
        .env("RUST_LOG", "info")
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let log = std::io::BufReader::new(daemon.stderr.take().unwrap());
    let ready = std::io::BufRead::lines(log).any(|line| line.unwrap().contains("ready"));
    assert!(ready);
    // More than 64 descriptors allow.
    let vms: Vec<_> = (0..8).map(|_| connected(&host, "", "g")).collect();
    assert!(host.status().vms.iter().all(|vm| vm.connected));
    drop(vms);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}
