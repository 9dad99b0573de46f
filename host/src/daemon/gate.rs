// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What stands between an engine and its group's store: the operator's word. It holds
//! whatever the engine does.

use super::vm::Vm;
use crate::protocol::{
    EngineReply, EngineRequest, FileKey, FileSpan, Segment, Sighting, StorePage, Verdict,
};
use crate::store::{Group, StoreError};
use std::collections::HashSet;
use std::sync::{Arc, MutexGuard};

/// The store of a VM's group, locked, as far as the VM may use it.
#[derive(Debug)]
pub(super) struct Gate<'a> {
    vm: u32,
    undone: Arc<HashSet<FileKey>>,
    store: MutexGuard<'a, Group>,
}

impl<'a> Gate<'a> {
    pub(super) fn of(vm: &'a Vm) -> Self {
        let store = vm.store();
        // Looked at with the store locked: what the operator noted before holds here.
        Self::new(vm.number, vm.undone_files(), store)
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
            EngineRequest::Publish { span } => {
                let mut pages = Vec::new();
                self.publish(*span, payload, &mut pages)?;
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
        span: FileSpan,
        bytes: &[u8],
        out: &mut Vec<Option<StorePage>>,
    ) -> Result<(), StoreError> {
        if self.undone.contains(&span.file) {
            out.extend(std::iter::repeat_n(None, span.pages as usize));
            return Ok(());
        }
        self.store.publish(self.vm, span, bytes, out)
    }
}
