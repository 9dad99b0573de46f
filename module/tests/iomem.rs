// SPDX-License-Identifier: GPL-2.0

use crate::iomem::find;
use proptest::prelude::*;

const TEXT: &[u8] = b"\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
000a0000-000bffff : PCI Bus 0000:00
00100000-3ffdffff : System RAM
  2aa00000-2bc0265f : Kernel code
  2be00000-2c7b3fff : Kernel rodata
  2c800000-2cabb97f : Kernel data
fd000000-fdffffff : 0000:00:02.0 : Kernel code
";

#[test]
fn names_are_found_below_their_parents() {
    let code = find(TEXT, b"Kernel code");
    assert_eq!(code, Some((0x2aa0_0000, 0x2bc0_2660)));
    let rodata = find(TEXT, b"Kernel rodata");
    assert_eq!(rodata, Some((0x2be0_0000, 0x2c7b_4000)));
    assert_eq!(find(TEXT, b"Kernel"), None);
    assert_eq!(find(TEXT, b"Kernel bss"), None);
}

#[test]
fn hidden_addresses_are_none() {
    let text = b"00000000-00000000 : System RAM\n  00000000-00000000 : Kernel code\n";
    assert_eq!(find(text, b"Kernel code"), None);
}

#[test]
fn the_last_address_there_is_has_no_end() {
    let text = b"0-ffffffffffffffff : all\n1-10000000000000000 : more\n";
    assert_eq!(find(text, b"all"), None);
    assert_eq!(find(text, b"more"), None);
}

proptest! {
    #[test]
    fn any_text_is_taken(text in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = find(&text, b"");
        let _ = find(&text, b"x");
    }
}
