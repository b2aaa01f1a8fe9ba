//! What is done before the cut, while the job runs.
//!
//! What was modified is copied, and what was written meanwhile again, as long as the list shrinks. Only the looks at the
//! page tables stop the job, each for a few milliseconds. A job that writes faster than it could be copied is not copied
//! ahead: its pages are guarded from the cut on, and looked at once before.

use super::{MemoryDump, SPARE, STREAMED, Way, streamed};
use crate::memory::cow::Cow;
use crate::memory::page_set::PageSet;
use crate::memory::space::Space;
use crate::memory::staging::Staging;
use crate::memory::tracker::LOOK;
use crate::store::PartWriter;
use crate::tracee::freeze::Frozen;
use crate::tracee::proc;
use anyhow::{Context as _, Result};
use ckpt_common::image::PAGE_SIZE;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Most rounds of copying before the cut.
const ROUNDS: usize = 8;
/// A round is worth it if the list shrinks to less than this part of it, in per cent.
const SHRINKS: u64 = 70;
/// Time between two looks at a sample.
const SAMPLE: Duration = Duration::from_millis(10);
/// Copying ahead is not worth it where more than this part of it would be written again meanwhile: it would be copied,
/// and often stored, twice.
const FUTILE: f64 = 0.1;
/// The same where each first write to a guarded page waits for us.
const FUTILE_IF_ASKED: f64 = 0.5;
/// Less than this part is stored twice without regret.
const LITTLE: f64 = 0.1;
/// A testing aid: with this in the environment, much memory is saved while it is copied, whatever is written meanwhile.
const AT_ONCE: &str = "CKPT_FAULT_AT_ONCE";
/// Bytes per second that the store takes, about.
const SAVING: f64 = 5e8;

impl MemoryDump {
    /// Copies what was modified while the job runs, until little is left or no headway is made.
    pub fn save_early(&mut self, pids: &[i32], part: &mut PartWriter) -> Result<()> {
        self.pids = pids.to_vec();
        // A way that was asked for by name must be there; what else there is takes time to find out.
        if !self.options.stop && matches!(self.options.way, Way::Bpf | Way::Uffd) {
            self.choose_guard()?;
        }
        let listed = self.sample(pids)?;
        let pace = if listed > 2 * self.budget() { self.pace(pids)? } else { None };
        // Part of what was copied that would be written again by the time that the last of it is.
        let again = |bytes_per_second: f64| pace.map(|pace| pace * listed as f64 / bytes_per_second);
        // What the staging memory does not hold is copied as fast as the store takes it.
        let copied = if listed > self.staging.room() { SAVING } else { self.rate };
        let forced = std::env::var_os(AT_ONCE).is_some();
        let futile = !forced && self.is_futile(again(copied))?;
        if !futile {
            let little = again(SAVING).is_some_and(|part| part < LITTLE);
            let at_once = listed > 2 * STREAMED && (little || forced);
            self.copy_in_rounds(pids, part, at_once)?;
        }
        if self.options.stop {
            // It is copied piece by piece, when there is time.
            return Ok(());
        }
        let listed = self.spaces.values().map(|space| space.lists.current().bytes()).sum::<u64>();
        let ready = self.can_copy_before_write() && (futile || listed > self.budget() / 2);
        if ready && self.cow.is_none() {
            self.choose_guard()?;
        }
        if let Some(cow) = self.cow.as_mut().filter(|_| ready) {
            let start = Instant::now();
            let pages = pids.iter().map(|pid| proc::private_bytes(*pid) / PAGE_SIZE as u64).sum();
            // What was not written in the last round may be before the cut.
            let listed = self.spaces.values().map(|space| space.lists.modified().pages()).sum();
            cow.prepare(pages, if futile { pages } else { listed })?;
            self.took("guard", start);
        }
        self.staging.prepare(self.expected() + SPARE);
        if ready {
            // Making ready took its time. What was written meanwhile is listed now, or the freeze would do it.
            if !futile {
                self.copy_current(part)?;
            }
            self.look(pids)?;
        }
        Ok(())
    }

    /// Is nothing to be copied ahead, where this part of it would be written again meanwhile?
    fn is_futile(&mut self, again: Option<f64>) -> Result<bool> {
        let Some(again) = again.filter(|part| *part > FUTILE && self.can_copy_before_write()) else {
            return Ok(false);
        };
        if self.cow.is_none() {
            self.choose_guard()?;
        }
        let most = |cow: &Cow| if cow.wants_asking() { FUTILE_IF_ASKED } else { FUTILE };
        Ok(self.cow.as_ref().is_some_and(|cow| again > most(cow)))
    }

    /// With `at_once`, the first round goes to the store while it is copied.
    fn copy_in_rounds(&mut self, pids: &[i32], part: &mut PartWriter, at_once: bool) -> Result<()> {
        let mut before = u64::MAX;
        for round in 0..ROUNDS {
            self.look(pids)?;
            let tracked = self.spaces.values().filter(|space| space.is_tracked());
            let now: u64 = tracked.map(|space| space.lists.current().bytes()).sum();
            let shrinks = now < before / 100 * SHRINKS;
            if now <= self.budget() / 2 || (!shrinks && self.can_copy_before_write()) {
                break;
            }
            match at_once && round == 0 {
                true => self.stream_current(part)?,
                false => self.copy_current(part)?,
            }
            // What is written while so little is copied, the cut finds as well as another look.
            if !shrinks || now <= self.budget() {
                break;
            }
            before = now;
        }
        Ok(())
    }

    /// How much of its memory the job begins to rewrite, as a part of it by second. Found out with a sample, which costs
    /// the job far less than a look at all of its memory. Pages that are written all the time are written again at once:
    /// what counts is how many join them. `None` if there is no large memory that is tracked.
    fn pace(&mut self, pids: &[i32]) -> Result<Option<f64>> {
        let start = Instant::now();
        let mut finder = std::mem::take(&mut self.finder);
        let mut frozen = Frozen::freeze(pids).context("stopping the job for a look at its memory")?;
        let deadline = Instant::now() + LOOK;
        for process in frozen.processes.values_mut().filter(|process| !process.threads.is_empty()) {
            self.space(process.pid)?.begin_sample(process, &mut finder, deadline)?;
        }
        self.finder = finder;
        frozen.thaw().context("letting the job run on")?;
        self.took("sample", start);
        let mut seen = [(0.0, 0.0); 2];
        for (share, at) in &mut seen {
            std::thread::sleep(SAMPLE);
            let mut looks = self.spaces.values().map(Space::look_at_sample);
            let (own, written) = looks.try_fold((0, 0), |(own, written), look| {
                look.map(|(more_own, more_written)| (own + more_own, written + more_written))
            })?;
            if own == 0 {
                return Ok(None);
            }
            (*share, *at) = (written as f64 / own as f64, start.elapsed().as_secs_f64());
        }
        let [(first, from), (second, to)] = seen;
        Ok(Some((second - first).max(0.0) / (to - from)))
    }

    /// Bytes that were modified since the base, or, where there is none, since they were copied ahead. The job runs,
    /// and nothing is protected.
    pub fn sample(&mut self, pids: &[i32]) -> Result<u64> {
        let since_base = self.base.is_some();
        let mut bytes = 0;
        for pid in pids {
            // One that has ended has nothing to save.
            let Ok(space) = self.space(*pid) else { continue };
            let (Ok(seen), tracked) = (space.peek(), space.is_tracked()) else { continue };
            let listed = if since_base { space.lists.modified() } else { space.lists.current().clone() };
            let modified =
                if tracked { seen.written.union(&listed).intersection(&seen.own) } else { seen.own };
            bytes += modified.bytes();
        }
        Ok(bytes)
    }

    /// Looks at all processes, in as many short freezes as it takes.
    fn look(&mut self, pids: &[i32]) -> Result<()> {
        // All of them may be more than one freeze has the time for.
        let mut complete = BTreeSet::new();
        loop {
            let start = Instant::now();
            let mut frozen = Frozen::freeze(pids).context("stopping the job for a look at its memory")?;
            let looked = self.look_at(&mut frozen, &mut complete, Instant::now() + LOOK);
            frozen.thaw().context("letting the job run on")?;
            self.took("look", start);
            if looked? {
                return Ok(());
            }
        }
    }

    /// Looks at those that are not `complete` yet, until `deadline`; at one of them at least. Are all complete?
    fn look_at(
        &mut self,
        frozen: &mut Frozen,
        complete: &mut BTreeSet<i32>,
        deadline: Instant,
    ) -> Result<bool> {
        let mut finder = std::mem::take(&mut self.finder);
        let mut all = true;
        for process in frozen.processes.values_mut().filter(|process| !process.threads.is_empty()) {
            if complete.contains(&process.pid) {
                continue;
            }
            let space = self.space(process.pid)?;
            match space.look(process, &mut finder, deadline)? {
                true => drop(complete.insert(process.pid)),
                false => all = false,
            }
            if !all && Instant::now() > deadline {
                break;
            }
        }
        self.finder = finder;
        Ok(all)
    }

    /// Copies the current lists of the running job, by as much at a time as there is room for.
    fn copy_current(&mut self, part: &mut PartWriter) -> Result<()> {
        let start = Instant::now();
        let mut bytes = 0;
        for space in self.spaces.values_mut().filter(|space| space.is_tracked()) {
            let list = space.lists.current().clone();
            for piece in list.pieces(self.staging.room().clamp(SPARE, 1 << 30)) {
                if self.staging.room() < piece.bytes() {
                    self.staging.save(part)?;
                }
                bytes += copy_ahead(space, &mut self.staging, &piece)?;
            }
        }
        self.took("copy ahead", start);
        if bytes > SPARE {
            self.rate = bytes as f64 / start.elapsed().as_secs_f64();
        }
        Ok(())
    }

    /// The same, with the store taking the copies meanwhile: that takes longer than copying alone, but not as long as one
    /// after the other.
    fn stream_current(&mut self, part: &mut PartWriter) -> Result<()> {
        let start = Instant::now();
        let tracked = self.spaces.values().filter(|space| space.is_tracked());
        let todo = streamed(tracked.map(|space| (space.pid, space.lists.current())));
        let spaces = &mut self.spaces;
        self.staging.stream(STREAMED, todo, part, |staging, (pid, piece)| {
            let space = spaces.get_mut(&pid).context("it was there a moment before")?;
            copy_ahead(space, staging, &piece).map(drop)
        })?;
        self.took("copy and save ahead", start);
        Ok(())
    }
}

/// Copies pages of a running process; gives the bytes that were there.
fn copy_ahead(space: &mut Space, staging: &mut Staging, pages: &PageSet) -> Result<u64> {
    let wanted = space.origins(pages);
    let failed = staging.copy_some(&wanted)?;
    let failed: PageSet = failed.into_iter().map(|(_, page)| page..page + 1).collect();
    let copied: PageSet = wanted
        .iter()
        .flat_map(|wanted| &wanted.ranges)
        .map(|(start, end)| start / PAGE_SIZE as u64..end / PAGE_SIZE as u64)
        .collect();
    let copied = copied.difference(&failed);
    space.statistics.presaved += copied.bytes();
    space.lists.save_early(&copied);
    Ok(copied.bytes())
}
