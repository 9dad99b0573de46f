// SPDX-License-Identifier: Apache-2.0 OR MIT

//! When a trust group shares, and at what price.

use serde::{Deserialize, Serialize};

/// Whether a group shares, or only counts what that would bring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// It shares.
    #[default]
    Share,
    /// It does everything but overlays and canonical pages.
    WouldSave,
}

/// Whether sharing waits until the host is short of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// It does not.
    #[default]
    Always,
    /// It does; until then the group only learns. What is shared stays when the pressure ends.
    Pressure,
}

/// Whether huge pages of guest memory are split so that pages in them can be shared. Split ones
/// cost the guest misses of the TLB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum SplitHugePages {
    /// Never: only what lies in small pages is shared.
    Never,
    /// When an eighth of one could be shared.
    Worthwhile,
    /// Always.
    #[default]
    Always,
}

/// What a scope is set to; `None` is nothing of its own: what the wider scope is set to holds, and in
/// the end the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policies {
    /// The mode.
    pub mode: Option<Mode>,
    /// The policy.
    pub policy: Option<Policy>,
    /// Whether huge pages are split.
    pub split_huge_pages: Option<SplitHugePages>,
}

/// One's new value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Choice<T> {
    /// None of its own.
    Inherit,
    /// This one.
    Own(T),
}

/// New values; `None` leaves one as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyChanges {
    /// [`Policies::mode`]
    pub mode: Option<Choice<Mode>>,
    /// [`Policies::policy`]
    pub policy: Option<Choice<Policy>>,
    /// [`Policies::split_huge_pages`]
    pub split_huge_pages: Option<Choice<SplitHugePages>>,
}

impl PolicyChanges {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Policies {
    /// Changes what `changes` names.
    pub fn change(&mut self, changes: PolicyChanges) {
        fn set<T>(value: &mut Option<T>, change: Option<Choice<T>>) {
            match change {
                Some(Choice::Own(own)) => *value = Some(own),
                Some(Choice::Inherit) => *value = None,
                None => {}
            }
        }
        set(&mut self.mode, changes.mode);
        set(&mut self.policy, changes.policy);
        set(&mut self.split_huge_pages, changes.split_huge_pages);
    }

    /// These values, and where there is none, that of `wider`.
    #[must_use]
    pub fn or(self, wider: Self) -> Self {
        Self {
            mode: self.mode.or(wider.mode),
            policy: self.policy.or(wider.policy),
            split_huge_pages: self.split_huge_pages.or(wider.split_huge_pages),
        }
    }
}
