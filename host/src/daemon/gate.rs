// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What stands between an engine and its group's store: the operator's word. It holds
//! whatever the engine does.

use super::vm::{Asker, Heard, Vm};
use crate::protocol::{
    EngineReply, EngineRequest, FileKey, FileSpan, Segment, Sighting, StorePage, Verdict,
};
use crate::store::batches::pages_of;
use crate::store::{Group, PAGE, StoreError, check_spans};
use std::collections::HashSet;
use std::io;
use std::sync::{Arc, MutexGuard};

/// The store of a VM's group, locked, as far as the VM may use it.
#[derive(Debug)]
pub(super) struct Gate<'a> {
    vm: u32,
    undone: Arc<HashSet<FileKey>>,
    store: MutexGuard<'a, Group>,
}

impl<'a> Gate<'a> {
    /// For a request that came by `asker`; an error if that is not the newest any more.
    pub(super) fn of(vm: &'a Vm, asker: &Arc<Asker>) -> Result<Self, StoreError> {
        let mut store = vm.store();
        match vm.hears(asker) {
            Heard::Again => {}
            Heard::First => store.begin_announcement(vm.number),
            Heard::Late => {
                return Err(StoreError::Unreachable(io::Error::new(
                    io::ErrorKind::ConnectionAborted,
                    "a request came late: the engine has connected again",
                )));
            }
        }
        // Looked at with the store locked: what the operator noted before holds here.
        Ok(Self::new(vm.number, vm.undone_files(), store))
    }

    /// The same for a VM given by its number and the files that it shall not share.
    pub(super) fn new(
        vm: u32,
        undone: Arc<HashSet<FileKey>>,
        store: MutexGuard<'a, Group>,
    ) -> Self {
        Self { vm, undone, store }
    }

    /// The store itself, for what needs no permission.
    pub(super) fn store(&mut self) -> &mut Group {
        &mut self.store
    }

    /// Does what an engine asks. `payload` came with it; `first` is the first request of a
    /// connection.
    pub(super) fn answer(
        &mut self,
        request: &EngineRequest,
        payload: &[u8],
        first: bool,
    ) -> Result<EngineReply, StoreError> {
        if first && !matches!(request, EngineRequest::Announce { .. }) {
            // An engine that maps something says so first: this one maps nothing.
            self.store.announce(self.vm, &[], true)?;
        }
        Ok(match request {
            EngineRequest::Announce { holdings, last } => {
                self.store.announce(self.vm, holdings, *last)?;
                EngineReply::Done
            }
            EngineRequest::Lookup { spans } => {
                let mut segments = Vec::new();
                self.lookup(spans, &mut segments)?;
                EngineReply::Segments(segments)
            }
            EngineRequest::Sight { sightings } => {
                let mut verdicts = Vec::new();
                self.sight(sightings, &mut verdicts)?;
                EngineReply::Verdicts(verdicts)
            }
            EngineRequest::Publish { spans } => {
                let mut pages = Vec::new();
                self.publish(spans, payload, &mut pages)?;
                EngineReply::Published(pages)
            }
            EngineRequest::Release { spans } => {
                self.store.release(self.vm, spans)?;
                EngineReply::Done
            }
            EngineRequest::Forget { span } => {
                self.store.forget(self.vm, *span)?;
                EngineReply::Done
            }
        })
    }

    /// Files that were undone are not found.
    fn lookup(&mut self, spans: &[FileSpan], out: &mut Vec<Segment>) -> Result<(), StoreError> {
        // All of them, and not only those between files that were undone.
        check_spans(spans.iter().map(|it| (it.page, u64::from(it.pages))))?;
        let Self { vm, undone, store } = self;
        for spans in spans.chunk_by(|a, b| undone.contains(&a.file) == undone.contains(&b.file)) {
            if spans.first().is_some_and(|it| undone.contains(&it.file)) {
                out.extend(spans.iter().map(|span| Segment {
                    pages: span.pages,
                    store: None,
                }));
            } else {
                store.lookup(*vm, spans, out)?;
            }
        }
        Ok(())
    }

    /// Files that were undone are not noted, for this VM or for others.
    fn sight(&mut self, sightings: &[Sighting], out: &mut Vec<Verdict>) -> Result<(), StoreError> {
        check_spans(sightings.iter().map(|it| (it.page, it.hashes.len() as u64)))?;
        let Self { vm, undone, store } = self;
        for sightings in
            sightings.chunk_by(|a, b| undone.contains(&a.file) == undone.contains(&b.file))
        {
            if sightings
                .first()
                .is_some_and(|it| undone.contains(&it.file))
            {
                let pages = sightings.iter().map(|it| it.hashes.len()).sum();
                out.extend(std::iter::repeat_n(Verdict::Remembered, pages));
            } else {
                store.sight(*vm, sightings, out)?;
            }
        }
        Ok(())
    }

    /// Files that were undone are not taken.
    fn publish(
        &mut self,
        spans: &[FileSpan],
        bytes: &[u8],
        out: &mut Vec<Option<StorePage>>,
    ) -> Result<(), StoreError> {
        let Self { vm, undone, store } = self;
        let mut rest = bytes;
        for spans in spans.chunk_by(|a, b| undone.contains(&a.file) == undone.contains(&b.file)) {
            let pages = pages_of(spans) as usize;
            let (bytes, behind) = rest
                .split_at_checked(pages * PAGE)
                .ok_or_else(|| StoreError::Refused("bytes end before the spans".into()))?;
            rest = behind;
            if spans.first().is_some_and(|it| undone.contains(&it.file)) {
                out.extend(std::iter::repeat_n(None, pages));
            } else {
                store.publish(*vm, spans, bytes, out)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{MAX_REQUEST_PAGES, hash_page};
    use std::sync::Mutex;

    fn span(inode: u64, page: u64, pages: u32) -> FileSpan {
        let file = FileKey {
            fs_uuid: [0; 16],
            inode,
            size: 0,
            mtime_ns: 0,
            generation: 0,
            kind: 1,
        };
        FileSpan { file, page, pages }
    }

    #[test]
    fn files_that_were_undone_make_no_request_longer_than_others() {
        const HALF: u32 = MAX_REQUEST_PAGES as u32 / 2;
        let (one, other) = (span(1, 0, HALF), span(2, 0, 1));
        let undone = Arc::new(HashSet::from([other.file]));
        let group = Mutex::new(Group::anonymous().unwrap());
        group.lock().unwrap().add_vm(1);
        let mut gate = Gate::new(1, undone, group.lock().unwrap());
        let mut segments = Vec::new();
        let most = FileSpan {
            pages: HALF - 2,
            ..one
        };
        gate.lookup(&[one, other, most, other], &mut segments)
            .unwrap();
        let pages: u32 = segments.iter().map(|it| it.pages).sum();
        assert_eq!(pages, 2 * HALF);
        let too_many = [one, other, one];
        assert!(gate.lookup(&too_many, &mut Vec::new()).is_err());
        let undone_only = [FileSpan {
            pages: u32::MAX,
            ..other
        }];
        assert!(gate.lookup(&undone_only, &mut Vec::new()).is_err());
        let sightings = too_many.map(|it| Sighting {
            file: it.file,
            page: it.page,
            hashes: (0..u64::from(it.pages)).collect(),
        });
        assert!(gate.sight(&sightings, &mut Vec::new()).is_err());
        gate.sight(&sightings[..2], &mut Vec::new()).unwrap();
    }

    #[test]
    fn of_several_files_published_at_once_those_undone_are_not_taken_and_the_others_as_they_are() {
        let spans = [span(1, 5, 2), span(2, 0, 3), span(3, 9, 1)];
        let undone = Arc::new(HashSet::from([spans[1].file]));
        let content = |page: u8| [page; PAGE];
        let bytes: Vec<u8> = (0..6).flat_map(content).collect();
        let group = Mutex::new(Group::anonymous().unwrap());
        let seed = group.lock().unwrap().hash_seed();
        for vm in [1, 2] {
            let mut store = group.lock().unwrap();
            store.add_vm(vm);
            let sighting = Sighting {
                file: span(9, 0, 0).file,
                page: 0,
                hashes: (0..6).map(|page| hash_page(seed, &content(page))).collect(),
            };
            store.sight(vm, &[sighting], &mut Vec::new()).unwrap();
        }
        let mut positions = Vec::new();
        let mut gate = Gate::new(2, undone, group.lock().unwrap());
        gate.publish(&spans, &bytes, &mut positions).unwrap();
        let taken: Vec<_> = positions.iter().map(Option::is_some).collect();
        assert_eq!(taken, [true, true, false, false, false, true]);
        let file = gate.store.read_only().unwrap();
        for (page, position) in (0..).zip(positions) {
            let Some(position) = position else { continue };
            let mut stored = [0; PAGE];
            rustix::io::pread(&file, &mut stored, u64::from(position) * PAGE as u64).unwrap();
            assert_eq!(stored, content(page), "page {page}");
        }
    }
}
