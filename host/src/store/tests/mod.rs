// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is expected of a [`Group`], case by case. Random sequences are in `model.rs`.

mod adoption;
mod limits;
mod sharing;
mod strays;

use super::*;
use crate::protocol::FileKey;

fn key(inode: u64, pages: u64) -> FileKey {
    FileKey {
        fs_uuid: [7; 16],
        inode,
        size: pages * PAGE as u64,
        mtime_ns: 1,
        generation: 0,
        kind: 1,
    }
}

fn span(file: FileKey, page: u64, pages: u32) -> FileSpan {
    FileSpan { file, page, pages }
}

fn content(number: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    page[..8].copy_from_slice(&number.to_le_bytes());
    page[PAGE - 8..].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    page
}

fn sighting(group: &Group, file: FileKey, page: u64, contents: &[u64]) -> Sighting {
    let hashes = contents
        .iter()
        .map(|&it| hash_page(group.hash_seed(), &content(it)))
        .collect();
    Sighting { file, page, hashes }
}

fn sight(group: &mut Group, vm: u32, file: FileKey, page: u64, contents: &[u64]) -> Vec<Verdict> {
    let mut out = Vec::new();
    let sighting = sighting(group, file, page, contents);
    group.sight(vm, &[sighting], &mut out).unwrap();
    out
}

fn publish(
    group: &mut Group,
    vm: u32,
    file: FileKey,
    page: u64,
    contents: &[u64],
) -> Vec<Option<StorePage>> {
    let bytes: Vec<u8> = contents.iter().flat_map(|&it| content(it)).collect();
    let mut out = Vec::new();
    group
        .publish(
            vm,
            &[span(file, page, contents.len() as u32)],
            &bytes,
            &mut out,
        )
        .unwrap();
    out
}

fn lookup(group: &mut Group, vm: u32, file: FileKey, page: u64, pages: u32) -> Vec<Segment> {
    let mut out = Vec::new();
    group
        .lookup(vm, &[span(file, page, pages)], &mut out)
        .unwrap();
    out
}

fn group_of(vms: u32) -> Group {
    let mut group = Group::anonymous().unwrap();
    for vm in 1..=vms {
        group.add_vm(vm);
    }
    group
}

/// Shares `contents` at `page` of `file` between VMs 1 and 2.
fn share(group: &mut Group, file: FileKey, page: u64, contents: &[u64]) -> Vec<StorePage> {
    sight(group, 1, file, page, contents);
    sight(group, 2, file, page, contents);
    publish(group, 2, file, page, contents)
        .into_iter()
        .map(Option::unwrap)
        .collect()
}

fn allocated_pages(group: &Group) -> u64 {
    group.allocated_bytes().unwrap() / PAGE as u64
}
