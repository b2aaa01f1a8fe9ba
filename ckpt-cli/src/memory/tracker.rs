//! Which pages of an address space were written, by the kernel's own book-keeping.
//!
//! Private memory is registered with a userfaultfd in asynchronous write-protect mode: the kernel lifts the
//! protection of a page at the first write, and one `PAGEMAP_SCAN` finds such pages and protects them again.
//!
//! Not so private *file* mappings ([`is_tracked`]). Where a protected page of one is dropped, the kernel leaves a marker,
//! and the next write makes the page again in two steps: first from the file, *protected*, then, when the instruction is
//! repeated, written. In between, which may be for as long as a signal handler runs, it looks like a page that was not
//! written since it was protected, with other content. Most such pages are data of programs and libraries, and few: they
//! count as written at each cut ([`Scan::untracked`]).
//!
//! Only pages with content of their own are protected, never empty ones: so no page tables are made for memory that
//! is only reserved, and a page that appears later counts as written. What the kernel does not say is found in other
//! ways: memory that is not registered (new, moved, of a new program after exec) counts as written; a page that was
//! dropped is not there any more.
//!
//! [`Tracker::scan`] protects pages only while the process is stopped. A page into which a device writes by direct
//! I/O is marked as written when the transfer begins; if it were protected again before the end, what arrives late
//! would be lost. A stopped process has no transfer under way: read(2) with `O_DIRECT` returns before it stops, and
//! requests to an io_uring are waited for ([`crate::tracee::rings`]). Buffers that are registered with one stay pinned,
//! and are written without a mark: [`super::space`] takes them as written.

use super::page_set::PageSet;
use crate::sys::pagemap::{self, Query, Region, category};
use crate::sys::task::processors;
use crate::sys::userfaultfd::{Userfaultfd, mode};
use crate::tracee::proc::Map;
use anyhow::{Context as _, Result};
use ckpt_common::image::PAGE_SIZE;
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Private pages with content of their own: not the file's, not the shared zero page.
const OWN: Query = Query {
    inverted: category::FILE | category::ZERO,
    all: category::FILE | category::ZERO,
    any: category::PRESENT | category::SWAPPED,
    report: category::WRITTEN | category::HUGE,
};

/// The same where no file is mapped. Whether a page is a file's the kernel looks up in its `struct page`, which
/// costs more than the rest of the walk.
const OWN_ANONYMOUS: Query = Query { inverted: category::ZERO, all: category::ZERO, ..OWN };

/// How long one look, or what must be done behind it, may stop a job that runs on afterwards.
pub const LOOK: Duration = Duration::from_millis(4);
/// Size of one piece of a sample.
const SAMPLED: u64 = 1 << 20;
/// More threads than this do not walk faster.
const THREADS: usize = 4;
/// Windows of addresses that are worth a thread.
const PER_THREAD: usize = 4;

/// Anonymous mappings from this size on are looked at by themselves.
const LARGE: u64 = 1 << 20;

/// What a look at an address space gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// Pages with content of their own.
    pub own: PageSet,
    /// Those of them that were written since the last look, or of which that is not known.
    pub written: PageSet,
    /// Those of them whose writes are not tracked at all: neither in `written`, nor unwritten.
    pub untracked: PageSet,
    /// Those of them that are in huge pages.
    pub huge: PageSet,
}

/// How far [`Tracker::register`] has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// Everything is registered.
    All,
    /// There was no time for all of it.
    NotAll,
    /// The address space is gone: the process runs another program, or has ended.
    Gone,
    /// Another userfaultfd has some of it: that of another keeper, for another store. Whoever looks must not protect
    /// pages then, which would make the other one forget that they were written.
    Taken,
}

/// Tracks one address space.
#[derive(Debug)]
pub struct Tracker {
    uffd: Userfaultfd,
    /// Mappings that were registered, and those that cannot be.
    known: HashSet<(u64, u64)>,
}

impl Tracker {
    /// A tracker with a userfaultfd of the address space.
    pub fn new(uffd: Userfaultfd) -> Self {
        Self { uffd, known: HashSet::new() }
    }

    /// Its userfaultfd.
    pub fn userfaultfd(&self) -> &Userfaultfd {
        &self.uffd
    }

    /// Its userfaultfd, which goes on tracking in other hands.
    pub fn into_userfaultfd(self) -> Userfaultfd {
        self.uffd
    }

    /// Registers what is new, until `deadline`.
    ///
    /// The process must be stopped. Of one that runs, a mapping could have changed since `maps` were read, and would
    /// be split where the old one ended; mremap(2) of the program would fail then, because it works on whole ones.
    pub fn register(&mut self, maps: &[Map], deadline: Option<Instant>) -> Registered {
        for map in maps.iter().filter(|map| is_tracked(map)) {
            if !self.known.insert((map.start, map.end)) {
                continue;
            }
            match self.uffd.register(map.start, map.end, mode::WP) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Registered::Gone,
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Registered::Taken,
                // Of a kind that cannot be registered: it counts as written each time.
                Err(error) => tracing::debug!(start = map.start, %error, "memory that cannot be tracked"),
                Ok(()) => {}
            }
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                return Registered::NotAll;
            }
        }
        Registered::All
    }

    /// Looks at the private memory in some ranges of addresses, in their order, until `deadline`; gives how many it has
    /// come through. Written pages are protected again: the process must be stopped.
    ///
    /// # Errors
    /// The process is gone.
    pub fn scan(
        &mut self,
        pagemap: &File,
        maps: &[Map],
        windows: &[Range<u64>],
        deadline: Option<Instant>,
    ) -> Result<(Scan, usize)> {
        // The job is stopped, so there are processors.
        let threads = processors().min(THREADS).min(windows.len() / PER_THREAD).max(1);
        let next = AtomicUsize::new(0);
        let walk = || {
            let mut seen = Seen::default();
            // At least one, or there would be no end.
            while seen.walks == 0 || deadline.is_none_or(|deadline| Instant::now() < deadline) {
                let Some(window) = windows.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                seen.walk(pagemap, maps, window)?;
            }
            anyhow::Ok(seen)
        };
        let mut seen = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(walk)).collect();
            let mut all = walk()?;
            for other in others {
                all.append(
                    other.join().map_err(|_| anyhow::anyhow!("a thread that looks at memory panicked"))??,
                );
            }
            anyhow::Ok(all)
        })?;
        let strange: PageSet = std::mem::take(&mut seen.strange).into_iter().collect();
        if !strange.is_empty() {
            // Mapped anew since they were registered: once more before the next look.
            let size = PAGE_SIZE as u64;
            self.known.retain(|(start, end)| strange.within(start / size..end / size).is_empty());
        }
        Ok((seen.scan(maps), next.into_inner().min(windows.len())))
    }
}

impl Tracker {
    /// Protects all pages in a range of addresses, whatever was written, and gives those that are there: none of a process
    /// that has ended. It must be stopped.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn protect(&self, pagemap: &File, range: Range<u64>) -> Result<PageSet> {
        let mut there = PageSet::default();
        let mut note = |region: Region| there.push_addresses(region.start, region.end);
        let protected = pagemap::scan_and_protect(pagemap.as_fd(), range.start, range.end, OWN, &mut note);
        unless_ended(protected).context("protecting memory")?;
        Ok(there)
    }
}

/// Which of these pages are there and were not written since they were protected: none of a process that has ended.
///
/// # Errors
/// The kernel refuses.
pub fn unwritten(pagemap: &File, pages: &PageSet, maps: &[Map]) -> Result<PageSet> {
    let (Some(first), Some(last)) = (pages.ranges().first(), pages.ranges().last()) else {
        return Ok(PageSet::default());
    };
    let span = first.start * PAGE_SIZE as u64..last.end * PAGE_SIZE as u64;
    let mut found = PageSet::default();
    for (Range { start, end }, own) in walks(maps, &span) {
        let query = Query { any: category::PRESENT, ..own.but_not(category::WRITTEN) };
        let note = |region: Region| found.push_addresses(region.start, region.end);
        let scanned = pagemap::scan(pagemap.as_fd(), start, end, query, note);
        unless_ended(scanned).context("looking for pages that were written")?;
    }
    Ok(found.intersection(pages))
}

/// The address space of a process that has ended has no pages.
fn unless_ended(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        result => result,
    }
}

/// Looks at memory that nobody tracks: everything counts as written.
///
/// # Errors
/// The process is gone.
pub fn look(pagemap: &File, maps: &[Map]) -> Result<Scan> {
    let mut seen = Seen::default();
    for (Range { start, end }, own) in walks(maps, &all(maps)) {
        pagemap::scan(pagemap.as_fd(), start, end, own, |region| seen.note(region, true))
            .context("listing the pages")?;
    }
    Ok(seen.scan(maps))
}

/// Looks at memory without protecting anything, so the process may run: pages that are not tracked count as written.
///
/// # Errors
/// The process is gone.
pub fn peek(pagemap: &File, maps: &[Map]) -> Result<Scan> {
    let mut seen = Seen::default();
    for (Range { start, end }, own) in walks(maps, &all(maps)) {
        pagemap::scan(pagemap.as_fd(), start, end, own, |region| {
            seen.note(region, region.categories & category::WRITTEN != 0);
        })
        .context("counting the pages that were written")?;
    }
    Ok(seen.scan(maps))
}

/// How many pages of their own these ranges of addresses have, and how many of those were written since they were
/// protected: none of a process that has ended. It may run.
///
/// # Errors
/// The kernel refuses.
pub fn written(pagemap: &File, maps: &[Map], windows: &[Range<u64>]) -> Result<(u64, u64)> {
    let (mut own, mut written) = (0, 0);
    for (Range { start, end }, query) in windows.iter().flat_map(|window| walks(maps, window)) {
        let scanned = pagemap::scan(pagemap.as_fd(), start, end, query, |region| {
            let pages = (region.end - region.start) / PAGE_SIZE as u64;
            own += pages;
            written += if region.categories & category::WRITTEN != 0 { pages } else { 0 };
        });
        unless_ended(scanned).context("counting the pages that were written")?;
    }
    Ok((own, written))
}

/// Ranges of addresses that stand for all large mappings: a sixteenth of each, evenly spread.
pub fn sample(maps: &[Map]) -> Vec<Range<u64>> {
    const STEP: u64 = 16;
    let large = maps.iter().filter(|map| is_tracked(map) && map.size() >= STEP * SAMPLED);
    let parts = |map: &Map| (map.start..map.end).step_by((STEP * SAMPLED) as usize);
    large.flat_map(|map| parts(map).map(|start| start..(start + SAMPLED).min(map.end))).collect()
}

/// From the first mapping to the last.
pub fn all(maps: &[Map]) -> Range<u64> {
    let (first, last) = (maps.first(), maps.last());
    first.map_or(0, |map| map.start)..last.map_or(0, |map| map.end)
}

/// The walks through a range of addresses, each with what to look for.
fn walks(maps: &[Map], range: &Range<u64>) -> Vec<(Range<u64>, Query)> {
    let mut walks: Vec<(Range<u64>, Query)> = Vec::new();
    let mut open = false;
    for map in maps.iter().filter(|map| map.start < range.end && map.end > range.start) {
        let part = map.start.max(range.start)..map.end.min(range.end);
        let large = is_tracked(map) && part.end - part.start >= LARGE;
        match walks.last_mut().filter(|_| open && !large) {
            Some((last, _)) => last.end = part.end,
            None => walks.push((part, if large { OWN_ANONYMOUS } else { OWN })),
        }
        open = !large;
    }
    walks
}

/// Ranges of addresses that together hold all mappings, each with at most so many bytes of them.
pub fn windows(maps: &[Map], most: u64) -> Vec<Range<u64>> {
    let mut windows: Vec<Range<u64>> = Vec::new();
    let mut filled = most;
    for map in maps {
        let mut at = map.start;
        while at < map.end {
            let len = (map.end - at).min(most);
            match windows.last_mut().filter(|_| filled + len <= most) {
                Some(window) => window.end = at + len,
                None => {
                    windows.push(at..at + len);
                    filled = 0;
                }
            }
            filled += len;
            at += len;
        }
    }
    windows
}

/// What scans have found, in any order.
#[derive(Default)]
struct Seen {
    own: Vec<Range<u64>>,
    written: Vec<Range<u64>>,
    huge: Vec<Range<u64>>,
    /// Not registered.
    strange: Vec<Range<u64>>,
    walks: usize,
}

impl Seen {
    /// Looks at a range of addresses and protects what was written.
    fn walk(&mut self, pagemap: &File, maps: &[Map], window: &Range<u64>) -> Result<()> {
        self.walks += 1;
        for (Range { start, end }, own) in walks(maps, window) {
            pagemap::scan_and_protect(pagemap.as_fd(), start, end, own.and(category::WPALLOWED), |region| {
                self.note(region, region.categories & category::WRITTEN != 0);
            })
            .context("listing the pages that were written")?;
            pagemap::scan(pagemap.as_fd(), start, end, own.but_not(category::WPALLOWED), |region| {
                self.strange.push(page_numbers(region));
                self.note(region, true);
            })
            .context("listing the pages that are not tracked")?;
        }
        Ok(())
    }

    fn append(&mut self, mut other: Self) {
        self.own.append(&mut other.own);
        self.written.append(&mut other.written);
        self.huge.append(&mut other.huge);
        self.strange.append(&mut other.strange);
    }

    fn note(&mut self, region: Region, written: bool) {
        let pages = page_numbers(region);
        if written {
            self.written.push(pages.clone());
        }
        if region.categories & category::HUGE != 0 {
            self.huge.push(pages.clone());
        }
        self.own.push(pages);
    }

    fn scan(self, maps: &[Map]) -> Scan {
        let set =
            |kind: fn(&Map) -> bool| maps.iter().filter(|map| kind(map)).map(pages).collect::<PageSet>();
        let own = PageSet::from_iter(self.own).intersection(&set(is_private));
        let tracked = own.intersection(&set(is_tracked));
        let written = PageSet::from_iter(self.written).intersection(&tracked);
        let huge = PageSet::from_iter(self.huge).intersection(&own);
        Scan { untracked: own.difference(&tracked), own, written, huge }
    }
}

/// Memory that belongs to this address space alone.
pub fn is_private(map: &Map) -> bool {
    !map.shared && !map.by_kernel()
}

/// Memory whose writes the kernel notes, each one: private, and of no file.
pub fn is_tracked(map: &Map) -> bool {
    is_private(map) && map.inode == 0
}

fn page_numbers(region: Region) -> Range<u64> {
    region.start / PAGE_SIZE as u64..region.end / PAGE_SIZE as u64
}

/// Page numbers of a mapping.
fn pages(map: &Map) -> Range<u64> {
    map.start / PAGE_SIZE as u64..map.end / PAGE_SIZE as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(start: u64, end: u64) -> Map {
        Map {
            start,
            end,
            prot: 3,
            shared: false,
            offset: 0,
            device: 0,
            inode: 0,
            path: String::new(),
            flags: procfs::process::VmFlags::empty(),
        }
    }

    #[test]
    fn windows_hold_every_mapping_once() {
        let maps = [map(10, 20), map(30, 35), map(100, 200), map(300, 301)];
        assert_eq!(windows(&maps, 40), [10..35, 100..140, 140..180, 180..301]);
        assert!(windows(&maps, 1000).into_iter().eq(std::iter::once(10..301)));
        assert!(windows(&[], 5).is_empty());
    }

    #[test]
    fn a_sample_is_spread_over_large_mappings() {
        let m = SAMPLED;
        let maps = [map(0, m), map(2 * m, 2 * m + 33 * m), Map { shared: true, ..map(40 * m, 90 * m) }];
        assert_eq!(sample(&maps), [2 * m..3 * m, 18 * m..19 * m, 34 * m..35 * m]);
    }

    #[test]
    fn large_anonymous_mappings_are_walked_alone() {
        let file = |start, end| Map { inode: 5, ..map(start, end) };
        let m = LARGE;
        let maps = [
            map(0, 9),
            file(9, 10),
            map(m, 3 * m),
            map(4 * m, 6 * m),
            map(7 * m, 7 * m + 1),
            file(8 * m, 10 * m),
        ];
        let found: Vec<_> =
            walks(&maps, &(5..9 * m)).into_iter().map(|(range, query)| (range, query == OWN)).collect();
        assert_eq!(found, [(5..10, true), (m..3 * m, false), (4 * m..6 * m, false), (7 * m..9 * m, true)]);
    }
}
