//! Sets of pages, as sorted ranges of page numbers.

use ckpt_common::image::PAGE_SIZE;
use std::ops::Range;

/// A set of pages. A page number is an address divided by the page size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    /// Ascending, not empty, and with a gap between any two.
    ranges: Vec<Range<u64>>,
}

impl PageSet {
    /// Adds a range that begins not before the last one.
    pub fn push(&mut self, range: Range<u64>) {
        match self.ranges.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => self.ranges.push(range),
        }
    }

    /// Adds a range of addresses, behind those before.
    pub fn push_addresses(&mut self, start: u64, end: u64) {
        self.push(start / PAGE_SIZE as u64..end.div_ceil(PAGE_SIZE as u64));
    }

    /// Its ranges in ascending order.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// Its ranges as addresses.
    pub fn addresses(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let size = PAGE_SIZE as u64;
        self.ranges.iter().map(move |range| (range.start * size, range.end * size))
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// Size of the pages in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE as u64
    }

    /// Cut into pieces of at most so many bytes, but of a page at least.
    pub fn pieces(&self, most: u64) -> Vec<Self> {
        let most = (most / PAGE_SIZE as u64).max(1);
        let mut pieces = Vec::new();
        let (mut piece, mut room) = (Self::default(), most);
        for range in &self.ranges {
            let mut at = range.start;
            while at < range.end {
                let n = room.min(range.end - at);
                piece.push(at..at + n);
                (at, room) = (at + n, room - n);
                if room == 0 {
                    pieces.push(std::mem::take(&mut piece));
                    room = most;
                }
            }
        }
        pieces.extend(Some(piece).filter(|piece| !piece.is_empty()));
        pieces
    }

    /// No page at all?
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Is this page in it?
    pub fn contains(&self, page: u64) -> bool {
        let at = self.ranges.partition_point(|range| range.end <= page);
        self.ranges.get(at).is_some_and(|range| range.start <= page)
    }

    /// Pages in either.
    pub fn union(&self, other: &Self) -> Self {
        match (self.is_empty(), other.is_empty()) {
            (true, _) => other.clone(),
            (_, true) => self.clone(),
            _ => self.combine(other, |a, b| a || b),
        }
    }

    /// Pages in both.
    pub fn intersection(&self, other: &Self) -> Self {
        match self.is_empty() || other.is_empty() {
            true => Self::default(),
            false => self.combine(other, |a, b| a && b),
        }
    }

    /// Pages that are not in the other.
    pub fn difference(&self, other: &Self) -> Self {
        match other.is_empty() {
            true => self.clone(),
            false => self.combine(other, |a, b| a && !b),
        }
    }

    /// The part in a range.
    pub fn within(&self, range: Range<u64>) -> Self {
        let mut within = Self::default();
        self.parts(range).for_each(|part| within.push(part));
        within
    }

    /// The parts in a range, in ascending order.
    pub fn parts(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let from = self.ranges.partition_point(|r| r.end <= range.start);
        let inside = self.ranges[from..].iter().take_while(move |r| r.start < range.end);
        inside.map(move |r| r.start.max(range.start)..r.end.min(range.end))
    }

    /// Walks along the borders of both, from front to back: `keep` says what belongs to the result.
    fn combine(&self, other: &Self, keep: impl Fn(bool, bool) -> bool) -> Self {
        let mut result = Self::default();
        let (mut a, mut b) = (Borders::of(self), Borders::of(other));
        let mut at = 0;
        while let Some(next) = [a.next(), b.next()].into_iter().flatten().min() {
            if keep(a.inside, b.inside) {
                result.push(at..next);
            }
            a.cross(next);
            b.cross(next);
            at = next;
        }
        result
    }
}

/// The borders of a set in ascending order.
struct Borders<'a> {
    ranges: std::slice::Iter<'a, Range<u64>>,
    now: Option<&'a Range<u64>>,
    inside: bool,
}

impl<'a> Borders<'a> {
    fn of(set: &'a PageSet) -> Self {
        let mut ranges = set.ranges.iter();
        Self { now: ranges.next(), ranges, inside: false }
    }

    fn next(&self) -> Option<u64> {
        self.now.map(|range| if self.inside { range.end } else { range.start })
    }

    fn cross(&mut self, border: u64) {
        if self.next() == Some(border) {
            if self.inside {
                self.now = self.ranges.next();
            }
            self.inside = !self.inside;
        }
    }
}

impl FromIterator<Range<u64>> for PageSet {
    /// Ranges in any order, overlapping or not.
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut ranges: Vec<_> = ranges.into_iter().collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let mut set = Self::default();
        ranges.into_iter().for_each(|range| set.push(range));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn pages(set: &PageSet) -> BTreeSet<u64> {
        set.ranges().iter().cloned().flatten().collect()
    }

    fn any_set() -> impl Strategy<Value = PageSet> {
        proptest::collection::vec((0_u64..200, 0_u64..12), 0..30)
            .prop_map(|ranges| ranges.into_iter().map(|(start, len)| start..start + len).collect())
    }

    proptest! {
        #[test]
        fn like_sets_of_numbers(a in any_set(), b in any_set(), from in 0_u64..220, len in 0_u64..80) {
            let (x, y) = (pages(&a), pages(&b));
            prop_assert_eq!(pages(&a.union(&b)), &x | &y);
            prop_assert_eq!(pages(&a.intersection(&b)), &x & &y);
            prop_assert_eq!(pages(&a.difference(&b)), &x - &y);
            let within: BTreeSet<u64> = x.range(from..from + len).copied().collect();
            prop_assert_eq!(pages(&a.within(from..from + len)), within);
            prop_assert_eq!(a.pages(), x.len() as u64);
            prop_assert_eq!(a.contains(from), x.contains(&from));
            let pieces = a.pieces((len + 1) * PAGE_SIZE as u64);
            let full = pieces.iter().filter(|piece| piece.pages() == len + 1).count();
            prop_assert!(pieces.len() - full <= 1 && pieces.iter().all(|piece| (1..=len + 1).contains(&piece.pages())));
            prop_assert_eq!(pieces.iter().fold(PageSet::default(), |all, piece| all.union(piece)), a.clone());
            // One form for each set.
            prop_assert_eq!(a.union(&b), b.union(&a));
            prop_assert!(a.union(&b).ranges().windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
