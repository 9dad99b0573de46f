// SPDX-License-Identifier: GPL-2.0

use crate::list::{deny, List, NoMemory};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Push,
    Pop,
    Reserve(usize),
    Remove(usize, usize),
    Replace(usize, usize, usize),
    Splice(usize, usize, usize),
    Fill(usize),
    Shrink,
    Truncate,
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let part = || (0..40_usize, 0..40_usize);
    prop_oneof![
        6 => Just(Op::Push),
        2 => Just(Op::Pop),
        1 => (0..50_usize).prop_map(Op::Reserve),
        2 => part().prop_map(|(from, n)| Op::Remove(from, n)),
        3 => (part(), 0..40_usize).prop_map(|((from, n), with)| Op::Replace(from, n, with)),
        3 => (part(), 0..40_usize).prop_map(|((from, n), with)| Op::Splice(from, n, with)),
        1 => (0..70_usize).prop_map(Op::Fill),
        1 => Just(Op::Shrink),
        1 => Just(Op::Truncate),
        1 => Just(Op::Clear),
    ]
}

proptest! {
    /// Also when memory runs out: then nothing has changed.
    #[test]
    fn a_list_is_a_vector(
        ops in prop::collection::vec((op(), prop_oneof![3 => Just(0), 1 => any::<u64>()]), 0..200),
    ) {
        let (mut list, mut model) = (List::new(), Vec::new());
        for (i, (op, denied)) in ops.into_iter().enumerate() {
            let fresh = |n: usize| (0..n).map(move |j| i * 100 + j);
            let clip = |model: &Vec<usize>, from: usize, n: usize| {
                let from = from.min(model.len());
                (from, (from + n).min(model.len()))
            };
            let mut other = List::new();
            if let Op::Replace(_, _, n) = op {
                for item in fresh(n) {
                    prop_assert_eq!(other.push(item), Ok(()));
                }
            }
            deny(denied);
            let (result, changed) = match op {
                Op::Push => (list.push(i), [&model[..], &[i]].concat()),
                Op::Pop => {
                    prop_assert_eq!(list.pop(), model.last().copied());
                    (Ok(()), model.iter().copied().take(model.len().saturating_sub(1)).collect())
                }
                Op::Reserve(n) => (list.reserve(n), model.clone()),
                Op::Remove(from, n) => {
                    let (from, to) = clip(&model, from, n);
                    list.remove(from, to);
                    (Ok(()), [&model[..from], &model[to..]].concat())
                }
                Op::Replace(from, n, with) => {
                    let (from, to) = clip(&model, from, n);
                    let changed = model[..from].iter().copied().chain(fresh(with));
                    let changed = changed.chain(model[to..].iter().copied()).collect();
                    (list.replace(from, to, other), changed)
                }
                Op::Splice(from, n, with) => {
                    let (from, to) = clip(&model, from, n);
                    let with: Vec<usize> = fresh(with).collect();
                    let changed = [&model[..from], &with, &model[to..]].concat();
                    (list.splice(from, to, &with), changed)
                }
                Op::Fill(n) => (list.fill(n, i), vec![i; n]),
                Op::Shrink => {
                    list.shrink();
                    (Ok(()), model.clone())
                }
                Op::Truncate => {
                    list.truncate();
                    (Ok(()), Vec::new())
                }
                Op::Clear => {
                    list.clear();
                    (Ok(()), Vec::new())
                }
            };
            deny(0);
            match result {
                Ok(()) => model = changed,
                Err(NoMemory) => prop_assert!(denied != 0),
            }
            prop_assert_eq!(&list[..], &model[..]);
        }
        list.shrink();
        let needed = model.len() * size_of::<usize>();
        prop_assert!(list.bytes() >= needed);
        // What the slab allocator rounds up to may be twice as much.
        prop_assert!(list.bytes() <= (2 * needed).max(8), "{} for {needed}", list.bytes());
        list.clear();
        prop_assert_eq!(list.bytes(), 0);
    }
}
