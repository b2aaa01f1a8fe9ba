//! Of several copies of a page, the newest.

use ckpt_common::image::{MemoryId, PAGE_SIZE};
use std::collections::BinaryHeap;

/// A run of pages of an object, staged in an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) id: MemoryId,
    pub(super) first_page: u64,
    pub(super) arena: usize,
    /// Offset in the arena, in bytes.
    pub(super) start: usize,
    /// Length in bytes.
    pub(super) len: usize,
}

impl Run {
    fn end(&self) -> u64 {
        self.first_page + (self.len / PAGE_SIZE) as u64
    }

    /// The pages `from..to` of it.
    pub(super) fn clip(&self, from: u64, to: u64) -> Self {
        let skipped = (from - self.first_page) as usize * PAGE_SIZE;
        let len = (to - from) as usize * PAGE_SIZE;
        Self { first_page: from, start: self.start + skipped, len, ..*self }
    }
}

/// Puts runs in the order of objects and pages; where several have a page, only the last of them in `runs` keeps it.
pub(super) fn latest(runs: Vec<Run>) -> Vec<Run> {
    let mut sorted: Vec<(usize, Run)> = runs.into_iter().enumerate().collect();
    sorted.sort_by_key(|(_, run)| (run.id, run.first_page));
    let mut result = Vec::with_capacity(sorted.len());
    let mut rest = sorted.into_iter().peekable();
    // Runs that have begun, the newest on top.
    let mut begun: BinaryHeap<Begun> = BinaryHeap::new();
    let mut at = 0;
    loop {
        while begun.peek().is_some_and(|top| top.run.end() <= at) {
            begun.pop();
        }
        let Some(top) = begun.peek() else {
            let Some((age, run)) = rest.next() else { return result };
            at = run.first_page;
            begun.push(Begun { age, run });
            continue;
        };
        // The next run of the same object begins, or the newest ends.
        let next = rest.peek().filter(|(_, run)| run.id == top.run.id && run.first_page < top.run.end());
        let until = next.map_or(top.run.end(), |(_, run)| run.first_page);
        if until > at {
            result.push(top.run.clip(at, until));
            at = until;
        }
        if next.is_some()
            && let Some((age, run)) = rest.next()
        {
            begun.push(Begun { age, run });
        }
    }
}

/// Ordered by age.
struct Begun {
    age: usize,
    run: Run,
}

impl PartialEq for Begun {
    fn eq(&self, other: &Self) -> bool {
        self.age == other.age
    }
}

impl Eq for Begun {}

impl PartialOrd for Begun {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Begun {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.age.cmp(&other.age)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn the_last_copy_of_each_page_is_kept(
            list in proptest::collection::vec((0_u32..3, 0_u64..60, 1_usize..15), 0..40),
        ) {
            let mut start = 0;
            let runs: Vec<Run> = list.iter().map(|(id, first_page, pages)| {
                let len = pages * PAGE_SIZE;
                start += len;
                Run { id: MemoryId(*id), first_page: *first_page, arena: 0, start: start - len, len }
            }).collect();
            let pages = |run: &Run| {
                let (id, first, start) = (run.id, run.first_page, run.start);
                (0..run.len / PAGE_SIZE).map(move |i| ((id, first + i as u64), start + i * PAGE_SIZE))
            };
            let expected: BTreeMap<_, _> = runs.iter().flat_map(pages).collect();
            let got: Vec<_> = latest(runs).iter().flat_map(pages).collect();
            prop_assert_eq!(got, expected.into_iter().collect::<Vec<_>>());
        }
    }
}
