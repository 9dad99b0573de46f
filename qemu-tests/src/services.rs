//! The services of a guest: those of its init system, or the same programs started one by one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{guest::Guest, interrupt, protocol::Op};

/// What the image's init system starts.
const UNITS: [&str; 3] = ["nginx", "postgresql@*", "pagefusion-python"];

/// What runs in a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// nginx, PostgreSQL and Python.
    Whole,
    /// nginx and Python alone, in less memory, and the kernel leaves pages as they are. For a host that is slow.
    Light,
}

/// How the programs are started without an init system.
const COMMANDS: [&str; 3] = [
    // The loopback interface, which nobody else switches on: SIOCSIFFLAGS with IFF_UP and IFF_RUNNING.
    "python3 -c \"import fcntl, socket, struct; \
     fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 0x41))\"",
    "nginx",
    "setsid python3 -c \"import ctypes, decimal, hashlib, lzma, sqlite3, ssl, xml.etree.ElementTree; \
     import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=8000, bind='127.0.0.1')\" \
     >/dev/null 2>&1 </dev/null &",
];
const DATABASE: &str = "install -d -o postgres -g postgres /run/postgresql && pg_ctlcluster $(ls /etc/postgresql) main start";

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
pub fn start(guest: &mut Guest, load: Load, limit: Duration) -> Result<()> {
    let database = (load == Load::Whole).then_some(DATABASE);
    for command in COMMANDS.into_iter().chain(database) {
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
const SLEEP: &str = "scan_sleep_millisecs";
const HOUR: &str = "3600000";
/// What is not done by then is not waited for: a guest that works goes on making huge pages.
const QUIET_LIMIT: Duration = Duration::from_secs(45);

/// Waits until the guests' kernels have finished joining the pages of files into huge pages, which moves them to other
/// frames: what is measured afterwards is sharing and not the end of the boot. Returns whether all have.
pub fn wait_quiet(guests: &mut [Guest]) -> Result<bool> {
    let mut usual = Vec::new();
    for guest in guests.iter_mut() {
        usual.push(read(guest, SLEEP)?);
        // By itself it looks at 16 MiB every ten seconds.
        write(guest, SLEEP, "0")?;
    }
    let deadline = Instant::now() + QUIET_LIMIT;
    let mut quiet = true;
    for (guest, usual) in guests.iter_mut().zip(usual) {
        quiet &= wait_quiet_until(guest, deadline)?;
        write(guest, SLEEP, &usual.to_string())?;
    }
    Ok(quiet)
}

/// Keeps the guests' kernels from joining pages into huge pages for longer than any measurement takes.
pub fn stop_joining_pages(guests: &mut [Guest]) -> Result<()> {
    guests.iter_mut().try_for_each(|guest| {
        // To change the sleep begins a round, which comes whenever nobody else wants to run: a short one.
        write(guest, "pages_to_scan", "1")?;
        write(guest, SLEEP, HOUR)
    })
}

/// Has them do so a number of times as often as the kernel has set them.
pub fn join_pages_often(guests: &mut [Guest], times: u64) -> Result<()> {
    let sleep = (10_000 / times).to_string();
    guests
        .iter_mut()
        .try_for_each(|guest| write(guest, SLEEP, &sleep))
}

/// Has them go on as the kernel has set them.
pub fn join_pages_again(guests: &mut [Guest]) -> Result<()> {
    guests.iter_mut().try_for_each(|guest| {
        write(guest, "pages_to_scan", "4096")?;
        write(guest, SLEEP, "10000")
    })
}

fn wait_quiet_until(guest: &mut Guest, deadline: Instant) -> Result<bool> {
    let mut collapsed = None;
    let mut scans = 0;
    loop {
        let now = read(guest, "pages_collapsed")?;
        let scans_now = read(guest, "full_scans")?;
        if collapsed != Some(now) {
            (collapsed, scans) = (Some(now), scans_now);
        } else if scans_now >= scans + 2 {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        interrupt::check()?;
        // Neither counter has an event.
        std::thread::sleep(Duration::from_millis(250));
    }
}

fn read(guest: &mut Guest, file: &str) -> Result<u64> {
    let text: String = guest.request(Op::Read {
        path: format!("{KHUGEPAGED}/{file}"),
    })?;
    text.trim()
        .parse()
        .with_context(|| format!("{file} is {text:?}"))
}

fn write(guest: &mut Guest, file: &str, data: &str) -> Result<()> {
    guest.request(Op::Write {
        path: format!("{KHUGEPAGED}/{file}"),
        data: data.to_owned(),
    })
}
