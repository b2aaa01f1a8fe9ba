//! Huge pages where they were.
//!
//! Memory that had huge pages without having asked for them (`always`, khugepaged, `MADV_COLLAPSE`) would come back in
//! small ones. Advice given for the filling could not be taken back: there is none that says *as before*. But
//! `MADV_COLLAPSE` (Linux 6.1) makes a huge page out of one that is hardly there, and leaves no trace in the mapping; done
//! before the filling, it spares the 512 faults, too.

use super::layout::Layout;
use super::share::Range;
use crate::sys::vm_write;
use crate::tracee::{Batch, Stopped};
use anyhow::Result;
use ckpt_common::image::PAGE_SIZE;
use ckpt_common::image::pages::PageRun;
use ckpt_common::image::process::{AddressSpace, Backing};

/// Size of a huge page (x86-64).
const HUGE: u64 = 2 << 20;
const MADV_COLLAPSE: u64 = 25;

/// Ranges of whole huge pages all of whose pages are in the page map, in mappings that had huge pages.
fn ranges(space: &AddressSpace, pages: &[PageRun]) -> Vec<Range> {
    let mut ranges = Vec::new();
    let hinted = space.mappings.iter().filter(|m| {
        let writable = m.prot & libc::PROT_WRITE != 0;
        m.huge && writable && m.backing == Backing::Anonymous && !m.advice.contains(&libc::MADV_NOHUGEPAGE)
    });
    let size = PAGE_SIZE as u64;
    for mapping in hinted {
        let first = pages.partition_point(|run| run.end() * size <= mapping.start);
        let within = pages[first..].iter().take_while(|run| run.page.get() * size < mapping.end).peekable();
        let mut present: Option<Range> = None;
        let mut whole = |present: Range| {
            let start = present.start.max(mapping.start).next_multiple_of(HUGE);
            let end = present.end.min(mapping.end) / HUGE * HUGE;
            ranges.extend((start < end).then_some(start..end));
        };
        for run in within {
            let (start, end) = (run.page.get() * size, run.end() * size);
            match &mut present {
                Some(present) if present.end == start => present.end = end,
                _ => present.replace(start..end).into_iter().for_each(&mut whole),
            }
        }
        present.into_iter().for_each(&mut whole);
    }
    ranges
}

/// Makes huge pages ready for these pages of a stub, whose mappings are there and empty. Where the kernel has none to
/// spare, they come in small ones.
pub(super) fn prepare(
    leader: &mut Stopped,
    layout: Layout,
    space: &AddressSpace,
    pages: &[PageRun],
) -> Result<()> {
    let mut batch = Batch::new(layout.arena);
    for range in ranges(space, pages) {
        // What has no page at all is not collapsed.
        let firsts: Vec<(u64, &[u8])> =
            range.clone().step_by(HUGE as usize).map(|at| (at, &[0_u8][..])).collect();
        if vm_write::write_pieces(leader.pid, &firsts).is_ok() {
            let name = format!("making huge pages at {:x}-{:x}", range.start, range.end);
            batch.call(name, libc::SYS_madvise, &[range.start, range.end - range.start, MADV_COLLAPSE]);
            if !batch.fits(4096) {
                leader.run(std::mem::replace(&mut batch, Batch::new(layout.arena)), false)?;
            }
        }
    }
    if !batch.is_empty() {
        leader.run(batch, false)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_common::image::MemoryId;
    use ckpt_common::image::file::FileId;
    use ckpt_common::image::pages::Source;
    use ckpt_common::image::process::Mapping;

    #[test]
    fn only_what_was_whole_becomes_huge() {
        let page = PAGE_SIZE as u64;
        let (start, end) = (HUGE + 5 * page, 9 * HUGE);
        let mapping = |huge| Mapping {
            start,
            end,
            prot: 3,
            backing: Backing::Anonymous,
            flags: 0,
            advice: Vec::new(),
            locked: 0,
            huge,
        };
        let space = |huge| AddressSpace {
            memory: MemoryId(0),
            fields: [0; 11],
            auxv: Vec::new(),
            exe: FileId(0),
            mappings: vec![mapping(huge)],
            vdso: Vec::new(),
        };
        let run = |from: u64, to: u64| {
            let source = Source::Chunk { pack: 0, chunk: from as u32, page: 0 };
            PageRun::new(from / page, ((to - from) / page) as u32, source)
        };
        // All of the first four, with a seam; a page of the sixth is missing; the last reaches beyond the mapping.
        let pages = [
            run(start, 3 * HUGE),
            run(3 * HUGE, 5 * HUGE + page),
            run(6 * HUGE, 7 * HUGE - page),
            run(8 * HUGE, 10 * HUGE),
        ];
        assert_eq!(ranges(&space(true), &pages), [2 * HUGE..5 * HUGE, 8 * HUGE..9 * HUGE]);
        assert_eq!(ranges(&space(false), &pages), []);
    }
}
