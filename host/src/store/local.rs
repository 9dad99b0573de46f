// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A store in the process of its user.

use super::batches::{batches, publications};
use super::group::Group;
use super::{PageStore, StoreError};
use crate::protocol::{FileSpan, Holding, Segment, Sighting, StorePage, StoreSpan, Verdict};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One VM's access to a [`Group`] in the same process. The VM ends when this is dropped.
///
/// ```
/// use pagefusion_host::store::{Group, LocalStore};
/// use std::sync::{Arc, Mutex};
///
/// let group = Arc::new(Mutex::new(Group::anonymous()?));
/// let first = LocalStore::new(group.clone(), 1);
/// let second = LocalStore::new(group, 2);
/// assert_eq!(first.hash_seed(), second.hash_seed());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct LocalStore {
    group: Arc<Mutex<Group>>,
    vm: u32,
}

impl LocalStore {
    /// Joins `group` as `vm`, a number that no other VM there has.
    pub fn new(group: Arc<Mutex<Group>>, vm: u32) -> Self {
        let store = Self { group, vm };
        store.group().add_vm(vm);
        store
    }

    /// A descriptor of the store that can only be read.
    pub fn read_only(&self) -> io::Result<OwnedFd> {
        self.group().read_only()
    }

    /// Seed for [`super::hash_page`].
    pub fn hash_seed(&self) -> u64 {
        self.group().hash_seed()
    }

    /// The group that this VM has joined.
    pub fn shared_group(&self) -> &Arc<Mutex<Group>> {
        &self.group
    }

    /// Takes what this VM's guest should report again. The requests for other VMs stay.
    pub fn take_reports(&self) -> Vec<FileSpan> {
        self.group().take_reports_of(self.vm)
    }

    fn group(&self) -> MutexGuard<'_, Group> {
        // A panic within the store leaves it usable: at worst a page is kept too long.
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for LocalStore {
    fn drop(&mut self) {
        self.group().end_vm(self.vm);
    }
}

impl PageStore for LocalStore {
    fn lookup(&mut self, spans: &[FileSpan], out: &mut Vec<Segment>) -> Result<(), StoreError> {
        for batch in batches(spans.iter().copied()) {
            self.group().lookup(self.vm, &batch, out)?;
        }
        Ok(())
    }

    fn sight(
        &mut self,
        sightings: Vec<Sighting>,
        out: &mut Vec<Verdict>,
    ) -> Result<(), StoreError> {
        for batch in batches(sightings) {
            self.group().sight(self.vm, &batch, out)?;
        }
        Ok(())
    }

    fn publish(
        &mut self,
        spans: &[FileSpan],
        bytes: &[u8],
        out: &mut Vec<Option<StorePage>>,
    ) -> Result<(), StoreError> {
        for (spans, bytes) in publications(spans, bytes)? {
            self.group().publish(self.vm, &spans, bytes, out)?;
        }
        Ok(())
    }

    fn release(&mut self, spans: Vec<StoreSpan>) -> Result<(), StoreError> {
        self.group().release(self.vm, &spans)
    }

    fn announce(&mut self, holdings: Vec<Holding>) -> Result<(), StoreError> {
        for batch in batches(holdings) {
            self.group().announce(self.vm, &batch, false)?;
        }
        self.group().announce(self.vm, &[], true)
    }

    fn forget(&mut self, span: FileSpan) -> Result<(), StoreError> {
        self.group().forget(self.vm, span)
    }
}
