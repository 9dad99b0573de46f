//! The services of a guest: those of its init system, or the same programs started one by one.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

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
