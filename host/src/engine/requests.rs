// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a guest is asked for, until its ring has room for it.

use pagefusion_abi::wire::Request;

use super::ring::RingConsumer;
use super::shared_memory::Words;

/// Beyond so many, asking for everything is cheaper.
const MOST: usize = 4096;

/// Requests that have not been posted; [`Request::Rescan`] stands for any number of them.
#[derive(Debug, Default)]
pub(super) struct Requests {
    waiting: Vec<Request>,
}

impl Requests {
    /// The guest that they were for has gone.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }

    /// Has this asked for by the next [`Self::post`].
    pub(super) fn add(&mut self, request: Request) {
        if self.waiting.contains(&Request::Rescan) {
            return;
        }
        if request == Request::Rescan || self.waiting.len() >= MOST {
            self.waiting.clear();
            self.waiting.push(Request::Rescan);
            return;
        }
        // Requests for one file that wait become one: what lies between is mostly wanted as
        // well, and what is shared already costs little to see again.
        for waiting in &mut self.waiting {
            if let Some(joined) = join(waiting, &request) {
                *waiting = joined;
                return;
            }
        }
        self.waiting.push(request);
    }

    /// Posts what there is room for; whether that was any, so that the guest is to be rung.
    pub(super) fn post<M: Words>(&mut self, ring: &mut RingConsumer<M>) -> bool {
        let mut posted = false;
        while let Some(request) = self.waiting.pop() {
            if !ring.post(request) {
                self.waiting.push(request);
                break;
            }
            posted = true;
        }
        posted
    }
}

/// One request for what both ask of the same file.
fn join(a: &Request, b: &Request) -> Option<Request> {
    let (Request::Report { file, page, pages }, Request::Report { file: other, .. }) = (a, b)
    else {
        return None;
    };
    let Request::Report {
        page: from,
        pages: count,
        ..
    } = b
    else {
        return None;
    };
    if file != other {
        return None;
    }
    if *pages == 0 || *count == 0 {
        return Some(Request::Report {
            file: *file,
            page: 0,
            pages: 0,
        });
    }
    let start = *page.min(from);
    let end = page.saturating_add(*pages).max(from.saturating_add(*count));
    Some(Request::Report {
        file: *file,
        page: start,
        pages: end - start,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(file: u32, page: u64, pages: u64) -> Request {
        Request::Report { file, page, pages }
    }

    fn waiting(added: &[Request]) -> Vec<Request> {
        let mut requests = Requests::default();
        for request in added {
            requests.add(*request);
        }
        requests.waiting
    }

    #[test]
    fn of_each_file_one_request_waits_that_covers_all() {
        let added = [
            report(1, 10, 5),
            report(2, 0, 1),
            report(1, 2, 3),
            report(1, 30, 1),
        ];
        assert_eq!(waiting(&added), [report(1, 2, 29), report(2, 0, 1)]);
        let added = [report(1, 10, 5), report(1, 0, 0), report(1, 70, 1)];
        assert_eq!(waiting(&added), [report(1, 0, 0)], "the whole file");
        let added = [report(1, u64::MAX, 5), report(1, 1, 1)];
        assert_eq!(waiting(&added), [report(1, 1, u64::MAX - 1)]);
    }

    #[test]
    fn everything_stands_for_all_others() {
        let added = [report(1, 10, 5), Request::Rescan, report(2, 0, 1)];
        assert_eq!(waiting(&added), [Request::Rescan]);
        let each: Vec<_> = (0..MOST as u32).map(|file| report(file, 0, 1)).collect();
        assert_eq!(waiting(&each).len(), MOST);
        let one_more: Vec<_> = (0..=MOST as u32).map(|file| report(file, 0, 1)).collect();
        assert_eq!(waiting(&one_more), [Request::Rescan]);
    }
}
