//! Where in the address space ckpt can work while the job's own mappings come into being.

use crate::tracee::{Arena, proc};
use anyhow::{Context as _, Result};
use ckpt_common::image::process::Process;

/// Room for the kernel's mappings (vdso, vvar) while they are parked, in bytes.
const PARKING: u64 = 1 << 20;
/// Lowest and highest address that is considered.
const LOWEST: u64 = 1 << 20;
const HIGHEST: u64 = 0x7fff_0000_0000;

/// A range that no process of the job uses, and neither do we.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// For the batches.
    pub(super) arena: Arena,
    /// For the kernel's mappings.
    pub(super) parking: u64,
}

impl Layout {
    /// Finds the range.
    pub(super) fn choose(processes: &[Process]) -> Result<Self> {
        let own = proc::maps(std::process::id() as i32).context("reading our own mappings")?;
        let mut used: Vec<(u64, u64)> = own.iter().map(|m| (m.start, m.end)).collect();
        used.extend(processes.iter().flat_map(|p| p.mm.mappings.iter().map(|m| (m.start, m.end))));
        let start =
            hole(used, Arena::LARGE + PARKING).context("no address range is free in every process")?;
        Ok(Self { arena: Arena { base: start, len: Arena::LARGE }, parking: start + Arena::LARGE })
    }

    /// First and last address.
    pub(super) fn range(self) -> (u64, u64) {
        (self.arena.base, self.parking + PARKING)
    }
}

/// The lowest free range of this size with a distance of its size to what is used: stacks grow downwards.
fn hole(mut used: Vec<(u64, u64)>, size: u64) -> Option<u64> {
    used.sort_unstable();
    let mut at = LOWEST;
    for (start, end) in used {
        if start >= at + 3 * size {
            return Some(at + size);
        }
        at = at.max(end);
    }
    (HIGHEST >= at + 3 * size).then_some(at + size)
}

#[cfg(test)]
mod tests {
    use super::hole;

    #[test]
    fn hole_keeps_its_distance() {
        assert_eq!(hole(vec![], 0x1000), Some(0x10_1000));
        assert_eq!(hole(vec![(0x10_0000, 0x20_0000), (0x20_2000, 0x30_0000)], 0x1000), Some(0x30_1000));
        assert_eq!(hole(vec![(0x10_3000, 0x20_0000)], 0x1000), Some(0x10_1000));
        assert_eq!(hole(vec![(0, 0x7fff_ffff_f000)], 0x1000), None);
    }
}
