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

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: &str = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}
{"return": {}}
"#;

    /// A monitor that has said all this, whatever it will be asked.
    #[derive(Clone)]
    struct Said(io::Cursor<String>);

    impl Said {
        fn memory(range: &str, addresses: &[&str]) -> Self {
            let tree = format!(
                "FlatView #0\n AS \"memory\", root: system\n Root memory region: system\n  {range} (prio 0, ram): pc.ram\n"
            );
            let addresses = addresses
                .iter()
                .map(|it| format!("Host virtual address for 0x0 (pc.ram) is {it}\n"));
            let answer = |text| format!("{}\n", serde_json::json!({ "return": text }));
            let answers: String = std::iter::once(tree).chain(addresses).map(answer).collect();
            Self(io::Cursor::new(format!("{HELLO}{answers}")))
        }
    }

    impl Read for Said {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.0.read(into)
        }
    }

    impl Write for Said {
        fn write(&mut self, from: &[u8]) -> io::Result<usize> {
            Ok(from.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_monitor_that_closes_without_a_greeting_is_an_error() {
        let silent = Said(io::Cursor::new(String::new()));
        assert!(matches!(ask(silent), Err(QmpError::Io(_))));
    }

    #[test]
    fn pages_that_a_range_has_a_part_of_are_left_alone() {
        let said = Said::memory(
            "0000000000000800-00000000000037ff",
            &["0x7f0000001000", "0x7f0000002000"],
        );
        let regions = ask(said).unwrap();
        assert_eq!(regions.len(), 1);
        assert_eq!(
            (regions[0].gfn, regions[0].pages, regions[0].hva),
            (1, 2, 0x7f00_0000_1000)
        );
        let within = Said::memory("0000000000000800-0000000000001ffe", &[]);
        assert!(matches!(ask(within), Err(QmpError::Empty)));
    }

    #[test]
    fn the_last_page_of_all_addresses_counts_and_what_would_end_behind_them_does_not() {
        let last = "fffffffffffff000-ffffffffffffffff";
        let there = "0x7f0000001000";
        let regions = ask(Said::memory(last, &[there, there])).unwrap();
        assert_eq!((regions[0].gfn, regions[0].pages), ((1 << 52) - 1, 1));
        let behind = "0xfffffffffffff000";
        assert!(matches!(
            ask(Said::memory(last, &[behind, behind])),
            Err(QmpError::Empty)
        ));
    }
}
