//! Mappings of io_uring instances, at their places.
//!
//! The kernel chooses the address of such a mapping itself: mmap(2) with an address and mremap(2) give EINVAL
//! (`io_uring_get_unmapped_area`). So everything else that is free is taken for a moment, and one place is left.

use super::seed::Inheritance;
use crate::tracee::{Batch, Stopped, proc};
use anyhow::{Context as _, Result, ensure};
use ckpt_common::image::process::Mapping;
use std::ops::Range;

/// Where a process can have mappings: from `vm.mmap_min_addr` to the end of what mmap(2) gives unasked.
const SPACE: Range<u64> = 0x1_0000..0x7fff_ffff_f000;

/// Maps `number` from `offset` on, where `mapping` was.
pub(super) fn place(
    leader: &mut Stopped,
    mapping: &Mapping,
    number: u64,
    offset: u64,
    inheritance: &Inheritance,
) -> Result<()> {
    let wanted = mapping.start..mapping.end;
    let maps = proc::maps(leader.pid).context("reading the mappings")?;
    let taken = maps.iter().map(|map| map.start..map.end);
    let fillers = gaps(taken, &wanted);
    let mut batch = Batch::new(inheritance.layout.arena);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    for gap in &fillers {
        let args = [gap.start, gap.end - gap.start, libc::PROT_NONE as u64, flags as u64, u64::MAX, 0];
        batch.call(format!("taking {:x}-{:x} for a moment", gap.start, gap.end), libc::SYS_mmap, &args);
        leader.flush(&mut batch)?;
    }
    let (size, prot, flags) = (wanted.end - wanted.start, mapping.prot as u64, libc::MAP_SHARED as u64);
    let name = format!("mapping an io_uring at {:x}-{:x}", wanted.start, wanted.end);
    let call = {
        leader.run(batch, false)?.all_ok()?;
        batch = Batch::new(inheritance.layout.arena);
        batch.call(name, libc::SYS_mmap, &[0, size, prot, flags, number, offset])
    };
    let at = leader.run(batch, false)?.result(call)? as u64;
    ensure!(at == wanted.start, "an io_uring was mapped at {at:x} instead of {:x}", wanted.start);
    batch = Batch::new(inheritance.layout.arena);
    for gap in &fillers {
        let name = format!("giving back {:x}-{:x}", gap.start, gap.end);
        batch.call(name, libc::SYS_munmap, &[gap.start, gap.end - gap.start]);
        leader.flush(&mut batch)?;
    }
    Ok(leader.run(batch, false)?.all_ok()?)
}

/// What is free, but for `wanted`, and large enough for it. `taken` is in ascending order.
fn gaps(taken: impl Iterator<Item = Range<u64>>, wanted: &Range<u64>) -> Vec<Range<u64>> {
    let mut gaps = Vec::new();
    let mut at = SPACE.start;
    let end = std::iter::once(SPACE.end..u64::MAX);
    for next in taken.filter(|range| range.start < SPACE.end).chain(end) {
        for gap in [at..next.start.min(wanted.start), at.max(wanted.end)..next.start] {
            if gap.start < gap.end && gap.end - gap.start >= wanted.end - wanted.start {
                gaps.push(gap);
            }
        }
        at = at.max(next.end);
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn one_place_is_left(pages in proptest::collection::btree_set(1_u64..60, 0..20), at in 1_u64..60, size in 1_u64..4) {
            let address = |page: u64| SPACE.start + (page - 1) * 4096;
            let wanted = address(at)..address(at + size);
            let taken: Vec<_> = pages.iter().map(|page| address(*page)..address(page + 1)).collect();
            prop_assume!(taken.iter().all(|t| t.end <= wanted.start || t.start >= wanted.end));
            let gaps = gaps(taken.iter().cloned(), &wanted);
            // With what is taken and the place, only pieces that are too small are left.
            let mut all: Vec<_> = taken.iter().chain(&gaps).chain([&wanted]).cloned().collect();
            all.sort_by_key(|range| range.start);
            let mut last = SPACE.start;
            for range in all {
                prop_assert!(range.start >= last, "overlap");
                prop_assert!(range.start - last < size * 4096);
                last = range.end;
            }
            prop_assert!(SPACE.end - last < size * 4096);
        }
    }
}
