//! The memory of a node's processes through the steps of a dump.
//!
//! 1. *Early* ([`MemoryDump::save_early`], in `early`): the job runs, and what was modified is copied.
//! 2. *Cut* ([`MemoryDump::cut`], [`MemoryDump::copy_in_cut`]): the job is frozen. The current commit lists become the
//!    previous ones; if they fit the budget they are copied.
//! 3. *After*: the job runs. What was not copied is, copy before write ([`super::cow`]).
//! 4. *Save* ([`MemoryDump::save`]): copies go to the store, which compresses and writes them.

mod early;

use super::cow::{Cow, Way};
use super::kept::{Kept, KeptSpace};
use super::page_set::PageSet;
use super::space::{Space, Statistics};
use super::staging::{Mark, Staging};
use crate::store::{PartReader, PartWriter};
use crate::tracee::freeze::FrozenProcess;
use crate::tracee::healing::Finder;
use crate::tracee::mapping_flags::MappingFlags;
use crate::tracee::proc::{self, Maps};
use anyhow::{Context as _, Result, ensure};
use ckpt_common::image::manifest::PhaseTime;
use ckpt_common::image::{MemoryId, PAGE_SIZE, pages};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes per second that are copied in the freeze, until it was measured.
const RATE: f64 = 1e9;
/// Memory made ready for the copies in the freeze, beside what they are expected to take.
const SPARE: u64 = 4 << 20;
/// For more memory than this, loading the reader of flags takes less time than /proc/PID/smaps.
const WORTH_FLAGS: u64 = 128 << 20;
/// Most bytes on the list of a mapping that is copied in the freeze although others are guarded.
const SMALL: u64 = 1 << 20;
/// Where pages were lost, so much on both sides is copied in the freeze of the next attempt.
const AROUND: u64 = 4 << 20;
/// What is copied at a time where the store takes it at once.
const STREAMED: u64 = 64 << 20;

/// What the operator wants of the memory part of a dump.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long copying may prolong the freeze.
    pub max_pause: Duration,
    /// What happens to what does not fit.
    pub way: Way,
    /// The job stays frozen until its end: then there is all the time in the world.
    pub stop: bool,
    /// Pages that an attempt before this one has lost, by process.
    pub lost: BTreeMap<i32, PageSet>,
}

/// The memory of all processes of a job on this node, in one dump.
#[derive(Debug)]
pub struct MemoryDump {
    options: Options,
    base: Option<PartReader>,
    kept: BTreeMap<i32, KeptSpace>,
    flags: Option<MappingFlags>,
    pids: Vec<i32>,
    spaces: BTreeMap<i32, Space>,
    staging: Staging,
    next: u32,
    /// Objects of files: one without content is an object, too.
    files: Vec<MemoryId>,
    before_cut: Option<(Mark, u32)>,
    cow: Option<Cow>,
    finder: Finder,
    /// Bytes per second.
    rate: f64,
    times: Vec<PhaseTime>,
}

impl MemoryDump {
    /// Nothing is looked at yet. `kept` is relative to `base`.
    pub fn new(options: Options, base: Option<PartReader>, kept: Kept) -> Self {
        Self {
            options,
            base,
            kept: kept.spaces.into_iter().map(|kept| (kept.pid, kept)).collect(),
            flags: kept.flags,
            pids: Vec::new(),
            spaces: BTreeMap::new(),
            staging: Staging::new(staging_limit()),
            next: 0,
            files: Vec::new(),
            before_cut: None,
            cow: None,
            finder: Finder::default(),
            rate: RATE,
            times: Vec::new(),
        }
    }

    /// Begins to load what reads flags of mappings, if these processes have so much memory that it is worth it.
    pub fn load_flags(&self, pids: &[i32]) -> Option<JoinHandle<Result<MappingFlags>>> {
        let bytes: u64 = pids.iter().map(|pid| proc::private_bytes(*pid)).sum();
        (self.flags.is_none() && bytes > WORTH_FLAGS).then(|| std::thread::spawn(MappingFlags::load))
    }

    /// It was loaded.
    pub fn set_flags(&mut self, flags: MappingFlags) {
        self.flags = Some(flags);
    }

    /// Reads flags of mappings, unless there is only smaps.
    pub fn flags(&self) -> Option<&MappingFlags> {
        self.flags.as_ref()
    }

    /// Has this range of addresses of a process that was cut huge pages?
    pub fn has_huge(&self, pid: i32, start: u64, end: u64) -> bool {
        let size = PAGE_SIZE as u64;
        self.spaces.get(&pid).is_some_and(|space| !space.huge.within(start / size..end / size).is_empty())
    }

    /// What took how long.
    pub fn times(&self) -> &[PhaseTime] {
        &self.times
    }

    fn took(&mut self, name: &str, start: Instant) {
        let us = start.elapsed().as_micros() as u64;
        match self.times.last_mut().filter(|last| last.phase == name && name == "list") {
            // Of all processes together.
            Some(last) => last.us += us,
            None => self.times.push(PhaseTime { phase: name.to_owned(), us }),
        }
    }

    /// Does it build on an older checkpoint?
    pub fn is_incremental(&self) -> bool {
        self.base.is_some() && self.spaces.values().any(|space| space.base.is_some())
    }

    /// Bytes that can be copied in the freeze.
    fn budget(&self) -> u64 {
        (self.rate * self.options.max_pause.as_secs_f64()) as u64
    }

    fn new_object(&mut self) -> MemoryId {
        self.next += 1;
        MemoryId(self.next - 1)
    }

    /// The space of a process, made when it is seen for the first time.
    fn space(&mut self, pid: i32) -> Result<&mut Space> {
        if !self.spaces.contains_key(&pid) {
            let mut space = Space::new(pid, self.new_object())?;
            if self.cow.as_ref().is_some_and(Cow::wants_asking) {
                space.want_asking();
            }
            if let Some(kept) = self.kept.remove(&pid).filter(|kept| kept.started == space.started) {
                space.take_up(kept.tracker, kept.memory, kept.modified);
            }
            self.spaces.insert(pid, space);
        }
        self.spaces.get_mut(&pid).context("it was just made")
    }

    fn can_copy_before_write(&self) -> bool {
        !self.options.stop && self.options.way != Way::Stop
    }

    fn choose_guard(&mut self) -> Result<()> {
        self.cow = Cow::choose(self.options.way)?;
        if self.cow.as_ref().is_some_and(Cow::wants_asking) {
            // Those that were seen already get what they lack with the next look.
            self.spaces.values_mut().for_each(Space::want_asking);
        }
        Ok(())
    }

    /// Bytes that the freeze will have to copy.
    fn expected(&self) -> u64 {
        let tracked = self.spaces.values().filter(|space| space.is_tracked());
        let listed = tracked.map(|space| space.lists.current().bytes()).sum::<u64>() * 2;
        let most = if self.can_copy_before_write() { self.budget() } else { u64::MAX };
        listed.min(most) + self.spaces.values().map(Space::untracked_bytes).sum::<u64>()
    }

    /// The cut begins. What was begun before and did not come about is undone.
    pub fn begin_cut(&mut self) {
        self.files.clear();
        match self.before_cut {
            None => self.before_cut = Some((self.staging.mark(), self.next)),
            Some((mark, next)) => {
                self.staging.back_to(mark);
                self.next = next;
                self.spaces.retain(|_, space| space.id.0 < next);
                self.spaces.values_mut().for_each(Space::uncut);
            }
        }
    }

    /// The cut of one process, which `started` so many ticks after the node.
    pub fn cut(&mut self, process: &mut FrozenProcess, maps: &Maps, started: u64) -> Result<MemoryId> {
        let start = Instant::now();
        let mut finder = std::mem::take(&mut self.finder);
        let space = self.space(process.pid)?;
        space.cut(process, &mut finder, maps)?;
        space.started = started;
        let id = space.id;
        self.finder = finder;
        self.took("list", start);
        Ok(id)
    }

    /// Copies a file, or shared memory, whole.
    pub fn copy_file(&mut self, file: &File) -> Result<MemoryId> {
        let id = self.new_object();
        self.files.push(id);
        self.staging.copy_file(id, file)?;
        Ok(id)
    }

    /// When all processes are cut: copies what must be copied now, and guards the rest.
    pub fn copy_in_cut(&mut self) -> Result<()> {
        // The others were seen earlier, and have ended.
        self.spaces.retain(|_, space| !space.own.is_empty());
        for space in self.spaces.values_mut() {
            // Written once, and dropped since.
            let gone = space.lists.previous().difference(&space.own);
            space.lists.save(&gone);
        }
        if self.options.stop {
            return Ok(());
        }
        let start = Instant::now();
        let listed = |space: &Space| space.lists.previous().bytes();
        let tracked: u64 = self.spaces.values().filter(|space| space.is_tracked()).map(listed).sum();
        let guarded = tracked > self.budget() && self.can_copy_before_write();
        if guarded {
            self.leave_unguarded();
        }
        if let Some(cow) = self.cow.as_mut().filter(|_| guarded) {
            let guardable: Vec<&Space> = self.spaces.values().filter(|space| space.is_tracked()).collect();
            cow.begin(&guardable).context("guarding what is not copied yet")?;
        }
        let mut now = Vec::new();
        for space in self.spaces.values() {
            let later = self.cow.as_ref().map(|cow| cow.guarded(space.pid)).unwrap_or_default();
            now.push((space.pid, space.lists.previous().difference(&later)));
        }
        let wanted: Vec<_> = now.iter().flat_map(|(pid, pages)| self.spaces[pid].origins(pages)).collect();
        self.staging.copy(&wanted)?;
        for (pid, pages) in &now {
            if let Some(space) = self.spaces.get_mut(pid) {
                space.statistics.cut += pages.bytes();
                space.lists.save(pages);
            }
        }
        self.took("copy", start);
        Ok(())
    }

    /// What is copied in the cut although others are guarded: when a mapping goes, or a process, what was not copied of
    /// it is lost. Small ones go soonest: stacks of threads, blocks of allocators, processes that do not live long.
    fn leave_unguarded(&mut self) {
        let room = self.budget() / 2;
        let mut small: Vec<(u64, i32, PageSet)> = Vec::new();
        for space in self.spaces.values().filter(|space| space.is_tracked()) {
            small.extend(space.listed(SMALL).map(|pages| (pages.bytes(), space.pid, pages)));
        }
        small.sort_unstable_by_key(|(bytes, pid, _)| (*bytes, *pid));
        let mut copied = 0;
        let little = small.iter().take_while(|(bytes, ..)| {
            copied += bytes;
            copied <= room
        });
        let mut unguarded: BTreeMap<i32, Vec<Range<u64>>> = BTreeMap::new();
        for (_, pid, pages) in little {
            unguarded.entry(*pid).or_default().extend_from_slice(pages.ranges());
        }
        for (pid, lost) in &self.options.lost {
            unguarded.entry(*pid).or_default().extend_from_slice(around(lost).ranges());
        }
        for (pid, ranges) in unguarded {
            if let Some(space) = self.spaces.get_mut(&pid) {
                space.leave_unguarded(ranges.into_iter().collect());
            }
        }
    }

    /// Bytes that the checkpoint will have to store.
    pub fn bytes(&self) -> u64 {
        self.staging.bytes() + self.spaces.values().map(|space| space.lists.previous().bytes()).sum::<u64>()
    }

    /// Hands everything to the store: what is not copied yet, the copies, and where the rest is in the base.
    ///
    /// # Errors
    /// [`cow::Lost`]: old content was overwritten by something that nobody could guard against.
    pub fn save(&mut self, part: &mut PartWriter) -> Result<()> {
        if let Some(cow) = self.cow.take() {
            let start = Instant::now();
            if cow.is_guarding() {
                let held_back = cow.save(&mut self.spaces, &mut self.staging, part, &self.pids)?;
                self.took("copy before write", start);
                if !held_back.is_zero() {
                    let us = held_back.as_micros() as u64;
                    self.times.push(PhaseTime { phase: "held back".to_owned(), us });
                }
            }
        }
        self.copy_frozen(part)?;
        self.staging.save(part)?;
        self.files.iter().try_for_each(|id| self.staging.declare(*id, part))?;
        for space in self.spaces.values_mut() {
            ensure!(space.lists.previous().is_empty(), "pages of process {} were not saved", space.pid);
            space.count();
            self.staging.declare(space.id, part)?;
            // Copied early, and dropped before the cut.
            for range in space.lists.modified().difference(&space.own).ranges() {
                part.absent(space.id, range.start, (range.end - range.start) as u32)?;
            }
            let unchanged = space.own.difference(&space.lists.modified());
            if unchanged.is_empty() {
                continue;
            }
            let (base, memory) =
                self.base.as_ref().zip(space.base).context("pages count as unchanged, but since when?")?;
            let map = base.page_map(memory)?;
            let mut found = 0;
            for range in unchanged.ranges() {
                let runs: Vec<_> = pages::slice(map, range.start, range.end).collect();
                found += runs.iter().map(|run| u64::from(run.count.get())).sum::<u64>();
                part.inherit(space.id, base, &runs)?;
            }
            ensure!(
                found == unchanged.pages(),
                "{} pages of process {} are not in the checkpoint that this one builds on",
                unchanged.pages() - found,
                space.pid
            );
        }
        Ok(())
    }

    /// What a job that stays frozen has left for now.
    fn copy_frozen(&mut self, part: &mut PartWriter) -> Result<()> {
        let todo = streamed(self.spaces.values().map(|space| (space.pid, space.lists.previous())));
        if todo.is_empty() {
            return Ok(());
        }
        let spaces = &mut self.spaces;
        self.staging.stream(STREAMED, todo, part, |staging, (pid, piece)| {
            let space = spaces.get_mut(&pid).context("it was there at the cut")?;
            staging.copy(&space.origins(&piece))?;
            space.statistics.cut += piece.bytes();
            space.lists.save(&piece);
            Ok(())
        })
    }

    /// What was done, by process.
    pub fn statistics(&self) -> impl Iterator<Item = (i32, Statistics)> + '_ {
        self.spaces.values().map(|space| (space.pid, space.statistics))
    }

    /// The end of the dump, with what is to be kept for the next one. If the checkpoint was not committed, everything
    /// that was modified is on the lists again, relative to the old base.
    pub fn end(self, committed: bool) -> Kept {
        let mut all: Vec<KeptSpace> = if committed { Vec::new() } else { self.kept.into_values().collect() };
        for mut space in self.spaces.into_values() {
            match committed {
                true => space.lists.commit(),
                false => space.lists.abort(),
            }
            space.note_unnoticed();
            let memory = if committed { Some(space.id) } else { space.base };
            let (pid, started, modified) = (space.pid, space.started, space.lists.modified());
            if let (Some(memory), Some(tracker)) = (memory, space.into_tracker()) {
                all.push(KeptSpace { pid, started, memory, modified, tracker });
            }
        }
        Kept { spaces: all, flags: self.flags }
    }
}

/// These pages and their surroundings.
fn around(pages: &PageSet) -> PageSet {
    let wide = AROUND / PAGE_SIZE as u64;
    pages.ranges().iter().map(|range| range.start.saturating_sub(wide)..range.end + wide).collect()
}

/// What is copied at a time of these lists, with the process that each is of.
fn streamed<'a>(lists: impl Iterator<Item = (i32, &'a PageSet)>) -> Vec<(i32, PageSet)> {
    lists.flat_map(|(pid, list)| list.pieces(STREAMED).into_iter().map(move |piece| (pid, piece))).collect()
}

/// Bound for copies while the job runs: a quarter of the memory that is free.
fn staging_limit() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
    let free: u64 = free.and_then(|free| free.parse().ok()).unwrap_or(1 << 20);
    (free << 10) / 4
}
