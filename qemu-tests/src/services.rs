//! The services of a guest: those of its init system, or the same programs started one by one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::guest::Guest;

/// What the image's init system starts.
const UNITS: [&str; 3] = ["nginx", "postgresql@*", "pagefusion-python"];

/// How the same programs are started without it.
const COMMANDS: [&str; 4] = [
    // The loopback interface, which nobody else switches on: SIOCSIFFLAGS with IFF_UP and IFF_RUNNING.
    "python3 -c \"import fcntl, socket, struct; \
     fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 0x41))\"",
    "install -d -o postgres -g postgres /run/postgresql && pg_ctlcluster $(ls /etc/postgresql) main start",
    "nginx",
    "setsid python3 -m http.server --bind 127.0.0.1 8000 >/dev/null 2>&1 </dev/null &",
];

/// Waits until systemd has started everything.
pub fn wait(guest: &mut Guest, limit: Duration) -> Result<()> {
    let up = guest.run_for(&["systemctl", "is-system-running", "--wait"], limit)?;
    if up.stdout.trim() != "running" {
        let failed = guest.run_for(&["systemctl", "--failed", "--no-legend", "--plain"], limit)?;
        bail!(
            "{}: the system is {:?}: {}",
            guest.name(),
            up.stdout.trim(),
            failed.stdout
        );
    }
    for unit in UNITS {
        let state = guest.run_for(&["systemctl", "is-active", unit], limit)?;
        ensure!(
            state.status == Some(0),
            "{}: {unit} is {:?}",
            guest.name(),
            state.stdout.trim()
        );
    }
    Ok(())
}

/// Starts them on a system that has no init system.
pub fn start(guest: &mut Guest, limit: Duration) -> Result<()> {
    for command in COMMANDS {
        let outcome = guest.run_for(&["sh", "-c", command], limit)?;
        ensure!(
            outcome.status == Some(0),
            "{}: {command}: {}",
            guest.name(),
            outcome.stderr.trim()
        );
    }
    Ok(())
}

/// Where the guest's kernel says what it has made of small pages.
const KHUGEPAGED: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged";
/// What is not done by then is not waited for: without huge pages there are no scans to count.
const QUIET_LIMIT: Duration = Duration::from_secs(45);

/// Waits until the guests' kernels have finished joining the pages of files into huge pages, which
/// moves them to other frames: what is measured afterwards is sharing and not the end of the boot.
pub fn wait_quiet(guests: &mut [Guest]) -> Result<()> {
    let deadline = Instant::now() + QUIET_LIMIT;
    guests
        .iter_mut()
        .try_for_each(|guest| wait_quiet_until(guest, deadline))
}

fn wait_quiet_until(guest: &mut Guest, deadline: Instant) -> Result<()> {
    let mut collapsed = None;
    let mut scans = 0;
    loop {
        let now = number(guest, "pages_collapsed")?;
        let scans_now = number(guest, "full_scans")?;
        if collapsed != Some(now) {
            (collapsed, scans) = (Some(now), scans_now);
        } else if scans_now >= scans + 2 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Ok(());
        }
        // Neither counter has an event.
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn number(guest: &mut Guest, file: &str) -> Result<u64> {
    let text = guest.output(&["cat", &format!("{KHUGEPAGED}/{file}")])?;
    text.trim()
        .parse()
        .with_context(|| format!("{file} is {text:?}"))
}
