// SPDX-License-Identifier: GPL-2.0

//! The session against a host that keeps to the protocol, step by step, in any order, and
//! against one that writes whatever it likes.

mod any_order;
mod host;
mod patience;
mod steps;

use self::host::{Held, Hold, Host, Shared};
use crate::pages::{Cursor, PieceState};
use crate::ranges::Range;
use crate::ring::Ring;
use crate::runs::PinnedRun;
use crate::session::{Geometry, Session, Why};
use crate::wire::{feature, FileIdentity, Layout};
use std::rc::Rc;

const GEOMETRY: Geometry = Geometry {
    memory_pages: 1 << 20,
    scale: 1,
};

fn session(shared: &Rc<Shared>) -> Session<Rc<Shared>, Hold> {
    let layout = Layout::for_size(Layout::MIN_BYTES).expect("smallest size");
    Session::new(
        Ring::new(shared.clone(), layout, feature::ALL),
        GEOMETRY,
        64,
    )
}

/// A host, and a session that is attached to it.
fn attached() -> (Rc<Shared>, Held, Host, Session<Rc<Shared>, Hold>) {
    let (shared, held) = (Shared::new(), Held::default());
    let (mut host, mut session) = (Host::new(&shared), session(&shared));
    session.service(0);
    host.attach();
    session.service(0);
    (shared, held, host, session)
}

/// Reports what is new of a file's pages, as a pass does. Returns the pages reported.
fn report(
    session: &mut Session<Rc<Shared>, Hold>,
    held: &Held,
    key: usize,
    range: Range,
    frame: u64,
) -> u64 {
    let known = session.tracker.find(key);
    let Some(id) = known.or_else(|| session.tracker.add(key, 0)) else {
        return 0;
    };
    let (mut rest, mut cursor, mut reported) = (range, Cursor::default(), 0);
    while !rest.is_empty() {
        let at = frame + (rest.start - range.start);
        let retry = session.retries(id);
        let Some(file) = session.tracker.get_mut(id) else {
            return reported;
        };
        let piece = file.pages.compare(rest, at, retry, &mut cursor);
        if piece.state != PieceState::Known {
            if piece.state == PieceState::Moved
                && session.retract(id, piece.range, Why::Gone).is_err()
            {
                return reported;
            }
            let identity = FileIdentity {
                inode: key as u64,
                ..Default::default()
            };
            if session.needs_announcement(id)
                && session.announce(id, identity, b"/some/name").is_err()
            {
                return reported;
            }
            let pages = piece.range.end - piece.range.start;
            let pin = held.hold(at, pages);
            let run = PinnedRun {
                page: rest.start,
                frame: at,
                pages,
                pin,
            };
            if session.report(id, run).is_err() {
                return reported;
            }
            reported += pages;
        }
        rest.start = piece.range.end;
    }
    reported
}
