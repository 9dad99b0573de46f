//! Which guests are measured.

use super::image::FILE_MIB;

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Load {
    /// The page cache consists of single pages that no other is contiguous with, instead of large folios.
    pub(super) singly: bool,
    /// Mapped files, in MiB.
    pub(super) mib: u64,
    /// Processes that map all of them.
    pub(super) processes: u64,
    /// VMAs for each file in each process.
    pub(super) pieces: usize,
}

impl Load {
    /// How many files that is.
    pub(super) fn files(&self) -> u64 {
        self.mib / FILE_MIB
    }
}

/// Everything that is measured.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The lines, large folios first.
    pub(super) loads: Vec<Load>,
}

impl Plan {
    /// All of it, or a fraction that shows the same costs less exactly.
    pub(super) fn new(quick: bool) -> Self {
        let (sizes, herds): (&[u64], &[u64]) = if quick {
            (&[64, 256], &[10, 100])
        } else {
            (&[64, 512, 2048], &[10, 100, 1000])
        };
        let mut loads = Vec::new();
        for singly in [false, true] {
            for &mib in sizes {
                for &processes in herds {
                    loads.push(Load {
                        singly,
                        mib,
                        processes,
                        pieces: 1,
                    });
                }
            }
            // Many VMAs in few processes, so that the two can be told apart.
            loads.push(Load {
                singly,
                mib: 64,
                processes: herds[1],
                pieces: 128,
            });
        }
        Self { loads }
    }

    /// Files there must be.
    pub(super) fn files(&self) -> u64 {
        self.loads.iter().map(Load::files).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_pages_and_vmas_vary_on_their_own() {
        for quick in [false, true] {
            let plan = Plan::new(quick);
            for singly in [false, true] {
                let loads: Vec<_> = plan.loads.iter().filter(|l| l.singly == singly).collect();
                let differ = |key: fn(&Load) -> (u64, u64)| {
                    loads.iter().any(|a| {
                        loads.iter().any(|b| {
                            let (a, b) = (key(a), key(b));
                            a.0 == b.0 && a.1 != b.1
                        })
                    })
                };
                assert!(differ(|l| (l.mib, l.processes)));
                assert!(differ(|l| (l.processes, l.mib)));
                assert!(differ(|l| (l.processes * l.mib, l.pieces as u64)));
            }
        }
    }
}
