// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guest memory of a QEMU without KVM, asked of its monitor.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use pagefusion_host::engine::Region;
use qapi::{Qmp, qmp};

use crate::memory_tree::{host_address, ram_ranges};

const PAGE: u64 = 4096;
/// The monitor answers from QEMU's main loop, which may be busy starting the machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why QEMU could not be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    /// Connection.
    #[error("QEMU's monitor cannot be reached: {0}")]
    Io(#[from] io::Error),
    /// The protocol.
    #[error("QEMU's monitor refused: {0}")]
    Execute(#[from] qapi::ExecuteError),
    /// No memory.
    #[error("QEMU's monitor names no guest memory")]
    Empty,
}

/// Finds all ordinary guest memory.
pub(crate) fn guest_memory(socket: &Path) -> Result<Vec<Region>, QmpError> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut monitor = Qmp::from_stream(&stream);
    monitor.handshake()?;
    let mut human = |line: String| {
        monitor.execute(&qmp::human_monitor_command {
            command_line: line,
            cpu_index: None,
        })
    };
    let mut regions = Vec::new();
    for range in ram_ranges(&human("info mtree -f".to_owned())?) {
        let Some(start) = range.start().checked_next_multiple_of(PAGE) else {
            continue;
        };
        // A range may reach to the end of all addresses; of that the last page is left alone.
        let pages = range.end().saturating_add(1).saturating_sub(start) / PAGE;
        if pages == 0 {
            continue;
        }
        let last = start + (pages - 1) * PAGE;
        let first_address = host_address(&human(format!("gpa2hva {start:#x}"))?);
        let last_address = host_address(&human(format!("gpa2hva {last:#x}"))?);
        // What is contiguous for the guest is so in QEMU; what is not memory after all
        // (a device's) has no address.
        let (Some(first), Some(last_page)) = (first_address, last_address) else {
            continue;
        };
        let length = Some(((pages - 1) * PAGE) as usize);
        if last_page.checked_sub(first) == length && first % PAGE as usize == 0 {
            regions.push(Region {
                gfn: start / PAGE,
                pages,
                hva: first,
            });
        }
    }
    if regions.is_empty() {
        Err(QmpError::Empty)
    } else {
        Ok(regions)
    }
}
