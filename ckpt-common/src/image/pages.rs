//! Page maps: which page of a memory object lies where.
//!
//! A page map is complete: it names every page that was present at the cut, whatever checkpoint
//! stored it, so a reader follows no chain. A page that is not named was not present; a page that
//! was present and full of zeros is in a *zero run* and stored nowhere.

use super::{FormatError, PAGE_SIZE, pack};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

const WHAT: &str = "page map";

/// First page number that cannot exist (64-bit byte addresses).
pub const PAGE_LIMIT: u64 = 1 << 52;

/// `pack` of a zero run.
pub const ZERO_PACK: u32 = u32::MAX;

/// One run of neighbouring pages, as stored: 24 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct PageRun {
    /// First page: address or offset in bytes, divided by the page size.
    pub page: U64,
    /// Number of pages; at least one.
    pub count: U32,
    /// Index into the part's list of packs, or [`ZERO_PACK`].
    pub pack: U32,
    /// Chunk in the pack; 0 in a zero run.
    pub chunk: U32,
    /// First page in the chunk; 0 in a zero run.
    pub page_in_chunk: U16,
    /// Zero.
    pub reserved: U16,
}

/// Where a run's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Present and full of zeros.
    Zero,
    /// Stored in a chunk.
    Chunk {
        /// Index into the part's list of packs.
        pack: u32,
        /// Chunk in the pack.
        chunk: u32,
        /// First page in the chunk.
        page: u16,
    },
}

impl PageRun {
    /// A run of `count` pages from page number `page`.
    pub fn new(page: u64, count: u32, source: Source) -> Self {
        let (pack, chunk, page_in_chunk) = match source {
            Source::Zero => (ZERO_PACK, 0, 0),
            Source::Chunk { pack, chunk, page } => (pack, chunk, page),
        };
        Self {
            page: page.into(),
            count: count.into(),
            pack: pack.into(),
            chunk: chunk.into(),
            page_in_chunk: page_in_chunk.into(),
            reserved: 0.into(),
        }
    }

    /// Where its content is.
    pub fn source(&self) -> Source {
        match self.pack.get() {
            ZERO_PACK => Source::Zero,
            pack => Source::Chunk { pack, chunk: self.chunk.get(), page: self.page_in_chunk.get() },
        }
    }

    /// First page number behind the run.
    pub fn end(&self) -> u64 {
        self.page.get().saturating_add(self.count.get().into())
    }
}

/// The runs of a sorted page map that cover pages `from..to`, cut to that range.
pub fn slice(runs: &[PageRun], from: u64, to: u64) -> impl Iterator<Item = PageRun> + '_ {
    let first = runs.partition_point(|run| run.end() <= from);
    let runs = runs[first..].iter().take_while(move |run| run.page.get() < to);
    runs.filter(move |_| from < to).map(move |run| {
        let (start, end) = (run.page.get().max(from), run.end().min(to));
        let source = match run.source() {
            Source::Zero => Source::Zero,
            Source::Chunk { pack, chunk, page } => {
                Source::Chunk { pack, chunk, page: page + (start - run.page.get()) as u16 }
            }
        };
        PageRun::new(start, (end - start) as u32, source)
    })
}

/// A page map in the making: runs in ascending order, neighbours joined.
#[derive(Clone, Debug, Default)]
pub struct PageMapBuilder {
    runs: Vec<PageRun>,
}

impl PageMapBuilder {
    /// Appends `count` pages.
    ///
    /// # Errors
    /// [`FormatError::TooLarge`] if the pages are not behind those already there, or beyond
    /// [`PAGE_LIMIT`]: an error of the caller.
    pub fn push(&mut self, page: u64, count: u32, source: Source) -> Result<(), FormatError> {
        let start = self.runs.last().map_or(0, PageRun::end);
        let end = page.checked_add(count.into()).filter(|&end| end <= PAGE_LIMIT);
        if count == 0 || page < start || end.is_none() {
            let why = format!("{count} pages at {page:#x} do not follow page {start:#x}");
            return Err(FormatError::TooLarge { what: WHAT, why });
        }
        if let Some(last) = self.runs.last_mut().filter(|last| last.end() == page) {
            let joined = last.count.get().checked_add(count);
            let follows = match (last.source(), source) {
                (Source::Zero, Source::Zero) => true,
                (Source::Chunk { pack, chunk, page }, Source::Chunk { pack: p, chunk: c, page: q }) => {
                    (pack, chunk) == (p, c) && u32::from(page) + last.count.get() == u32::from(q)
                }
                _ => false,
            };
            if let (true, Some(joined)) = (follows, joined) {
                last.count = joined.into();
                return Ok(());
            }
        }
        self.runs.push(PageRun::new(page, count, source));
        Ok(())
    }

    /// The runs as stored.
    pub fn as_bytes(&self) -> &[u8] {
        self.runs.as_bytes()
    }
}

/// Looks at a stored page map.
///
/// Checked here: the runs ascend, do not overlap, stay below [`PAGE_LIMIT`], name one of `packs`
/// packs and fit a chunk. Whether the chunk exists only the pack can tell.
pub fn parse(bytes: &[u8], packs: usize) -> Result<&[PageRun], FormatError> {
    let runs = <[PageRun]>::ref_from_bytes(bytes)
        .map_err(|_| FormatError::damaged(WHAT, format!("{} bytes are not whole entries", bytes.len())))?;
    let mut start = 0;
    for (index, run) in runs.iter().enumerate() {
        let bad = |why: &str| FormatError::damaged(WHAT, format!("entry {index}: {why}"));
        if run.count.get() == 0 || run.page.get() < start || run.end() > PAGE_LIMIT {
            return Err(bad("pages do not ascend or are out of range"));
        }
        if run.reserved.get() != 0 {
            return Err(bad("reserved field is set"));
        }
        start = run.end();
        match run.source() {
            Source::Zero if run.chunk.get() != 0 || run.page_in_chunk.get() != 0 => {
                return Err(bad("zero run with a place"));
            }
            Source::Zero => {}
            Source::Chunk { pack, .. } if pack as usize >= packs => {
                return Err(bad(&format!("pack {pack} of {packs}")));
            }
            Source::Chunk { page, .. } => {
                let end = u64::from(page) + u64::from(run.count.get());
                if end > (pack::CHUNK_SIZE / PAGE_SIZE) as u64 {
                    return Err(bad("reaches behind the end of a chunk"));
                }
            }
        }
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn neighbours_are_joined() {
        let mut map = PageMapBuilder::default();
        map.push(4, 1, Source::Zero).unwrap();
        map.push(5, 3, Source::Zero).unwrap();
        map.push(8, 1, Source::Chunk { pack: 0, chunk: 2, page: 0 }).unwrap();
        map.push(9, 1, Source::Chunk { pack: 0, chunk: 2, page: 1 }).unwrap();
        map.push(10, 1, Source::Chunk { pack: 0, chunk: 3, page: 0 }).unwrap();
        map.push(20, 1, Source::Chunk { pack: 0, chunk: 3, page: 1 }).unwrap();
        let runs: Vec<_> =
            parse(map.as_bytes(), 1).unwrap().iter().map(|r| (r.page.get(), r.count.get())).collect();
        assert_eq!(runs, [(4, 4), (8, 2), (10, 1), (20, 1)]);
        assert!(map.push(20, 1, Source::Zero).is_err());
        assert!(parse(map.as_bytes(), 0).is_err());
    }

    #[test]
    fn contradictions_are_damage() {
        let chunk = |page| Source::Chunk { pack: 0, chunk: 0, page };
        let cases = [
            vec![PageRun::new(1, 0, Source::Zero)],
            vec![PageRun::new(5, 2, Source::Zero), PageRun::new(6, 1, Source::Zero)],
            vec![PageRun::new(PAGE_LIMIT, 1, Source::Zero)],
            vec![PageRun::new(0, 2, chunk(15))],
            vec![PageRun::new(0, 17, chunk(0))],
            vec![PageRun::new(u64::MAX, 2, Source::Zero)],
        ];
        for runs in cases {
            assert!(parse(runs.as_bytes(), 1).is_err(), "{runs:?}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..240)) {
            let _ = parse(&bytes, 3);
        }

        #[test]
        fn a_slice_has_the_pages_of_its_range_and_no_others(
            runs in proptest::collection::vec((0u64..5, 1u32..16, any::<bool>(), 0u32..9), 0..30),
            from in 0u64..300, to in 0u64..300,
        ) {
            let (mut all, mut page) = (Vec::new(), 0);
            for (gap, count, zero, chunk) in runs {
                page += gap;
                let source = if zero { Source::Zero } else { Source::Chunk { pack: 1, chunk, page: 1 } };
                all.push(PageRun::new(page, count, source));
                page += u64::from(count);
            }
            let pages = |runs: &[PageRun]| -> Vec<(u64, Source)> {
                let pages = runs.iter().flat_map(|run| (0..run.count.get()).map(|n| {
                    let source = match run.source() {
                        Source::Zero => Source::Zero,
                        Source::Chunk { pack, chunk, page } => Source::Chunk { pack, chunk, page: page + n as u16 },
                    };
                    (run.page.get() + u64::from(n), source)
                }));
                pages.collect()
            };
            let wanted: Vec<_> =
                pages(&all).into_iter().filter(|(page, _)| (from..to).contains(page)).collect();
            let slice: Vec<_> = slice(&all, from, to).collect();
            prop_assert_eq!(pages(&slice), wanted);
            prop_assert!(parse(slice.as_bytes(), 2).is_ok());
        }

        #[test]
        fn any_ascending_runs_round_trip(
            runs in proptest::collection::vec((0u64..50, 1u32..17, any::<bool>(), 0u32..9), 0..60),
        ) {
            let (mut map, mut page, mut pages) = (PageMapBuilder::default(), 0, Vec::new());
            for (gap, count, zero, chunk) in runs {
                page += gap;
                let source = if zero { Source::Zero } else { Source::Chunk { pack: 1, chunk, page: 0 } };
                map.push(page, count, source).unwrap();
                pages.extend((page..page + u64::from(count)).map(|page| (page, zero)));
                page += u64::from(count);
            }
            let back: Vec<_> = parse(map.as_bytes(), 2).unwrap().iter()
                .flat_map(|run| (run.page.get()..run.end()).map(|page| (page, run.source() == Source::Zero)))
                .collect();
            prop_assert_eq!(back, pages);
        }
    }
}
