// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Reads numbers from the bytes that a fuzzer gives.

/// What is left of an input. Behind its end everything is zero.
#[derive(Debug)]
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or_default()
    }

    pub(crate) fn below(&mut self, limit: u8) -> u8 {
        self.u8() % limit
    }

    pub(crate) fn u64(&mut self) -> u64 {
        let mut word = [0; 8];
        let bytes = self.bytes(8);
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    }

    /// A number that is small as a rule, or near a power of two: where arithmetic goes wrong.
    pub(crate) fn number(&mut self) -> u64 {
        match self.below(8) {
            0..=4 => u64::from(self.u8()),
            5 => (1_u64 << self.below(64)).wrapping_sub(1),
            6 => u64::MAX - u64::from(self.u8()),
            _ => self.u64(),
        }
    }
}
