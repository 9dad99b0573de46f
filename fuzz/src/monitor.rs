// SPDX-License-Identifier: Apache-2.0 OR MIT

//! QEMU's monitor, answering anything.

use crate::memory_tree::{host_address, ram_ranges};
use crate::qmp::ask;
use std::io::{self, Read, Write};

/// A monitor that has said everything it will ever say.
#[derive(Clone)]
struct Monitor<'a>(&'a [u8]);

impl Read for Monitor<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Monitor<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        Ok(from.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Answers of a monitor: what comes of them is memory that there can be, or an error.
///
/// The first byte says what the rest is: a whole conversation, the text of `info mtree -f` and
/// of two addresses, parted by zeros, which is put into a proper conversation, or such texts.
pub fn qmp(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else {
        return;
    };
    match kind % 3 {
        0 => check(rest),
        1 => check(&conversation(rest)),
        _ => {
            let text = String::from_utf8_lossy(rest);
            for range in ram_ranges(&text) {
                assert!(range.start() <= range.end());
            }
            host_address(&text);
        }
    }
}

fn conversation(texts: &[u8]) -> Vec<u8> {
    let mut said = br#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}
{"return": {}}
"#
    .to_vec();
    for text in texts.split(|byte| *byte == 0) {
        let text = String::from_utf8_lossy(text);
        let answer = serde_json::json!({ "return": text });
        said.extend(answer.to_string().bytes());
        said.push(b'\n');
    }
    said
}

fn check(said: &[u8]) {
    let Ok(regions) = ask(Monitor(said)) else {
        return;
    };
    assert!(!regions.is_empty());
    for region in regions {
        assert!(region.pages > 0 && region.hva % 4096 == 0);
        assert!(region.gfn + region.pages <= 1 << 52);
        let addresses = region.addresses();
        assert!(addresses.start < addresses.end);
    }
}
