// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What guests call their files: one by two numbers, or by names that are none.

mod common;

use std::sync::{Arc, Mutex};

use common::Vm;
use common::guest_side::Shared;
use pagefusion_abi::wire::{FileIdentity, MAX_NAME, Record, file_kind};
use pagefusion_host::engine::Guest;
use pagefusion_host::protocol::FileKey;
use pagefusion_host::store::Group;

fn identity(inode: u64) -> FileIdentity {
    FileIdentity {
        fs_uuid: [7; 16],
        inode,
        size: 1 << 30,
        mtime_ns: 1,
        generation: 1,
        kind: file_kind::REGULAR,
    }
}

/// What a guest's two files are called after each of these announcements: number, inode, name.
fn names_after<const N: usize>(announced: [(u32, u64, &[u8]); N]) -> [[Option<String>; 2]; N] {
    let group = Arc::new(Mutex::new(Group::anonymous().unwrap()));
    let vm = Vm::new(&group, 1, 16, false);
    let shared = Shared::new();
    let mut guest = Guest::new(&shared.words[..], shared.layout, 77, 1024);
    shared.attach(5);
    announced.map(|(file, inode, name)| {
        let identity = identity(inode);
        shared.produce(&Record::File {
            file,
            identity,
            name,
        });
        while guest.progress(&vm.sharing).busy {}
        [1, 2].map(|inode| guest.name_of(&identity_key(inode)).map(str::to_owned))
    })
}

#[test]
fn a_name_is_no_longer_than_those_that_guests_give() {
    let long = [&[b'x'; MAX_NAME - 2][..], b"/b"].concat();
    // No byte of it is a character: each is shown by one of three bytes.
    let [[odd, _], [full, _]] = names_after([(1, 1, &[255; MAX_NAME]), (1, 1, &long)]);
    let odd = odd.unwrap();
    assert!(odd.len() <= MAX_NAME && odd.len() > MAX_NAME - 3);
    assert!(odd.chars().all(|it| it == char::REPLACEMENT_CHARACTER));
    assert_eq!(full.unwrap().as_bytes(), long);
}

#[test]
fn a_file_keeps_its_name_when_another_of_the_same_key_becomes_something_else() {
    let announced: [(u32, u64, &[u8]); 3] = [(1, 1, b"one"), (2, 1, b"same"), (1, 2, b"two")];
    let own = |name: &str| Some(name.to_owned());
    let expected = [
        [own("one"), None],
        [own("same"), None],
        [own("same"), own("two")],
    ];
    assert_eq!(names_after(announced), expected);
}

fn identity_key(inode: u64) -> FileKey {
    identity(inode).into()
}
