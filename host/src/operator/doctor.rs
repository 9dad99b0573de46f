// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whether this host is fit for sharing, and which command mends what is not.

use super::human_bytes;
use super::{Facts, NoAnswer};
use serde::Serialize;
use std::path::Path;

/// The first kernel whose `userfaultfd` protects pages that are not there yet.
const FIRST_KERNEL: (u32, u32) = (6, 4);
/// Gets one on Debian 12, the oldest release that is supported.
pub(super) const NEW_KERNEL: &str = "apt install -t bookworm-backports linux-image-amd64 && reboot";
/// Mappings that a VM of a few GiB can do with.
const ENOUGH_MAPPINGS: u64 = 262_144;

/// How a finding is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Fine,
    /// Sharing works, and would save more or cost less otherwise.
    Advice,
    /// Must be mended: without it nothing is shared.
    Bad,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What, in a word.
    pub check: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub text: String,
    /// The command that mends it.
    pub cure: Option<String>,
}

/// Judges a host.
pub fn judge(facts: &Facts) -> Vec<Finding> {
    let findings = [
        Some(kernel(&facts.kernel)),
        facts.userfaultfd.as_ref().map(userfaultfd),
        Some(userfaultfd_device(facts.userfaultfd_mode)),
        facts.max_map_count.map(max_map_count),
        facts.overcommit_memory.map(overcommit_memory),
        facts.huge_pages.as_deref().map(huge_pages),
        facts.ksm.map(ksm),
        facts.pressure.map(pressure),
        store(facts),
        facts.qemu.as_ref().map(qemu),
        facts.ivshmem.map(ivshmem),
        facts.preload.as_ref().map(preload),
        facts.daemon.as_ref().map(daemon),
    ];
    findings.into_iter().flatten().collect()
}

/// The findings as a person reads them.
pub fn findings_text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let mark = match finding.verdict {
            Verdict::Fine => "  ok   ",
            Verdict::Advice => "advice ",
            Verdict::Bad => " BAD   ",
        };
        text += &format!("{mark}{:<20} {}\n", finding.check, finding.text);
        if let Some(cure) = &finding.cure {
            text += &format!("{:28}→ {cure}\n", "");
        }
    }
    text
}

fn fine(check: &'static str, text: impl Into<String>) -> Finding {
    Finding {
        check,
        verdict: Verdict::Fine,
        text: text.into(),
        cure: None,
    }
}

fn mend(check: &'static str, verdict: Verdict, text: String, cure: impl Into<String>) -> Finding {
    Finding {
        check,
        verdict,
        text,
        cure: Some(cure.into()),
    }
}

fn kernel(release: &str) -> Finding {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || parts.next().and_then(|part| part.parse().ok());
    let version: Option<(u32, u32)> = next().zip(next());
    match version {
        Some(version) if version < FIRST_KERNEL => mend(
            "kernel",
            Verdict::Bad,
            format!(
                "{release} cannot protect pages that are not there yet; 6.4 is needed, which \
                 Debian 12 has in its backports"
            ),
            NEW_KERNEL,
        ),
        _ => fine("kernel", release),
    }
}

fn userfaultfd(found: &Result<(), NoAnswer>) -> Finding {
    match found {
        Ok(()) => fine("userfaultfd", "does all that is needed"),
        Err(NoAnswer { reason, cure }) => mend(
            "userfaultfd",
            Verdict::Bad,
            format!("{reason} (CONFIG_USERFAULTFD, CONFIG_PTE_MARKER_UFFD_WP)"),
            *cure,
        ),
    }
}

fn userfaultfd_device(mode: Option<u32>) -> Finding {
    let check = "/dev/userfaultfd";
    match mode {
        Some(mode) => fine(
            check,
            format!("mode {mode:03o}; the daemon opens it for VMs of ordinary users"),
        ),
        None => mend(
            check,
            Verdict::Advice,
            "is not there (CONFIG_USERFAULTFD, devtmpfs), so only a VMM that runs as root can \
             share, unless everybody may have a userfaultfd"
                .into(),
            "sysctl -w vm.unprivileged_userfaultfd=1",
        ),
    }
}

fn max_map_count(limit: u64) -> Finding {
    let check = "vm.max_map_count";
    if limit >= ENOUGH_MAPPINGS {
        return fine(check, limit.to_string());
    }
    mend(
        check,
        Verdict::Advice,
        format!("{limit}: every run of shared pages is a mapping, and large VMs have more"),
        "sysctl -w vm.max_map_count=1048576",
    )
}

fn overcommit_memory(mode: u64) -> Finding {
    let check = "vm.overcommit_memory";
    if mode != 2 {
        return fine(check, mode.to_string());
    }
    mend(
        check,
        Verdict::Bad,
        "2: every shared page would be charged as if it were a copy".into(),
        "sysctl -w vm.overcommit_memory=0",
    )
}

fn huge_pages(enabled: &str) -> Finding {
    let check = "huge pages";
    match enabled {
        "always" => fine(check, "always; those under shared pages are split"),
        "madvise" => fine(
            check,
            "madvise, which QEMU does; those under shared pages are split",
        ),
        other => fine(check, other),
    }
}

fn ksm(run: u64) -> Finding {
    if run != 1 {
        return fine("KSM", "does not run");
    }
    mend(
        "KSM",
        Verdict::Advice,
        "runs as well, and spends CPU time on pages that are shared already; stopped, or kept from \
         a QEMU by -machine mem-merge=off, it does not"
            .into(),
        "echo 0 > /sys/kernel/mm/ksm/run",
    )
}

fn pressure(counted: bool) -> Finding {
    let check = "PSI";
    if counted {
        return fine(check, "the kernel counts who waits for memory");
    }
    mend(
        check,
        Verdict::Advice,
        "the kernel does not count who waits for memory (CONFIG_PSI, psi=1), so the policy pressure \
         goes by what is available alone"
            .into(),
        "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&psi=1 /' /etc/default/grub && update-grub && reboot",
    )
}

fn store(facts: &Facts) -> Option<Finding> {
    let check = "store";
    let store = facts.store.as_ref()?;
    let path = store.path.display();
    if !store.is_tmpfs {
        return Some(mend(
            check,
            Verdict::Bad,
            format!(
                "{path} is not a tmpfs, and a store on a disk cannot save memory; mount one, or \
                 choose another --store-dir"
            ),
            format!("mount -t tmpfs -o size=50%,mode=700 tmpfs {path}"),
        ));
    }
    if let Some((found, cure)) = &store.foreign {
        let text = format!("{path} {found}, and pagefusiond refuses it");
        return Some(mend(check, Verdict::Bad, text, cure.as_str()));
    }
    let bytes = |bytes: u64| human_bytes(i64::try_from(bytes).unwrap_or(i64::MAX));
    let room = format!(
        "{path} has {} of {} free",
        bytes(store.free),
        bytes(store.bytes)
    );
    // A tmpfs made with size=0 has no limit.
    if store.bytes > 0 && facts.memory.is_some_and(|memory| store.free < memory / 20) {
        return Some(mend(
            check,
            Verdict::Advice,
            format!("{room}, less than a twentieth of the host's memory"),
            format!("mount -o remount,size=50% {path}"),
        ));
    }
    if store.huge.as_deref() == Some("never") {
        let text = format!(
            "{room}, in single pages: a tmpfs of its own with huge=within_size, mounted before the \
             daemon starts, saves a quarter of the processor time that sharing takes"
        );
        let options = "size=50%,mode=700,huge=within_size";
        let own = "/dev/shm/pagefusion";
        let cure = if Path::new(own).starts_with(&store.path) {
            format!("mkdir -p {own} && mount -t tmpfs -o {options} tmpfs {own}")
        } else {
            format!("mount -t tmpfs -o {options} tmpfs {path}")
        };
        return Some(mend(check, Verdict::Advice, text, cure));
    }
    Some(fine(check, room))
}

fn qemu(found: &Result<String, String>) -> Finding {
    match found {
        Ok(version) => fine("QEMU", version.as_str()),
        Err(reason) => mend(
            "QEMU",
            Verdict::Bad,
            format!("cannot be run (another one is named with --qemu): {reason}"),
            "apt install qemu-system-x86",
        ),
    }
}

fn ivshmem(there: bool) -> Finding {
    if there {
        return fine("ivshmem-doorbell", "QEMU has it");
    }
    mend(
        "ivshmem-doorbell",
        Verdict::Bad,
        "this QEMU does not have the device that guests report through (CONFIG_IVSHMEM_DEVICE); \
         Debian's has it"
            .into(),
        "apt install qemu-system-x86",
    )
}

fn preload(found: &Result<std::path::PathBuf, String>) -> Finding {
    match found {
        Ok(path) => fine("library", path.display().to_string()),
        Err(reason) => mend(
            "library",
            Verdict::Bad,
            reason.clone(),
            "install -D -m 644 libpagefusion_preload.so -t /usr/lib/pagefusion/",
        ),
    }
}

fn daemon(found: &Result<String, NoAnswer>) -> Finding {
    let own = env!("CARGO_PKG_VERSION");
    match found {
        Ok(version) if version == own => fine("pagefusiond", format!("runs, version {version}")),
        Ok(version) => mend(
            "pagefusiond",
            Verdict::Advice,
            format!("is version {version} and this program {own}"),
            "systemctl restart pagefusiond",
        ),
        Err(NoAnswer { reason, cure }) => mend("pagefusiond", Verdict::Bad, reason.clone(), *cure),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Tmpfs;
    use super::*;
    use crate::engine::UffdError;
    use crate::protocol::AdminError;

    fn good() -> Facts {
        Facts {
            kernel: "6.12.0-amd64".into(),
            userfaultfd: Some(Ok(())),
            userfaultfd_mode: Some(0o600),
            max_map_count: Some(1 << 20),
            overcommit_memory: Some(0),
            huge_pages: Some("always".into()),
            ksm: Some(0),
            pressure: Some(true),
            memory: Some(1 << 34),
            store: Some(Tmpfs {
                path: "/dev/shm".into(),
                is_tmpfs: true,
                bytes: 1 << 33,
                free: 1 << 33,
                huge: Some("within_size".into()),
                foreign: None,
            }),
            qemu: Some(Ok("QEMU emulator version 10.0".into())),
            ivshmem: Some(true),
            preload: Some(Ok("/usr/lib/pagefusion/libpagefusion_preload.so".into())),
            daemon: Some(Ok(env!("CARGO_PKG_VERSION").into())),
        }
    }

    /// Programs that mend something.
    const COMMANDS: [&str; 11] = [
        "apt",
        "chmod",
        "echo",
        "install",
        "mkdir",
        "mount",
        "mv",
        "sed",
        "sudo",
        "sysctl",
        "systemctl",
    ];

    /// Whether a shell can do it as it stands.
    fn is_command(cure: &str) -> bool {
        let known = cure
            .split(" && ")
            .map(|it| it.split(' ').next().unwrap_or_default())
            .all(|it| COMMANDS.contains(&it) || ["reboot", "update-grub"].contains(&it));
        let prose = [", ", "; ", ": ", " (", " or "];
        known && !prose.iter().any(|it| cure.contains(it))
    }

    /// What is not fine after a change to a good host.
    fn broken(change: impl FnOnce(&mut Facts)) -> (&'static str, Verdict) {
        let mut facts = good();
        change(&mut facts);
        let mut findings = judge(&facts);
        findings.retain(|finding| finding.verdict != Verdict::Fine);
        assert_eq!(findings.len(), 1, "{findings:?}");
        let finding = findings.remove(0);
        let cure = finding.cure.unwrap_or_default();
        assert!(is_command(&cure), "{}: {cure}", finding.check);
        (finding.check, finding.verdict)
    }

    #[test]
    fn a_good_host_is_fine() {
        let findings = judge(&good());
        assert_eq!(findings.len(), 13);
        assert!(findings.iter().all(|it| it.verdict == Verdict::Fine));
    }

    #[test]
    fn each_trouble_is_found_by_its_own_check() {
        use Verdict::{Advice, Bad};
        let fails = || Some(Err("no".to_owned()));
        let found = [
            broken(|it| it.kernel = "6.1.0-38-amd64".into()),
            broken(|it| it.userfaultfd = Some(Err(UffdError::Feature("all").into()))),
            broken(|it| it.userfaultfd_mode = None),
            broken(|it| it.max_map_count = Some(65_530)),
            broken(|it| it.overcommit_memory = Some(2)),
            broken(|it| it.ksm = Some(1)),
            broken(|it| it.pressure = Some(false)),
            broken(|it| it.store.as_mut().unwrap().is_tmpfs = false),
            broken(|it| it.store.as_mut().unwrap().free = 1 << 20),
            broken(|it| it.store.as_mut().unwrap().huge = Some("never".into())),
            broken(|it| {
                let path = std::path::Path::new("/dev/shm/pagefusion");
                let foreign = crate::daemon::foreign(7, 0o700, &[0]).unwrap();
                let cure = foreign.command(path);
                it.store.as_mut().unwrap().foreign = Some((foreign.to_string(), cure));
            }),
            broken(|it| it.qemu = fails()),
            broken(|it| it.ivshmem = Some(false)),
            broken(|it| it.preload = Some(Err("no".into()))),
            broken(|it| it.daemon = Some(Err(AdminError::NotRunning("/run".into()).into()))),
            broken(|it| it.daemon = Some(Ok("0.0.1".into()))),
        ];
        let expected = [
            ("kernel", Bad),
            ("userfaultfd", Bad),
            ("/dev/userfaultfd", Advice),
            ("vm.max_map_count", Advice),
            ("vm.overcommit_memory", Bad),
            ("KSM", Advice),
            ("PSI", Advice),
            ("store", Bad),
            ("store", Advice),
            ("store", Advice),
            ("store", Bad),
            ("QEMU", Bad),
            ("ivshmem-doorbell", Bad),
            ("library", Bad),
            ("pagefusiond", Bad),
            ("pagefusiond", Advice),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn who_may_not_have_a_userfaultfd_asks_as_root_and_who_could_not_needs_another_kernel() {
        let cure = |error: UffdError| userfaultfd(&Err(error.into())).cure.unwrap();
        let open = |kind| UffdError::Open(std::io::Error::from(kind));
        let denied = cure(open(std::io::ErrorKind::PermissionDenied));
        assert_eq!(denied, "sudo pagefusionctl doctor");
        assert_eq!(cure(open(std::io::ErrorKind::Unsupported)), NEW_KERNEL);
        assert_eq!(cure(UffdError::Feature("all")), NEW_KERNEL);
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_mended_by_why() {
        let broken_off = std::io::ErrorKind::BrokenPipe.into();
        let cures = [
            AdminError::NotRunning("/run".into()),
            AdminError::NotAllowed("/run".into()),
            AdminError::Connection(broken_off),
            AdminError::Refused("no".into()),
            AdminError::Unexpected,
        ]
        .map(|error| {
            let reason = error.to_string();
            let found = daemon(&Err(error.into()));
            assert_eq!((found.verdict, found.text), (Verdict::Bad, reason));
            found.cure.unwrap()
        });
        let restart = "systemctl restart pagefusiond";
        let expected = [
            "systemctl start pagefusiond",
            "sudo pagefusionctl doctor",
            restart,
            restart,
            restart,
        ];
        assert_eq!(cures, expected);
        let other = daemon(&Ok("0.0.1".into()));
        assert_eq!(other.cure.as_deref(), Some(restart));
    }

    #[test]
    fn kernels_are_compared_by_number() {
        assert_eq!(kernel("6.18.44-fc").verdict, Verdict::Fine);
        assert_eq!(kernel("7.0.0").verdict, Verdict::Fine);
        assert_eq!(kernel("6.4.0").verdict, Verdict::Fine);
        assert_eq!(kernel("5.19.17").verdict, Verdict::Bad);
    }
}
