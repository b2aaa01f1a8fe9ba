//! What differs between two page maps.

use super::{
    PartReader, Result,
    known::content,
    live::LiveChunks,
    page_reader::{PageReader, Place},
};
use ckpt_common::image::{
    MemoryId, PAGE_SIZE,
    pages::{PageRun, Source},
};

static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Numbers of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageDiff {
    /// Only the second has them.
    pub added: u64,
    /// Only the first has them.
    pub removed: u64,
    /// Both have them, with different content.
    pub changed: u64,
    /// Both have them, with the same content.
    pub same: u64,
}

/// A memory object of a part.
pub type Object<'a> = (&'a PartReader, MemoryId);

/// Compares the pages of a memory object with those of another, or with none. Content is read only
/// where both are not in the same place.
pub fn compare_pages(old: Option<Object<'_>>, new: Option<Object<'_>>) -> Result<PageDiff> {
    let mut diff = PageDiff::default();
    let ((old, old_id), (new, new_id)) = match (old, new) {
        (Some(old), Some(new)) => (old, new),
        (old, new) => {
            diff.removed = old.map_or(Ok(0), count)?;
            diff.added = new.map_or(Ok(0), count)?;
            return Ok(diff);
        }
    };
    let (old_map, new_map) = (old.page_map(old_id)?, new.page_map(new_id)?);
    let (mut old_side, mut new_side) = (PageReader::new(old.clone())?, PageReader::new(new.clone())?);
    let (mut old_runs, mut new_runs) = (old_map.iter().peekable(), new_map.iter().peekable());
    let mut at = 0;
    loop {
        while old_runs.next_if(|run| run.end() <= at).is_some() {}
        while new_runs.next_if(|run| run.end() <= at).is_some() {}
        // Up to the next place where either map has something else.
        let next = |run: Option<&&PageRun>| {
            run.map_or((u64::MAX, None), |run| match run.page.get() {
                page if page > at => (page, None),
                _ => (run.end(), Some(**run)),
            })
        };
        let ((old_end, old), (new_end, new)) = (next(old_runs.peek()), next(new_runs.peek()));
        let end = old_end.min(new_end);
        match (old, new) {
            (None, None) if end == u64::MAX => return Ok(diff),
            (None, None) => {}
            (Some(_), None) => diff.removed += end - at,
            (None, Some(_)) => diff.added += end - at,
            (Some(old), Some(new)) => {
                for page in at..end {
                    let [old, new] = [&old, &new].map(|run| place_of(run, page));
                    match same(&mut old_side, old, &mut new_side, new)? {
                        true => diff.same += 1,
                        false => diff.changed += 1,
                    }
                }
            }
        }
        at = end;
    }
}

fn count((part, id): Object<'_>) -> Result<u64> {
    Ok(part.page_map(id)?.iter().map(|run| u64::from(run.count.get())).sum())
}

/// Bytes of the chunks that the second parts use and the first do not, as they are stored.
pub fn stored_anew(old: &[&PartReader], new: &[&PartReader]) -> Result<u64> {
    let live = |parts: &[&PartReader]| -> Result<LiveChunks> {
        let mut all = LiveChunks::new();
        for part in parts {
            for (pack, chunks) in part.live_chunks()? {
                all.entry(pack).or_default().add_all(&chunks);
            }
        }
        Ok(all)
    };
    let (old, mut bytes) = (live(old)?, 0);
    for (pack, chunks) in live(new)? {
        let Some(part) = new.first() else { break };
        let reader = part.store().open_pack(pack)?;
        let old = old.get(&pack);
        let anew = |number| chunks.contains(number) && !old.is_some_and(|old| old.contains(number));
        let anew = (0..).zip(reader.chunks()?).filter(|(number, _)| anew(*number));
        bytes += anew.map(|(_, chunk)| chunk.stored() as u64).sum::<u64>();
    }
    Ok(bytes)
}

/// Where a page is; nowhere if it is full of zeros.
fn place_of(run: &PageRun, number: u64) -> Option<Place> {
    match run.source() {
        Source::Zero => None,
        Source::Chunk { pack, chunk, page } => Some((pack, chunk, page + (number - run.page.get()) as u16)),
    }
}

fn same(old: &mut PageReader, a: Option<Place>, new: &mut PageReader, b: Option<Place>) -> Result<bool> {
    match (a, b) {
        (None, None) => Ok(true),
        (Some(a), None) => Ok(old.page(a)? == ZERO_PAGE),
        (None, Some(b)) => Ok(new.page(b)? == ZERO_PAGE),
        (Some(a), Some(b)) => {
            let (old_pack, new_pack) = (old.pack(a)?, new.pack(b)?);
            let (x, y) = (old_pack.chunk(a.1 as usize)?, new_pack.chunk(b.1 as usize)?);
            Ok((a.2 == b.2 && content(&x) == content(&y)) || old.page(a)? == new.page(b)?)
        }
    }
}
