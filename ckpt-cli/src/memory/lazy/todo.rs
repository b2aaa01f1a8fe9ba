//! Pages that are still to come, as the program moves and drops them.

use ckpt_common::image::PAGE_SIZE;
use ckpt_common::image::pages::{PageRun, Source};
use std::collections::BTreeMap;
use std::ops::Range;

/// Pages of an address space that it has not got yet, with their sources. Zero runs are not among them: a page that is
/// missing and has no source is zero.
#[derive(Clone, Debug, Default)]
pub(super) struct Todo(BTreeMap<u64, (u32, Source)>);

/// The page numbers of a range of addresses.
pub(super) fn pages(addresses: Range<u64>) -> Range<u64> {
    addresses.start / PAGE_SIZE as u64..addresses.end.div_ceil(PAGE_SIZE as u64)
}

/// The source `pages` pages further on in its chunk.
fn skip(source: Source, pages: u64) -> Source {
    match source {
        Source::Zero => Source::Zero,
        Source::Chunk { pack, chunk, page } => Source::Chunk { pack, chunk, page: page + pages as u16 },
    }
}

impl Todo {
    /// Everything that a page map has.
    pub(super) fn new(map: &[PageRun]) -> Self {
        let stored = map.iter().filter(|run| run.source() != Source::Zero);
        // In order, and at once: far faster than one after the other.
        Self(stored.map(|run| (run.page.get(), (run.count.get(), run.source()))).collect())
    }

    /// Only what lies in these ranges of addresses, which ascend.
    pub(super) fn within(mut self, ranges: &[(u64, u64)]) -> Self {
        let mut at = 0;
        for &(start, end) in ranges {
            let wanted = pages(start..end);
            self.remove(at..wanted.start);
            at = wanted.end;
        }
        self.remove(at..u64::MAX);
        self
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The run that has this page.
    pub(super) fn find(&self, page: u64) -> Option<PageRun> {
        let (first, (count, source)) = self.0.range(..=page).next_back()?;
        (page < first + u64::from(*count)).then(|| PageRun::new(*first, *count, *source))
    }

    /// The first runs, of up to so many pages but one run at least.
    pub(super) fn first(&self, most: u64) -> Vec<PageRun> {
        let mut all = 0;
        let runs = self.0.iter().take_while(|(_, (count, _))| {
            let taken = all == 0 || all + u64::from(*count) <= most;
            all += u64::from(*count);
            taken
        });
        runs.map(|(page, (count, source))| PageRun::new(*page, *count, *source)).collect()
    }

    /// Takes pages out.
    pub(super) fn remove(&mut self, range: Range<u64>) -> Vec<PageRun> {
        let mut removed = Vec::new();
        if range.is_empty() {
            return removed;
        }
        let first = self.find(range.start).map_or(range.start, |run| run.page.get());
        let within: Vec<_> = self.0.range(first..range.end).map(|(page, run)| (*page, *run)).collect();
        for (page, (count, source)) in within {
            self.0.remove(&page);
            let end = page + u64::from(count);
            let (from, to) = (page.max(range.start), end.min(range.end));
            if page < from {
                self.0.insert(page, ((from - page) as u32, source));
            }
            if to < end {
                self.0.insert(to, ((end - to) as u32, skip(source, to - page)));
            }
            removed.push(PageRun::new(from, (to - from) as u32, skip(source, from - page)));
        }
        removed
    }

    /// Pages have moved; what was at their new place is gone.
    pub(super) fn shift(&mut self, from: Range<u64>, to: u64) {
        let moved = self.remove(from.clone());
        self.remove(to..to + (from.end - from.start));
        for run in moved {
            self.0.insert(to + (run.page.get() - from.start), (run.count.get(), run.source()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model(todo: &Todo) -> BTreeMap<u64, Source> {
        let runs = todo.0.iter().flat_map(|(page, (count, source))| {
            (0..u64::from(*count)).map(move |n| (page + n, skip(*source, n)))
        });
        runs.collect()
    }

    proptest! {
        /// Against a model with one entry per page.
        #[test]
        fn pages_go_and_move(
            runs in proptest::collection::vec((0u64..4, 1u32..9, 0u32..20), 1..12),
            steps in proptest::collection::vec((any::<bool>(), 0u64..70, 0u64..30, 0u64..70), 0..12),
        ) {
            let (mut page, mut map) = (0, Vec::new());
            for (gap, count, chunk) in runs {
                let source =
                    if chunk == 0 { Source::Zero } else { Source::Chunk { pack: 0, chunk, page: 3 } };
                map.push(PageRun::new(page + gap, count, source));
                page += gap + u64::from(count);
            }
            let size = PAGE_SIZE as u64;
            let mut todo = Todo::new(&map).within(&[(2 * size, 20 * size), (30 * size, 100 * size)]);
            let mut expected: BTreeMap<u64, Source> = map.iter()
                .filter(|run| run.source() != Source::Zero)
                .flat_map(|run| (run.page.get()..run.end()).map(|p| (p, skip(run.source(), p - run.page.get()))))
                .filter(|(page, _)| (2..20).contains(page) || (30..100).contains(page))
                .collect();
            prop_assert_eq!(model(&todo), expected.clone());
            for (remove, at, count, to) in steps {
                if remove {
                    let removed = todo.remove(at..at + count);
                    let pages: u32 = removed.iter().map(|run| run.count.get()).sum();
                    let before = expected.len();
                    expected.retain(|page, _| !(at..at + count).contains(page));
                    prop_assert_eq!(pages as usize, before - expected.len());
                } else if to + count <= at || at + count <= to {
                    todo.shift(at..at + count, to);
                    let moved: Vec<_> =
                        (at..at + count).filter_map(|p| Some((p - at + to, expected.remove(&p)?))).collect();
                    expected.retain(|page, _| !(to..to + count).contains(page));
                    expected.extend(moved);
                }
                prop_assert_eq!(model(&todo), expected.clone());
                for page in 0..100 {
                    let found = todo.find(page).map(|run| skip(run.source(), page - run.page.get()));
                    prop_assert_eq!(found, expected.get(&page).copied());
                }
            }
            let first: u64 = todo.first(10).iter().map(|run| u64::from(run.count.get())).sum();
            prop_assert!(first <= 16 && (first > 0) != todo.is_empty());
        }
    }
}
