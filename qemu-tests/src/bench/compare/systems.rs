//! What shares memory in a run.

use serde::{Deserialize, Serialize};

/// How KSM is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pace {
    /// Between two rounds.
    pub(super) sleep_millisecs: u64,
    /// In one round; the advisor chooses when there is none.
    pub(super) pages_to_scan: Option<u64>,
}

/// Which pages pagefusion's guests report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    Readonly,
    Clean,
}

impl Scope {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Readonly => "readonly",
            Self::Clean => "clean",
        }
    }
}

/// One of those that are compared.
#[derive(
    Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum System {
    /// Nobody shares anything.
    Nothing,
    /// KSM as the kernel sets it: 100 pages every 20 ms.
    KsmShipped,
    /// KSM as those set it who want more of it: 1,250 pages every 10 ms.
    KsmTuned,
    /// KSM without a pause.
    KsmUnlimited,
    /// KSM that sets itself so that a scan takes 200 s.
    KsmAdvisor,
    /// pagefusion, mapped read-only files.
    Readonly,
    /// pagefusion, all clean page cache that is used.
    Clean,
    /// pagefusion as in `readonly`, tuned KSM beside it.
    ReadonlyKsm,
}

impl System {
    /// Its name in tables.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::KsmShipped => "KSM as shipped",
            Self::KsmTuned => "KSM tuned",
            Self::KsmUnlimited => "KSM without limits",
            Self::KsmAdvisor => "KSM, scan-time advisor",
            Self::Readonly => "pagefusion, `readonly`",
            Self::Clean => "pagefusion, `clean`",
            Self::ReadonlyKsm => "pagefusion, `readonly`, and KSM tuned",
        }
    }

    /// KSM's part in it.
    pub(super) fn pace(self) -> Option<Pace> {
        let pace = |sleep_millisecs, pages_to_scan| {
            Some(Pace {
                sleep_millisecs,
                pages_to_scan,
            })
        };
        match self {
            Self::Nothing | Self::Readonly | Self::Clean => None,
            Self::KsmShipped => pace(20, Some(100)),
            Self::KsmTuned | Self::ReadonlyKsm => pace(10, Some(1250)),
            Self::KsmUnlimited => pace(0, Some(100_000)),
            Self::KsmAdvisor => pace(20, None),
        }
    }

    /// pagefusion's part in it.
    pub(super) fn scope(self) -> Option<Scope> {
        match self {
            Self::Readonly | Self::ReadonlyKsm => Some(Scope::Readonly),
            Self::Clean => Some(Scope::Clean),
            _ => None,
        }
    }

    /// Whether what it does takes minutes.
    pub(super) fn slow(self) -> bool {
        matches!(
            self,
            Self::KsmShipped | Self::KsmTuned | Self::KsmAdvisor | Self::ReadonlyKsm
        )
    }
}
