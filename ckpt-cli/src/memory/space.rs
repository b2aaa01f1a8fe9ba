//! One address space in a dump.

use super::attach;
use super::lists::CommitLists;
use super::page_set::PageSet;
use super::staging::{Origin, Wanted};
use super::tracker::{self, Registered, Scan, Tracker};
use crate::sys::userfaultfd::Userfaultfd;
use crate::tracee::freeze::FrozenProcess;
use crate::tracee::healing::Finder;
use crate::tracee::proc::{self, Map, Maps};
use crate::tracee::rings;
use anyhow::{Context as _, Result};
use ckpt_common::image::{MemoryId, PAGE_SIZE};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Instant;

/// Most bytes of mappings that are looked at before the clock is.
const WINDOW: u64 = 64 << 20;

/// What was done with the memory of a process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Of its own at the cut.
    pub own: u64,
    /// Of these: not as in the base.
    pub modified: u64,
    /// Copied before the cut, pages that were written again later included.
    pub presaved: u64,
    /// Copied in the cut.
    pub cut: u64,
    /// Old content saved because it was about to be overwritten.
    pub before_write: u64,
}

/// The memory of one process.
#[derive(Debug)]
pub struct Space {
    /// The process, as we see its PID.
    pub pid: i32,
    /// When it started, in ticks since the node's boot: no other process has both numbers.
    pub started: u64,
    /// Its object in the image.
    pub id: MemoryId,
    /// The object in the base that has what was not modified.
    pub base: Option<MemoryId>,
    /// Modified pages.
    pub lists: CommitLists,
    /// Pages with content of their own at the cut.
    pub own: PageSet,
    /// Those of them in huge pages.
    pub huge: PageSet,
    /// What was done.
    pub statistics: Statistics,
    /// Pages that were written after the cut, unnoticed by the tracker.
    pub written_later: PageSet,
    /// Pages whose writes are not tracked, at the last look or the cut.
    untracked: PageSet,
    /// Pages that are copied in the cut although they could be guarded.
    unguarded: PageSet,
    /// Pages that were, at a look or the cut, buffers registered with an io_uring: devices and the kernel write to them
    /// without a fault.
    pinned: PageSet,
    tracker: Option<Tracker>,
    /// A userfaultfd that lets write faults wait for us, if there is to be one.
    asking: Option<Userfaultfd>,
    wants_asking: bool,
    /// A tracker cannot be had.
    trackerless: bool,
    pagemap: File,
    mem: File,
    maps: Maps,
    /// Where a look goes on that was broken off.
    resume: Option<u64>,
    /// Ranges of addresses in the sample.
    sampled: Vec<Range<u64>>,
}

impl Space {
    /// The memory of a process that is looked at for the first time in this dump.
    ///
    /// # Errors
    /// The process is gone.
    pub fn new(pid: i32, id: MemoryId) -> Result<Self> {
        let (pagemap, mem) = open(pid)?;
        let started = started(pid)?;
        Ok(Self {
            pid,
            started,
            id,
            base: None,
            lists: CommitLists::default(),
            own: PageSet::default(),
            huge: PageSet::default(),
            statistics: Statistics::default(),
            written_later: PageSet::default(),
            untracked: PageSet::default(),
            unguarded: PageSet::default(),
            pinned: PageSet::default(),
            tracker: None,
            asking: None,
            wants_asking: false,
            trackerless: false,
            pagemap,
            mem,
            maps: Maps::new(),
            resume: None,
            sampled: Vec::new(),
        })
    }

    /// Goes on with what was kept since an earlier dump.
    pub fn take_up(&mut self, tracker: Tracker, base: MemoryId, modified: PageSet) {
        (self.tracker, self.base) = (Some(tracker), Some(base));
        self.lists = CommitLists::with(modified);
    }

    /// Its tracker, to be kept for the next dump.
    pub fn into_tracker(self) -> Option<Tracker> {
        self.tracker
    }

    /// Can writes be seen?
    pub fn is_tracked(&self) -> bool {
        self.tracker.is_some()
    }

    /// Its tracker.
    pub fn tracker(&self) -> Option<&Tracker> {
        self.tracker.as_ref()
    }

    /// There is to be a userfaultfd that lets write faults wait.
    pub fn want_asking(&mut self) {
        self.wants_asking = true;
    }

    /// The userfaultfd that lets write faults wait.
    pub fn asking(&self) -> Option<&Userfaultfd> {
        self.asking.as_ref()
    }

    /// /proc/PID/pagemap of its address space.
    pub fn pagemap(&self) -> &File {
        &self.pagemap
    }

    /// Its mappings at the last look.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Pages that are to be saved after the cut, and whose old content can be kept when they are written before: of the
    /// others, a write is not noticed, or they are to be copied in the cut.
    pub fn guardable(&self) -> PageSet {
        let now = self.pinned.union(&self.untracked).union(&self.unguarded);
        self.lists.previous().difference(&now)
    }

    /// Has these pages copied in the cut.
    pub fn leave_unguarded(&mut self, pages: PageSet) {
        self.unguarded = pages;
    }

    /// What is on the list to be saved of each mapping that has something on it, but no more than so many bytes.
    pub fn listed(&self, most: u64) -> impl Iterator<Item = PageSet> + '_ {
        let listed = move |map| {
            let (mut pages, mut bytes) = (Vec::new(), 0);
            for part in self.lists.previous().parts(range(map)) {
                bytes += (part.end - part.start) * PAGE_SIZE as u64;
                if bytes > most {
                    return None;
                }
                pages.push(part);
            }
            (bytes > 0).then(|| pages.into_iter().collect())
        };
        self.maps.iter().filter_map(listed)
    }

    /// Looks at the running process, without protecting anything: its own pages and those that were written.
    ///
    /// # Errors
    /// The process is gone.
    pub fn peek(&mut self) -> Result<Scan> {
        let scan = tracker::peek(&self.pagemap, &read_maps(self.pid)?)?;
        self.untracked = scan.untracked.clone();
        Ok(scan)
    }

    /// Bytes, at the last look, that the cut has to copy whatever was written.
    pub fn untracked_bytes(&self) -> u64 {
        if self.is_tracked() { self.untracked.bytes() } else { proc::private_bytes(self.pid) }
    }

    /// Reads its memory.
    ///
    /// # Errors
    /// Nothing is there.
    pub fn read(&self, address: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.mem.read_exact_at(into, address)
    }

    /// Looks at the stopped process and notes what was written, until `deadline`; false if there is more. Where requests
    /// to an io_uring are under way, nothing is noted, and what was written stays marked for the next look.
    ///
    /// # Errors
    /// The process is gone.
    pub fn look(
        &mut self,
        frozen: &mut FrozenProcess,
        finder: &mut Finder,
        deadline: Instant,
    ) -> Result<bool> {
        if !self.prepare(frozen, finder, read_maps(self.pid)?, Some(deadline))? {
            return Ok(false);
        }
        if !self.settle(frozen, finder)? {
            return Ok(true);
        }
        let from = self.resume.unwrap_or(0);
        let Some(tracker) = &mut self.tracker else { return Ok(true) };
        let windows = tracker::windows(&self.maps, WINDOW).into_iter().filter(|window| window.end > from);
        let windows: Vec<_> = windows.map(|window| window.start.max(from)..window.end).collect();
        let (scan, done) = tracker.scan(&self.pagemap, &self.maps, &windows, Some(deadline))?;
        self.lists.written(&scan.written);
        if done < windows.len() {
            self.resume = windows[..done].last().map(|window| window.end).or(self.resume);
            return Ok(false);
        }
        self.resume = None;
        Ok(true)
    }

    /// Protects a sample of the stopped process's memory, as far as there is time until `deadline`.
    ///
    /// # Errors
    /// The process is gone.
    pub fn begin_sample(
        &mut self,
        frozen: &mut FrozenProcess,
        finder: &mut Finder,
        deadline: Instant,
    ) -> Result<()> {
        self.sampled.clear();
        if !self.prepare(frozen, finder, read_maps(self.pid)?, Some(deadline))?
            || !self.settle(frozen, finder)?
        {
            return Ok(());
        }
        let Some(tracker) = &mut self.tracker else { return Ok(()) };
        let mut windows = tracker::sample(&self.maps);
        let (scan, done) = tracker.scan(&self.pagemap, &self.maps, &windows, Some(deadline))?;
        windows.truncate(done);
        self.sampled = windows;
        self.lists.written(&scan.written);
        Ok(())
    }

    /// How many pages the sample has, and how many were written since.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn look_at_sample(&self) -> Result<(u64, u64)> {
        tracker::written(&self.pagemap, &self.maps, &self.sampled)
    }

    /// The cut: what was written joins the list that is to be saved.
    ///
    /// # Errors
    /// The process is gone.
    pub fn cut(&mut self, frozen: &mut FrozenProcess, finder: &mut Finder, maps: &Maps) -> Result<()> {
        self.prepare(frozen, finder, maps.clone(), None)?;
        if !self.settle(frozen, finder)? {
            return Err(rings::Busy { pid: self.pid }.into());
        }
        let Scan { own, written, untracked, huge } = match &mut self.tracker {
            Some(tracker) => tracker.scan(&self.pagemap, maps, &tracker::windows(maps, WINDOW), None)?.0,
            None => tracker::look(&self.pagemap, maps)?,
        };
        self.lists.written(&written.union(&untracked).union(&self.pinned.intersection(&own)));
        self.lists.swap();
        (self.own, self.untracked, self.huge) = (own, untracked, huge);
        self.unguarded = PageSet::default();
        Ok(())
    }

    /// The cut did not come about.
    pub fn uncut(&mut self) {
        self.lists.swap_back();
        self.own = PageSet::default();
    }

    /// Waits until no request to an io_uring is under way, and notes what is pinned; false if they do not end in time.
    fn settle(&mut self, frozen: &mut FrozenProcess, finder: &mut Finder) -> Result<bool> {
        let Some(states) = rings::settle(frozen, finder, &self.maps)? else { return Ok(false) };
        let pinned: PageSet = states.iter().flat_map(rings::State::pinned).collect();
        self.pinned = self.pinned.union(&pinned);
        Ok(true)
    }

    /// The dump ends: what was written unnoticed counts for the next one. Pinned pages may have been since the cut, and
    /// need not be pinned any more when it begins.
    pub fn note_unnoticed(&mut self) {
        let unnoticed = self.written_later.union(&self.pinned);
        self.lists.written(&unnoticed);
    }

    /// Has everything registered that the stopped process has mapped (`maps`), with a tracker of its present address space;
    /// false if there was no time for all of it.
    fn prepare(
        &mut self,
        frozen: &mut FrozenProcess,
        finder: &mut Finder,
        maps: Maps,
        deadline: Option<Instant>,
    ) -> Result<bool> {
        // A process that runs another program has another address space.
        (self.pagemap, self.mem) = open(self.pid)?;
        self.maps = maps;
        loop {
            self.attach(frozen, finder);
            let Some(tracker) = &mut self.tracker else { return Ok(true) };
            match tracker.register(&self.maps, deadline) {
                Registered::All => return Ok(true),
                Registered::NotAll => return Ok(false),
                Registered::Gone => (self.tracker, self.asking) = (None, None),
                Registered::Taken => {
                    let pid = self.pid;
                    tracing::warn!(
                        pid,
                        "its memory is tracked for another store, and is copied whole for this one"
                    );
                    (self.tracker, self.asking, self.trackerless) = (None, None, true);
                }
            }
        }
    }

    /// Makes what is missing of tracker and userfaultfd.
    fn attach(&mut self, frozen: &mut FrozenProcess, finder: &mut Finder) {
        if self.trackerless || (self.tracker.is_some() && self.asking.is_some() == self.wants_asking) {
            return;
        }
        let (tracks, wants_asking) = (self.tracker.is_some(), self.wants_asking);
        let made = frozen.with_arena(finder, &self.maps, |threads, arena| {
            let leader = threads.first_mut().context("it has no thread left")?;
            let tracking =
                (!tracks).then(|| attach::userfaultfd(leader, arena, attach::TRACKING)).transpose()?;
            let asking =
                wants_asking.then(|| attach::userfaultfd(leader, arena, attach::ASKING)).transpose()?;
            Ok((tracking, asking))
        });
        match made {
            Ok((tracking, asking)) => {
                self.asking = asking;
                self.tracker = tracking.map(Tracker::new).or_else(|| self.tracker.take());
            }
            Err(error) => {
                tracing::warn!(pid = self.pid, "its memory cannot be tracked and is copied whole: {error:#}");
                (self.trackerless, self.tracker) = (true, None);
            }
        }
    }

    /// Counts what there is and what is not as in the base, when everything is saved.
    pub fn count(&mut self) {
        self.statistics.own = self.own.bytes();
        self.statistics.modified = self.lists.modified().intersection(&self.own).bytes();
    }

    /// What of these pages is to be copied, by how it can be read.
    pub fn origins(&self, pages: &PageSet) -> Vec<Wanted<'_>> {
        let mut all = Vec::new();
        for readable in [true, false] {
            let maps = self.maps.iter().filter(|map| (map.prot & libc::PROT_READ != 0) == readable);
            let part = pages.intersection(&maps.map(range).collect());
            if !part.is_empty() {
                let origin = Origin { pid: self.pid, mem: &self.mem, readable };
                all.push(Wanted { id: self.id, origin, ranges: part.addresses().collect() });
            }
        }
        all
    }
}

fn range(map: &Map) -> Range<u64> {
    map.start / PAGE_SIZE as u64..map.end / PAGE_SIZE as u64
}

fn read_maps(pid: i32) -> Result<Maps> {
    proc::maps(pid).context("reading the mappings")
}

fn open(pid: i32) -> Result<(File, File)> {
    let open = |name| File::open(format!("/proc/{pid}/{name}"));
    Ok((open("pagemap").context("opening the page map")?, open("mem").context("opening the memory")?))
}

/// When a process started, in ticks since the node's boot.
///
/// # Errors
/// It is gone.
pub fn started(pid: i32) -> Result<u64> {
    let stat = procfs::process::Process::new(pid).and_then(|process| process.stat());
    Ok(stat.with_context(|| format!("looking at process {pid}"))?.starttime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pinned_pages_are_not_guarded_and_count_for_the_next_dump() {
        let mut space = Space::new(std::process::id() as i32, MemoryId(0)).unwrap();
        space.pinned = PageSet::from_iter(std::iter::once(5..7));
        let all = PageSet::from_iter(std::iter::once(0..10));
        space.lists.written(&all);
        space.lists.swap();
        assert_eq!(space.guardable().ranges(), [0..5, 7..10]);
        space.lists.save(&all);
        space.lists.commit();
        // From the cut to now, they may have been written, and not be pinned any more when the next dump begins.
        space.note_unnoticed();
        assert_eq!(space.lists.modified(), space.pinned);
    }
}
