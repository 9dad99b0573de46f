// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guest memory of a QEMU without KVM, asked of its monitor.

use std::io::{self, BufRead, Read, Write};
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
    ask(&stream)
}

/// The same over a connection.
pub(crate) fn ask<S: Read + Write + Clone>(stream: S) -> Result<Vec<Region>, QmpError> {
    let mut monitor = Qmp::from_stream(stream);
    if monitor.inner_mut().fill_buf()?.is_empty() {
        // `handshake` takes a greeting for granted.
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    monitor.handshake()?;
    let mut human = |line: String| {
        monitor.execute(&qmp::human_monitor_command {
            command_line: line,
            cpu_index: None,
        })
    };
    let mut regions = Vec::new();
    for range in ram_ranges(&human("info mtree -f".to_owned())?) {
        let first = range.start().div_ceil(PAGE);
        // Of the page in which the range ends only if it ends with it.
        let behind = range.end() / PAGE + u64::from(range.end() % PAGE == PAGE - 1);
        if first >= behind {
            continue;
        }
        let (pages, last) = (behind - first, behind - 1);
        let mut address_of = |page: u64| -> Result<Option<usize>, QmpError> {
            let text = human(format!("gpa2hva {:#x}", page * PAGE))?;
            Ok(host_address(&text))
        };
        // What is contiguous for the guest is so in QEMU; what is not memory after all
        // (a device's) has no address.
        let (Some(hva), Some(last_page)) = (address_of(first)?, address_of(last)?) else {
            continue;
        };
        let is_whole = last_page.checked_sub(hva) == Some(((pages - 1) * PAGE) as usize);
        let has_end = last_page.checked_add(PAGE as usize).is_some();
        if is_whole && has_end && hva % PAGE as usize == 0 {
            regions.push(Region {
                gfn: first,
                pages,
                hva,
            });
        }
    }
    if regions.is_empty() {
        Err(QmpError::Empty)
    } else {
        Ok(regions)
    }
}
