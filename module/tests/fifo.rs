// SPDX-License-Identifier: GPL-2.0

use crate::inflight::Fifo;
use proptest::prelude::*;
use std::collections::VecDeque;

proptest! {
    #[test]
    fn behaves_like_a_deque(ops in prop::collection::vec(0..4_u8, 0..500)) {
        let (mut fifo, mut model) = (Fifo::new(), VecDeque::new());
        for (i, op) in ops.into_iter().enumerate() {
            match op {
                0 | 1 => {
                    prop_assert!(fifo.push(i).is_ok());
                    model.push_back(i);
                }
                2 => prop_assert_eq!(fifo.pop(), model.pop_front()),
                _ => prop_assert_eq!(fifo.pop_newest(), model.pop_back()),
            }
            prop_assert_eq!(fifo.front(), model.front());
            prop_assert_eq!(fifo.newest(), model.back());
            prop_assert_eq!(fifo.is_empty(), model.is_empty());
        }
    }
}
