// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a page costs through the daemon's socket, by the number of pages in a request.

#[path = "../tests/daemon/support.rs"]
#[expect(dead_code, reason = "a part of it is enough here")]
mod support;

use pagefusion_host::protocol::{AdminClient, FileSpan, Sighting, StoreClient, Verdict};
use pagefusion_host::store::{PageStore, hash_page};
use std::time::{Duration, Instant};
use support::{Daemon, Host, content, key};

const PAGES: u64 = 32_768;

fn tell(what: &str, run: u64, took: Duration) {
    println!(
        "{what}, runs of {run}: {:.2} µs a page",
        took.as_secs_f64() * 1e6 / PAGES as f64
    );
}

fn main() {
    for run in [1, 16, 64] {
        let host = Host::new();
        let _daemon = Daemon::start(&host);
        let vm = AdminClient::connect(&host.runtime())
            .unwrap()
            .create_vm(None, None)
            .unwrap();
        let (mut store, welcome) = StoreClient::connect(&vm.directory.join("engine.sock")).unwrap();
        let seed = welcome.welcome.hash_seed;
        let hashes: Vec<_> = (0..PAGES)
            .map(|page| hash_page(seed, &content(1, page)))
            .collect();
        let spans = |inode| {
            let mut file = key(inode);
            file.size = PAGES * 4096;
            (0..PAGES).step_by(run as usize).map(move |page| FileSpan {
                file,
                page,
                pages: run as u32,
            })
        };
        let (mut segments, mut verdicts, mut pages) = (Vec::new(), Vec::new(), Vec::new());

        // A duplicate within one VM is published by its second name.
        for (what, inode) in [("sight, remembered", 1), ("sight, to be published", 2)] {
            let begin = Instant::now();
            for span in spans(inode) {
                let hashes = hashes[span.page as usize..][..run as usize].to_vec();
                let sighting = Sighting {
                    file: span.file,
                    page: span.page,
                    hashes,
                };
                store.sight(vec![sighting], &mut verdicts).unwrap();
            }
            tell(what, run, begin.elapsed());
        }
        assert_eq!(
            verdicts
                .iter()
                .filter(|it| **it == Verdict::Publish)
                .count(),
            PAGES as usize
        );

        let bytes: Vec<u8> = (0..PAGES).flat_map(|page| content(1, page)).collect();
        let begin = Instant::now();
        for span in spans(2) {
            let bytes = &bytes[span.page as usize * 4096..][..run as usize * 4096];
            store.publish(&[span], bytes, &mut pages).unwrap();
        }
        tell("publish", run, begin.elapsed());
        assert!(pages.iter().all(Option::is_some));

        let begin = Instant::now();
        for span in spans(2) {
            store.lookup(&[span], &mut segments).unwrap();
        }
        tell("lookup, found", run, begin.elapsed());
        let index = host.status().bytes_metadata;
        println!(
            "index: {:.0} bytes a stored page",
            index as f64 / PAGES as f64
        );
    }
}
