//! PAGEMAP_SCAN on /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst, since Linux 6.7).

use super::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Page categories (`PAGE_IS_*` of linux/fs.h).
pub mod category {
    /// In a range that is registered for asynchronous write protection.
    pub const WPALLOWED: u64 = 1;
    /// Not write-protected by a userfaultfd: written since it was, or never protected.
    pub const WRITTEN: u64 = 1 << 1;
    /// File-backed or shared memory, as opposed to private anonymous.
    pub const FILE: u64 = 1 << 2;
    /// In memory.
    pub const PRESENT: u64 = 1 << 3;
    /// Swapped out.
    pub const SWAPPED: u64 = 1 << 4;
    /// The shared page of zeros.
    pub const ZERO: u64 = 1 << 5;
    /// In a huge page.
    pub const HUGE: u64 = 1 << 6;
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

impl Query {
    /// Only pages that are in these categories, too.
    pub const fn and(self, categories: u64) -> Self {
        Self { all: self.all | categories, ..self }
    }

    /// Only pages that are in none of these categories.
    pub const fn but_not(self, categories: u64) -> Self {
        Self { all: self.all | categories, inverted: self.inverted | categories, ..self }
    }
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

/// `PM_SCAN_WP_MATCHING`
const PROTECT: u64 = 1;
/// Regions that one request may give.
const REGIONS: usize = 4096;

/// Calls `found` for each matching region of `[start, end)`, in address order.
pub fn scan(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    query: Query,
    found: impl FnMut(Region),
) -> io::Result<()> {
    walk(pagemap, start, end, query, 0, found)
}

/// The same, and each written page that matches is protected again in the same step. Ranges that are not
/// registered for asynchronous write protection are passed over.
pub fn scan_and_protect(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    query: Query,
    found: impl FnMut(Region),
) -> io::Result<()> {
    walk(pagemap, start, end, query, PROTECT, found)
}

fn walk(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    query: Query,
    flags: u64,
    mut found: impl FnMut(Region),
) -> io::Result<()> {
    let mut regions = vec![Region::default(); REGIONS];
    let mut at = start;
    while at < end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags,
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

/// One entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// Number of the page frame where the page is in memory; 0 without CAP_SYS_ADMIN.
    pub fn frame(self) -> Option<u64> {
        (self.0 >> 63 == 1).then_some(self.0 & ((1 << 55) - 1))
    }

    /// Mapped nowhere else.
    pub fn exclusive(self) -> bool {
        self.0 >> 56 & 1 == 1
    }
}

/// Entries of neighbouring pages from page number `first` on.
pub fn entries(pagemap: &std::fs::File, first: u64, count: usize) -> io::Result<Vec<Entry>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; count * 8];
    pagemap.read_exact_at(&mut bytes, first * 8)?;
    let words = bytes.chunks_exact(8).map(|b| u64::from_ne_bytes(b.try_into().unwrap_or_default()));
    Ok(words.map(Entry).collect())
}
