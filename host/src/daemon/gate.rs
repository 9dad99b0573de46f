// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What stands between an engine and its group's store: the operator's word. It holds
//! whatever the engine does.

use super::vm::Vm;
use crate::protocol::{FileKey, FileSpan, Segment, Sighting, StorePage, Verdict};
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
        Self {
            vm: vm.number,
            // Looked at with the store locked: what the operator noted before holds here.
            undone: vm.undone_files(),
            store,
        }
    }

    /// The store itself, for what needs no permission.
    pub(super) fn store(&mut self) -> &mut Group {
        &mut self.store
    }

    /// Files that were undone are not found.
    pub(super) fn lookup(
        &mut self,
        spans: &[FileSpan],
        out: &mut Vec<Segment>,
    ) -> Result<(), StoreError> {
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
    pub(super) fn sight(
        &mut self,
        sightings: &[Sighting],
        out: &mut Vec<Verdict>,
    ) -> Result<(), StoreError> {
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
    pub(super) fn publish(
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
