//! Too many packs: what an increment takes over from old ones that are almost empty.
//!
//! Each increment makes a pack, and pages that are not modified again keep it alive. A checkpoint
//! that points into thousands of packs would be slow to restore. So beyond some number of packs
//! the emptiest are left behind: their last pages are written anew.

use super::{PartReader, Result};
use std::collections::BTreeSet;

/// Bytes that one increment writes anew at most, as they are stored: it must stay cheap.
const BUDGET: u64 = 64 << 20;

/// Packs of a base (by number) that are to be left behind, so that no more than `most` remain.
pub(super) fn crowded(base: &PartReader, most: usize) -> Result<BTreeSet<u32>> {
    let excess = base.packs().len().saturating_sub(most);
    if excess == 0 {
        return Ok(BTreeSet::new());
    }
    let live = base.live_chunks()?;
    let mut sizes = Vec::new();
    for (number, pack) in (0..).zip(base.packs()) {
        let Some(live) = live.get(pack) else { continue };
        let reader = base.store().open_pack(*pack)?;
        let chunks = (0..).zip(reader.chunks()?).filter(|(chunk, _)| live.contains(*chunk));
        sizes.push((chunks.map(|(_, chunk)| chunk.stored() as u64).sum::<u64>(), number));
    }
    sizes.sort_unstable();
    let mut left = BUDGET;
    let affordable = sizes.into_iter().take(excess).take_while(|(size, _)| {
        let fits = *size <= left;
        left = left.saturating_sub(*size);
        fits
    });
    Ok(affordable.map(|(_, number)| number).collect())
}
