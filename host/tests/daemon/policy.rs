// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What groups are set to: whether they only learn, by order or because the host has memory enough,
//! and whether they split huge pages.

use crate::support::{Daemon, Host, Vmm};
use pagefusion_host::protocol::{Limits, Mode, Policies, Policy, SplitHugePages};

fn connected(host: &Host, name: &str) -> Vmm {
    let mut vmm = Vmm::start(host, name, "g");
    vmm.tell("connect");
    assert_eq!(vmm.tell("listen"), "listening");
    vmm
}

fn set(host: &Host, words: &str) {
    let (status, _, errors) = host.ctl(&format!("set {words}"));
    assert_eq!(status, 0, "{words}: {errors}");
}

/// Pages that would be shared, and pages saved by that.
fn would(host: &Host) -> Option<(u64, i64)> {
    let group = host.status().groups.remove(0);
    Some((group.pages_would_share?, group.bytes_would_save? / 4096))
}

#[test]
fn would_save_counts_what_sharing_brings_and_shares_nothing() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    set(&host, "--group g --mode would-save");
    let mut one = connected(&host, "one");
    let mut two = connected(&host, "two");
    for vm in [&mut one, &mut two] {
        assert_eq!(vm.tell("share 1 0 20"), "0");
        // Told twice, counted once.
        assert_eq!(vm.tell("share 1 0 20"), "0");
    }
    assert_eq!(one.tell("share 2 0 7"), "0");
    assert_eq!((would(&host), host.stored_pages()), (Some((40, 20)), 0));
    let mut three = connected(&host, "three");
    three.tell("share 1 0 20");
    assert_eq!(would(&host), Some((60, 40)));
    let (_, text, _) = host.ctl("groups");
    assert!(
        text.contains("would share 240 KiB and save 160 KiB more"),
        "{text}"
    );
    let (_, text, _) = host.ctl("explain one");
    assert!(!text.contains("limit"), "{text}");
    three.kill();
    daemon.expect_end("three");
    assert_eq!(would(&host), Some((40, 20)));

    // The forecast comes true, the first reporter's share included.
    set(&host, "--group g --mode share");
    assert_eq!(one.tell("await"), "resume");
    one.tell("share 1 0 20");
    assert_eq!(two.tell("share 1 0 20"), "20");
    assert_eq!(one.tell("share 1 0 20"), "20");
    assert_eq!(host.stored_pages(), 20);
    assert_eq!(host.status().pages_shared, 40);
    assert_eq!(would(&host), None);
}

#[test]
fn what_is_shared_stays_while_a_group_learns() {
    let host = Host::new();
    let _daemon = Daemon::start(&host);
    let mut one = connected(&host, "one");
    let mut two = connected(&host, "two");
    for vm in [&mut one, &mut two] {
        vm.tell("share 1 0 20");
    }
    set(&host, "--all --mode would-save");
    assert_eq!(two.tell("share 1 0 20"), "20");
    assert_eq!(two.tell("check"), "20 of 20");
    assert_eq!(one.tell("share 1 0 20"), "0");
    assert_eq!(two.tell("share 3 0 5"), "20");
    // A single VM has no mode of its own.
    assert_eq!(host.ctl("set --vm one --mode share").0, 2);
}

#[test]
fn the_policy_pressure_waits_until_the_host_is_short_of_memory() {
    let host = Host::new();
    let never = ["--pressure-waiting", "101", "--pressure-available", "0"];
    let daemon = Daemon::start_with(&host, &never);
    set(&host, "--all --policy pressure");
    let mut one = connected(&host, "one");
    let mut two = connected(&host, "two");
    for vm in [&mut one, &mut two] {
        vm.tell("share 1 0 20");
    }
    assert_eq!((would(&host), host.stored_pages()), (Some((40, 20)), 0));
    drop(daemon);

    // All of the memory is never available: now it is short.
    let daemon = Daemon::start_with(&host, &["--pressure-available", "100"]);
    daemon.expect("the host is short of memory");
    assert!(host.status().under_pressure);
    for vm in [&mut one, &mut two] {
        vm.tell("connect");
        vm.tell("share 1 0 20");
    }
    assert_eq!(host.stored_pages(), 20);
    assert_eq!(one.tell("share 1 0 20"), "20");
}

#[test]
fn what_is_taken_back_follows_what_is_set_for_all() {
    let host = Host::new();
    let never = ["--pressure-waiting", "101", "--pressure-available", "0"];
    let daemon = Daemon::start_with(&host, &never);
    set(
        &host,
        "--all --mode would-save --policy pressure --split-huge-pages never",
    );
    set(
        &host,
        "--group g --mode share --policy always --split-huge-pages worthwhile",
    );
    set(&host, "--all --max-store 1G");
    set(&host, "--group g --max-store 2G");
    let mut one = connected(&host, "one");
    let own = Policies {
        mode: Some(Mode::Share),
        policy: Some(Policy::Always),
        split_huge_pages: Some(SplitHugePages::Worthwhile),
    };
    assert_eq!(
        (would(&host), host.status().groups[0].own_policies),
        (None, own)
    );
    let text = |command: &str| host.ctl(command).1;
    let line =
        "g: set: mode share, policy always, split-huge-pages worthwhile, max-store 2.0 GiB\n";
    assert!(text("groups").contains(line), "{}", text("groups"));

    set(&host, "--group g --policy inherit");
    assert!(would(&host).is_some());
    assert_eq!(one.tell("await"), "resume");
    set(&host, "--group g --policy always");
    assert_eq!((one.tell("await").as_str(), would(&host)), ("resume", None));
    set(
        &host,
        "--group g --mode inherit --policy inherit --max-store inherit",
    );
    assert_eq!(one.tell("await"), "resume");
    set(&host, "--group g --split-huge-pages inherit");
    assert_eq!(one.tell("await"), "split Never");
    drop(daemon);

    let _daemon = Daemon::start_with(&host, &never);
    let group = host.status().groups.remove(0);
    assert_eq!((group.own_policies, group.own_limits), Default::default());
    assert_eq!(
        (
            group.mode,
            group.policy,
            group.split_huge_pages,
            group.limits.max_store
        ),
        (
            Mode::WouldSave,
            Policy::Pressure,
            SplitHugePages::Never,
            Some(1 << 30)
        )
    );
    let line = "g: set: mode would-save (inherited), policy pressure (inherited), \
                split-huge-pages never (inherited), max-store 1.0 GiB (inherited)\n";
    assert!(text("groups").contains(line), "{}", text("groups"));
    // Of all, it is the default.
    set(
        &host,
        "--all --mode inherit --policy inherit --split-huge-pages inherit --max-store none",
    );
    assert_eq!(would(&host), None);
    assert!(!text("groups").contains("set:"), "{}", text("groups"));

    set(&host, "--group g --each-vm --max-overlays 1M");
    set(&host, "--vm one --max-overlays 40K");
    let own = Limits {
        max_overlays: Some(40 << 10),
        ..Limits::default()
    };
    assert_eq!(host.status().vms[0].own_limits, own);
    assert!(
        text("vms").contains("one: set: max-overlays 40.0 KiB\n"),
        "{}",
        text("vms")
    );
    set(&host, "--vm one --max-overlays inherit");
    let vm = host.status().vms.remove(0);
    assert_eq!(
        (vm.own_limits, vm.limits.max_overlays),
        (Limits::default(), Some(1 << 20))
    );
    assert!(!text("vms").contains("set:"), "{}", text("vms"));
}

#[test]
fn pages_that_only_one_vm_has_are_given_back_to_it() {
    let host = Host::new();
    let _daemon = Daemon::start_with(&host, &["--tidy-interval", "1"]);
    let mut one = connected(&host, "one");
    let mut two = connected(&host, "two");
    one.tell("share 1 0 20");
    two.tell("share 1 0 30");
    one.tell("share 1 0 30");
    two.tell("share 1 20 10");
    for page in 25..30 {
        two.tell(&format!("release 1 {page}"));
    }
    // Not before they have been alone for a while: the other may only have gone for a moment.
    let mut looks = 0;
    loop {
        let orders = one.tell("await");
        looks += orders.matches("tidy 0").count();
        if orders.contains("tidy 5") {
            break;
        }
        assert!(looks < 30, "{orders}");
    }
    assert!(looks >= 10, "alone after {looks} looks, one each second");
    let orders = two.tell("await");
    assert!(!orders.contains("tidy 5"), "{orders}");
}

#[test]
fn huge_pages_are_split_as_set_for_the_group_and_else_for_all() {
    let host = Host::new();
    let daemon = Daemon::start(&host);
    let mut one = connected(&host, "one");
    assert_eq!(one.tell("splits"), "Always");
    set(&host, "--all --split-huge-pages worthwhile");
    assert_eq!(one.tell("await"), "split Worthwhile");
    set(&host, "--group g --split-huge-pages never");
    assert_eq!(one.tell("await"), "split Never");
    // Nobody is told what it knows.
    set(&host, "--all --split-huge-pages always");
    set(&host, "--group g --mode would-save");
    assert_eq!(one.tell("await"), "resume");
    let group = host.status().groups.remove(0);
    assert_eq!(group.split_huge_pages, SplitHugePages::Never);
    let mut other = Vmm::start(&host, "other", "h");
    other.tell("connect");
    assert_eq!(other.tell("splits"), "Always");
    // What a single VM has in huge pages is its group's matter.
    let (status, _, errors) = host.ctl("set --vm one --split-huge-pages never");
    assert_eq!(status, 2, "{errors}");
    drop(daemon);

    let _daemon = Daemon::start(&host);
    for (vm, splits) in [(&mut one, "Never"), (&mut other, "Always")] {
        vm.tell("connect");
        assert_eq!(vm.tell("splits"), splits);
    }
    // Said between the two connections of an engine.
    set(&host, "--group g --split-huge-pages worthwhile");
    assert_eq!(one.tell("listen"), "listening");
    assert_eq!(one.tell("await"), "split Worthwhile");
}
