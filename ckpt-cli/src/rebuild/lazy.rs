//! Which memory may come later, when the process runs already.

use ckpt_common::image::PAGE_SIZE;
use ckpt_common::image::pages::{PageRun, Source};
use ckpt_common::image::process::{Backing, Mapping, Process};
use std::collections::BTreeSet;

/// A process with less memory than this, in pages, gets it at once.
const LEAST: u64 = 256;

/// Ranges of addresses whose pages may follow: private anonymous memory that is not locked. (A private page of a file
/// cannot be missing for userfaultfd: the file's is there.)
///
/// Nor what is `pinned`: the kernel takes the pages that are there.
pub(super) fn ranges(process: &Process, pages: &[PageRun], pinned: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let (mut ranges, mut all) = (Vec::new(), 0);
    let may_follow = |m: &&Mapping| {
        let is_pinned = pinned.iter().any(|(start, end)| *start < m.end && *end > m.start);
        m.backing == Backing::Anonymous && m.locked == 0 && !is_pinned
    };
    for mapping in process.mm.mappings.iter().filter(may_follow) {
        let (start, end) = (mapping.start / PAGE_SIZE as u64, mapping.end / PAGE_SIZE as u64);
        let first = pages.partition_point(|run| run.end() <= start);
        let within = pages[first..].iter().take_while(|run| run.page.get() < end);
        let stored = within.filter(|run| run.source() != Source::Zero);
        let count: u64 = stored.map(|run| run.end().min(end) - run.page.get().max(start)).sum();
        if count > 0 {
            ranges.push((mapping.start, mapping.end));
            all += count;
        }
    }
    if all < LEAST { Vec::new() } else { ranges }
}

/// What cannot follow: pages outside of the ranges, and those that the kernel itself writes to when a thread begins to
/// run, which are the areas of restartable sequences.
pub(super) fn at_once(process: &Process, pages: &[PageRun], ranges: &[(u64, u64)]) -> Vec<PageRun> {
    let rseq = process.threads.iter().filter_map(|thread| thread.rseq);
    let needed: BTreeSet<u64> = rseq
        .flat_map(|rseq| {
            let end = rseq.address.saturating_add(u64::from(rseq.length).max(1));
            rseq.address / PAGE_SIZE as u64..end.div_ceil(PAGE_SIZE as u64)
        })
        .collect();
    let mut now = Vec::new();
    for run in pages {
        let mut page = run.page.get();
        while page < run.end() {
            let lazy = ranges.iter().find(|(_, end)| page < end / PAGE_SIZE as u64);
            let (start, end) = lazy.map_or((u64::MAX, u64::MAX), |(start, end)| {
                (start / PAGE_SIZE as u64, end / PAGE_SIZE as u64)
            });
            let until = run.end().min(if page < start { start } else { end });
            if page < start {
                push(&mut now, run, page, until);
            } else {
                needed.range(page..until).for_each(|needed| push(&mut now, run, *needed, needed + 1));
            }
            page = until;
        }
    }
    now
}

/// Appends a part of a run.
fn push(runs: &mut Vec<PageRun>, run: &PageRun, from: u64, to: u64) {
    let source = match run.source() {
        Source::Zero => Source::Zero,
        Source::Chunk { pack, chunk, page } => {
            Source::Chunk { pack, chunk, page: page + (from - run.page.get()) as u16 }
        }
    };
    runs.push(PageRun::new(from, (to - from) as u32, source));
}
