// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What an operator lets VMs and groups take of the host.

use serde::{Deserialize, Serialize};

/// Most of each that may be taken; `None` is no limit. They hold for what comes: nothing that
/// is shared already is taken away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Memory for canonical pages, bytes. For a VM: those it has put into the store.
    pub max_store: Option<u64>,
    /// Memory on overlays, bytes of canonical pages that VMs may map.
    pub max_overlays: Option<u64>,
    /// Bytes put into the store in a second; whoever is faster waits.
    pub publish_rate: Option<u64>,
}

/// One limit's new value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Limit {
    /// No limit of its own: that of the wider scope holds, if any.
    None,
    /// This many bytes.
    Bytes(u64),
}

/// New values; `None` leaves a limit as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitChanges {
    /// [`Limits::max_store`]
    pub max_store: Option<Limit>,
    /// [`Limits::max_overlays`]
    pub max_overlays: Option<Limit>,
    /// [`Limits::publish_rate`]
    pub publish_rate: Option<Limit>,
}

impl Limits {
    /// These limits, and where there is none, that of `wider`.
    #[must_use]
    pub fn or(self, wider: Self) -> Self {
        Self {
            max_store: self.max_store.or(wider.max_store),
            max_overlays: self.max_overlays.or(wider.max_overlays),
            publish_rate: self.publish_rate.or(wider.publish_rate),
        }
    }

    /// Changes what `changes` names.
    pub fn change(&mut self, changes: LimitChanges) {
        let set = |limit: &mut Option<u64>, change: Option<Limit>| match change {
            Some(Limit::Bytes(bytes)) => *limit = Some(bytes),
            Some(Limit::None) => *limit = None,
            None => {}
        };
        set(&mut self.max_store, changes.max_store);
        set(&mut self.max_overlays, changes.max_overlays);
        set(&mut self.publish_rate, changes.publish_rate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrower_limit_wins_where_there_is_one() {
        let wide = Limits {
            max_store: Some(10),
            publish_rate: Some(5),
            ..Limits::default()
        };
        let mut narrow = Limits {
            max_store: Some(1),
            ..Limits::default()
        };
        let both = narrow.or(wide);
        assert_eq!((both.max_store, both.publish_rate), (Some(1), Some(5)));
        narrow.change(LimitChanges {
            max_store: Some(Limit::None),
            max_overlays: Some(Limit::Bytes(3)),
            publish_rate: None,
        });
        assert_eq!(narrow.or(wide).max_store, Some(10));
        assert_eq!(narrow.max_overlays, Some(3));
    }
}
