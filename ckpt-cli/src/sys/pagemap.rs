//! PAGEMAP_SCAN on /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst, since Linux 6.7).

use super::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Page categories (`PAGE_IS_*` of linux/fs.h).
pub mod category {
    /// File-backed or shared memory, as opposed to private anonymous.
    pub const FILE: u64 = 1 << 2;
    /// In memory.
    pub const PRESENT: u64 = 1 << 3;
    /// Swapped out.
    pub const SWAPPED: u64 = 1 << 4;
    /// The shared page of zeros.
    pub const ZERO: u64 = 1 << 5;
}

/// A run of pages with equal categories, addresses in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// First address behind.
    pub end: u64,
    /// Its categories, of those asked for.
    pub categories: u64,
}

/// What to look for: pages whose categories contain all of `all` after `inverted` bits are flipped,
/// and at least one of `any` (0: no such condition).
#[derive(Clone, Copy, Debug, Default)]
pub struct Query {
    /// Categories that are compared inverted.
    pub inverted: u64,
    /// Categories that must all match.
    pub all: u64,
    /// Categories of which one must match.
    pub any: u64,
    /// Categories reported per region.
    pub report: u64,
}

#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// _IOWR('f', 16, struct pm_scan_arg)
const PAGEMAP_SCAN: libc::c_ulong =
    (3 << 30) | ((size_of::<ScanArg>() as libc::c_ulong) << 16) | (0x66 << 8) | 16;

/// Calls `found` for each matching region of `[start, end)`, in address order.
pub fn scan(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    query: Query,
    mut found: impl FnMut(Region),
) -> io::Result<()> {
    let mut regions = [Region::default(); 512];
    let mut at = start;
    while at < end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: 0,
            start: at,
            end,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: query.inverted,
            category_mask: query.all,
            category_anyof_mask: query.any,
            return_mask: query.report,
        };
        // SAFETY: the argument and the vector it points to live across the call and have the stated sizes.
        let n = check(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) }.into())?;
        regions[..n as usize].iter().copied().for_each(&mut found);
        if arg.walk_end <= at {
            break;
        }
        at = arg.walk_end;
    }
    Ok(())
}
