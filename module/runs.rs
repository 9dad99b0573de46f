// SPDX-License-Identifier: GPL-2.0

//! Building runs: pieces that follow each other in the file and in memory become one report.

/// What keeps the frames of a piece in place. Pins of neighbouring pieces join into one.
pub(crate) trait Pin: Sized {
    /// Joins with the pin of the frames that follow directly.
    fn join(&mut self, next: Self);
}

/// Pages contiguous in one file and in guest frames, held by a pin.
pub(crate) struct PinnedRun<P> {
    /// First page in the file.
    pub(crate) page: u64,
    /// First frame.
    pub(crate) frame: u64,
    /// Number of pages.
    pub(crate) pages: u64,
    /// Holds the frames.
    pub(crate) pin: P,
}

/// Takes pieces in ascending file order and gives runs back.
pub(crate) struct RunBuilder<P> {
    current: Option<PinnedRun<P>>,
    most: u64,
}

impl<P: Pin> RunBuilder<P> {
    /// A builder for runs of at most `most` pages.
    pub(crate) const fn new(most: u64) -> Self {
        Self {
            current: None,
            most,
        }
    }

    /// Adds a piece; returns the run before it when the piece does not continue that run.
    pub(crate) fn push(&mut self, piece: PinnedRun<P>) -> Option<PinnedRun<P>> {
        if let Some(run) = &mut self.current {
            if run.page + run.pages == piece.page
                && run.frame + run.pages == piece.frame
                && run.pages + piece.pages <= self.most
            {
                run.pages += piece.pages;
                run.pin.join(piece.pin);
                return None;
            }
        }
        self.current.replace(piece)
    }

    /// Returns the last run.
    pub(crate) fn finish(&mut self) -> Option<PinnedRun<P>> {
        self.current.take()
    }
}
