//! Copy before write: a consistent copy of a list of pages while the program runs and writes to them.
//!
//! At the cut the pages are protected against writes, and a [`Guard`] begins to watch over them: when the program is
//! about to write to one that is still on the list, the guard saves its old content first. Meanwhile [`Cow::save`]
//! copies the list in order. What it has copied counts only if the page is still protected *after* the copy: then it
//! was not written between the cut and that moment. Otherwise the old content must have come from the guard; if it
//! has not (the page was written by direct I/O, dropped, unmapped), it is lost, and so is this attempt ([`Lost`]):
//! nothing is saved that is not the memory at the cut.

mod bpf;
mod uffd;

use super::page_set::PageSet;
use super::space::Space;
use super::staging::Staging;
use super::tracker::{self, LOOK};
use crate::store::PartWriter;
use crate::sys::task::Urgent;
use crate::tracee::freeze::Frozen;
use anyhow::{Context as _, Result};
use ckpt_common::image::PAGE_SIZE;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Bytes that are copied between two looks at what the guard has saved.
const BATCH: u64 = 512 << 10;

/// What happens to pages that cannot be copied in the freeze.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// What costs the program least, of what the kernel offers.
    #[default]
    Auto,
    /// A BPF program on page faults copies the old content.
    Bpf,
    /// Write faults wait for us to copy the old content.
    Uffd,
    /// The freeze lasts until everything is copied.
    Stop,
}

/// Old content of pages was overwritten, or gone with its process, before it could be saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
#[error("{} were overwritten or unmapped before they could be copied", self.what())]
pub struct Lost(pub BTreeMap<i32, PageSet>);

impl Lost {
    fn what(&self) -> String {
        let one = |(pid, pages): (&i32, &PageSet)| {
            let first = pages.ranges().first().map_or(0, |range| range.start * PAGE_SIZE as u64);
            format!("{} pages of process {pid}, from {first:#x} on,", pages.pages())
        };
        self.0.iter().map(one).collect::<Vec<_>>().join(" ")
    }
}

/// Takes old content: process, page number, content of one or more pages.
type Sink<'a> = &'a mut dyn FnMut(i32, u64, &[u8]) -> Result<()>;

/// Watches over protected pages.
trait Guard: fmt::Debug {
    /// Makes ready what takes longer than a freeze may. `pages`: how many the processes have; `listed`: how many of
    /// them are on the list, about.
    fn prepare(&mut self, pages: u64, listed: u64) -> Result<()>;

    /// Begins; the processes are stopped. Gives the pages that are guarded: what is not must be copied now.
    fn begin(&mut self, spaces: &[&Space]) -> Result<BTreeMap<i32, PageSet>>;

    /// Hands over some of the old content that it has saved so far; lets programs go on that wait for that. Is there
    /// more?
    fn deliver(&mut self, spaces: &BTreeMap<i32, Space>, sink: Sink<'_>) -> Result<bool>;

    /// Has it little room left for old content? Then the job must wait until some was handed over.
    fn is_crowded(&self) -> bool;

    /// Which of these pages are still on the list: of the others it has saved the old content.
    fn waiting(&self, pid: i32, pages: &PageSet) -> PageSet;

    /// These pages are saved: they need not be watched any more.
    fn release(&mut self, pid: i32, pages: &PageSet);

    /// Everything is saved. Writes are tracked as before; gives what was written unnoticed by the trackers.
    fn end(self: Box<Self>, spaces: &BTreeMap<i32, Space>, pids: &[i32]) -> Result<BTreeMap<i32, PageSet>>;

    /// Does the program wait for us at its first write to a page, for as long as it takes?
    fn is_patient(&self) -> bool;
}

/// Pages that are guarded while the program runs.
#[derive(Debug)]
pub struct Cow {
    guard: Box<dyn Guard>,
    guarded: BTreeMap<i32, PageSet>,
}

impl Cow {
    /// The guard that goes with a way; none for [`Way::Stop`]. What the kernel offers is found out by trying.
    ///
    /// # Errors
    /// The way that was asked for by name is not to be had.
    pub fn choose(way: Way) -> Result<Option<Self>> {
        let guard: Box<dyn Guard> = match way {
            Way::Stop => return Ok(None),
            Way::Uffd => Box::<uffd::UffdGuard>::default(),
            Way::Bpf | Way::Auto => match bpf::probe() {
                Ok(()) => Box::<bpf::BpfGuard>::default(),
                Err(error) if way == Way::Bpf => {
                    return Err(error).context("guarding pages by a BPF program");
                }
                Err(error) => {
                    tracing::info!("pages are guarded by a userfaultfd: {error:#}");
                    Box::<uffd::UffdGuard>::default()
                }
            },
        };
        Ok(Some(Self { guard, guarded: BTreeMap::new() }))
    }

    /// Makes ready what takes longer than a freeze may. `pages`: how many the processes have; `listed`: how many of
    /// them are on the list, about.
    ///
    /// # Errors
    /// No memory.
    pub fn prepare(&mut self, pages: u64, listed: u64) -> Result<()> {
        self.guard.prepare(pages, listed)
    }

    /// Guards the previous lists of these spaces, whose processes are stopped.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn begin(&mut self, spaces: &[&Space]) -> Result<()> {
        self.guarded = self.guard.begin(spaces)?;
        Ok(())
    }

    /// Does the guard need a userfaultfd in each process that lets write faults wait?
    pub fn wants_asking(&self) -> bool {
        self.guard.is_patient()
    }

    /// Does anything wait to be saved?
    pub fn is_guarding(&self) -> bool {
        self.guarded.values().any(|pages| !pages.is_empty())
    }

    /// Pages of a process that need not be copied now.
    pub fn guarded(&self, pid: i32) -> PageSet {
        self.guarded.get(&pid).cloned().unwrap_or_default()
    }

    /// Saves everything that is guarded, while the job runs; gives the time that the job had to wait meanwhile because it
    /// overran its guard.
    ///
    /// # Errors
    /// [`Lost`]; no memory.
    pub fn save(
        mut self,
        spaces: &mut BTreeMap<i32, Space>,
        staging: &mut Staging,
        part: &mut PartWriter,
        pids: &[i32],
    ) -> Result<Duration> {
        // The program fills slots while we wait for a processor.
        let _urgent = Urgent::now();
        let mut delivered = Delivered::default();
        let mut copied: BTreeMap<i32, PageSet> = BTreeMap::new();
        // What is little is copied first: so fewer processes end before they are.
        let mut guarded: Vec<_> = self.guarded.iter().collect();
        guarded.sort_by_key(|(_, pages)| pages.pages());
        for (pid, pages) in guarded {
            let space = spaces.get(pid).context("it was there at the cut")?;
            for piece in pages.pieces(BATCH) {
                if staging.room() < 2 * BATCH {
                    make_room(&*self.guard, staging, part, pids)?;
                }
                let piece = self.guard.waiting(*pid, &piece);
                let mark = staging.mark();
                staging.copy_some(&space.origins(&piece))?;
                let intact = tracker::unwritten(space.pagemap(), &piece, space.maps())?;
                staging.keep_since(mark, &intact);
                self.guard.release(*pid, &intact);
                let all = copied.entry(*pid).or_default();
                intact.ranges().iter().for_each(|range| all.push(range.clone()));
                delivered.take(&mut *self.guard, spaces, staging)?;
                delivered.catch_up(&mut *self.guard, spaces, staging, pids)?;
            }
        }
        // Nothing is on the list any more, so nothing is added.
        while delivered.take(&mut *self.guard, spaces, staging)? {}
        let mut lost = BTreeMap::new();
        for (pid, pages) in &self.guarded {
            let saved = delivered.pages.remove(pid).unwrap_or_default().into_iter().collect::<PageSet>();
            let missing = pages.difference(&copied.remove(pid).unwrap_or_default()).difference(&saved);
            if !missing.is_empty() {
                lost.insert(*pid, missing);
                continue;
            }
            let space = spaces.get_mut(pid).context("it was there at the cut")?;
            space.statistics.before_write += saved.bytes();
            space.lists.save(pages);
        }
        if !lost.is_empty() {
            return Err(Lost(lost).into());
        }
        for (pid, written) in self.guard.end(spaces, pids)? {
            if let Some(space) = spaces.get_mut(&pid) {
                space.written_later = written;
            }
        }
        Ok(delivered.held_back)
    }
}

/// Pages whose old content the guard has saved, by process.
#[derive(Default)]
struct Delivered {
    pages: BTreeMap<i32, Vec<Range<u64>>>,
    /// How long the job had to wait for that.
    held_back: Duration,
}

impl Delivered {
    /// Where the job overruns its guard, it waits, for a few milliseconds at a time.
    fn catch_up(
        &mut self,
        guard: &mut dyn Guard,
        spaces: &BTreeMap<i32, Space>,
        staging: &mut Staging,
        pids: &[i32],
    ) -> Result<()> {
        while guard.is_crowded() {
            let frozen = Frozen::freeze(pids).context("stopping the job until old content is taken")?;
            let start = Instant::now();
            let mut more = Ok(true);
            while start.elapsed() < LOOK && matches!(more, Ok(true)) {
                more = self.take(guard, spaces, staging);
            }
            frozen.thaw().context("letting the job run on")?;
            self.held_back += start.elapsed();
            more?;
        }
        Ok(())
    }

    /// Takes of what the guard has saved since. Is there more?
    fn take(
        &mut self,
        guard: &mut dyn Guard,
        spaces: &BTreeMap<i32, Space>,
        staging: &mut Staging,
    ) -> Result<bool> {
        guard.deliver(spaces, &mut |pid, page, content| {
            let space = spaces.get(&pid).context("pages of an unknown process")?;
            self.pages.entry(pid).or_default().push(page..page + (content.len() / PAGE_SIZE) as u64);
            staging.add(space.id, page, content)
        })
    }
}

/// Hands copies to the store, which takes its time: a job that would overrun its guard meanwhile waits.
fn make_room(guard: &dyn Guard, staging: &mut Staging, part: &mut PartWriter, pids: &[i32]) -> Result<()> {
    let frozen = match guard.is_patient() {
        true => None,
        false => Some(Frozen::freeze(pids).context("stopping the job until there is room for copies")?),
    };
    let saved = staging.save(part);
    if let Some(frozen) = frozen {
        frozen.thaw().context("letting the job run on")?;
    }
    saved
}
