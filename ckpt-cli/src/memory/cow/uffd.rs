//! Old content saved before a write fault is answered: the program waits for us at the first write to a page.
//!
//! For the time of the saving, mappings with listed pages change from the tracker's userfaultfd, where the kernel lifts
//! protection by itself, to one where it asks. Whole mappings, never parts: a mapping that is split shows itself to the
//! program, whose mremap(2) works on whole ones only. All pages of these mappings are protected, so that writes to
//! unlisted pages are noticed, too.

use super::{Guard, Sink, Space};
use crate::memory::page_set::PageSet;
use crate::memory::tracker;
use crate::sys::userfaultfd::{Userfaultfd, mode};
use crate::tracee::freeze::Frozen;
use crate::tracee::{proc, rings};
use anyhow::{Context as _, Result};
use ckpt_common::image::PAGE_SIZE;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Pages that are saved and unprotected at one fault: what follows is often written next.
const AROUND: u64 = 16;

/// Time between two looks at faults while the job stops.
const BETWEEN_ANSWERS: Duration = Duration::from_micros(50);

/// What is guarded of one process.
#[derive(Debug, Default)]
struct Guarded {
    /// Mappings that were changed over, as addresses.
    mappings: Vec<(u64, u64)>,
    /// On the list, and not saved yet; by groups of [`AROUND`] pages, a bit for each.
    listed: HashMap<u64, u16>,
    /// Pages whose protection went for nothing.
    unprotected: PageSet,
}

/// Pages guarded by synchronous write faults.
#[derive(Debug, Default)]
pub(super) struct UffdGuard {
    processes: BTreeMap<i32, Guarded>,
}

fn bytes(range: &Range<u64>) -> (u64, u64) {
    (range.start * PAGE_SIZE as u64, range.end * PAGE_SIZE as u64)
}

impl Guarded {
    /// Changes the mappings of a stopped process over; gives the listed pages in them.
    fn begin(&mut self, space: &Space, asking: &Userfaultfd) -> Result<PageSet> {
        let Some(tracking) = space.tracker() else { return Ok(PageSet::default()) };
        let list = space.guardable();
        let mut guarded = PageSet::default();
        for map in space.maps().iter().filter(|map| tracker::is_tracked(map)) {
            let range = map.start / PAGE_SIZE as u64..map.end / PAGE_SIZE as u64;
            let listed = list.within(range.clone());
            if listed.is_empty() {
                continue;
            }
            let (start, end) = bytes(&range);
            // Of a kind that only the tracker can have, or none: it is copied now.
            if tracking.userfaultfd().unregister(start, end).is_err() {
                continue;
            }
            if asking.register(start, end, mode::WP).is_err() {
                tracking.userfaultfd().register(start, end, mode::WP).context("registering memory again")?;
                // Its protection is gone, so it cannot be told what will be written: everything counts.
                self.unprotected = self.unprotected.union(&space.own.within(range));
                continue;
            }
            self.mappings.push((start, end));
            asking.write_protect(start, end, true).context("protecting memory")?;
            listed.ranges().iter().for_each(|listed| guarded.push(listed.clone()));
        }
        for page in guarded.ranges().iter().cloned().flatten() {
            *self.listed.entry(page / AROUND).or_default() |= 1 << (page % AROUND);
        }
        Ok(guarded)
    }

    /// Listed pages of a group, which leave the list with this.
    fn take(&mut self, group: u64) -> PageSet {
        let bits = self.listed.remove(&group).unwrap_or_default();
        let pages = (0..AROUND).filter(|bit| bits & (1 << bit) != 0).map(|bit| group * AROUND + bit);
        pages.map(|page| page..page + 1).collect()
    }
}

impl UffdGuard {
    /// Stops the job. A thread may wait in the kernel for our answer to a write fault, where it cannot be stopped: so
    /// faults are answered until all have stopped.
    fn freeze(&self, spaces: &BTreeMap<i32, Space>, pids: &[i32]) -> Result<Frozen> {
        let asking: Vec<&Userfaultfd> =
            self.processes.keys().filter_map(|pid| spaces.get(pid)?.asking()).collect();
        let stopped = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stopped.load(Ordering::Relaxed) {
                    for asking in &asking {
                        for fault in asking.faults().unwrap_or_default() {
                            let page = fault.address / PAGE_SIZE as u64 * PAGE_SIZE as u64;
                            let answered = asking.write_protect(page, page + PAGE_SIZE as u64, false);
                            let _ = answered.or_else(|_| asking.wake(page, page + PAGE_SIZE as u64));
                        }
                    }
                    std::thread::sleep(BETWEEN_ANSWERS);
                }
            });
            let frozen = Frozen::freeze(pids);
            stopped.store(true, Ordering::Relaxed);
            Ok(frozen?)
        })
    }
}

impl Guard for UffdGuard {
    fn prepare(&mut self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn begin(&mut self, spaces: &[&Space]) -> Result<BTreeMap<i32, PageSet>> {
        let mut all = BTreeMap::new();
        for space in spaces {
            let Some(asking) = space.asking() else { continue };
            let guarded = self.processes.entry(space.pid).or_default();
            all.insert(space.pid, guarded.begin(space, asking)?);
        }
        Ok(all)
    }

    fn deliver(&mut self, spaces: &BTreeMap<i32, Space>, sink: Sink<'_>) -> Result<bool> {
        let mut content = vec![0; AROUND as usize * PAGE_SIZE];
        for (pid, guarded) in &mut self.processes {
            let Some((space, asking)) = spaces.get(pid).and_then(|space| Some((space, space.asking()?)))
            else {
                continue;
            };
            loop {
                let faults = asking.faults().context("reading faults")?;
                if faults.is_empty() {
                    break;
                }
                for fault in faults {
                    let page = fault.address / PAGE_SIZE as u64;
                    let group = page / AROUND;
                    let listed = guarded.take(group);
                    for range in listed.ranges() {
                        let (start, end) = bytes(range);
                        let content = &mut content[..(end - start) as usize];
                        // Protected pages stand still; one that was dropped is missing, which is noticed later.
                        if space.read(start, content).is_ok() {
                            let there = tracker::unwritten(
                                space.pagemap(),
                                &std::iter::once(range.clone()).collect(),
                                space.maps(),
                            )?;
                            for there in there.ranges() {
                                let from = ((there.start - range.start) as usize) * PAGE_SIZE;
                                let to = ((there.end - range.start) as usize) * PAGE_SIZE;
                                sink(*pid, there.start, &content[from..to])?;
                            }
                        }
                    }
                    let around = group * AROUND * PAGE_SIZE as u64;
                    let around = around..around + AROUND * PAGE_SIZE as u64;
                    let within =
                        guarded.mappings.iter().find(|(start, end)| (*start..*end).contains(&fault.address));
                    let (start, end) = within.map_or((around.start, around.end), |(start, end)| {
                        (around.start.max(*start), around.end.min(*end))
                    });
                    // Where the mapping is being changed or gone, whoever waits finds that out by itself.
                    if asking.write_protect(start, end, false).is_err() {
                        asking.wake(start, end).context("letting a program go on that waits for a page")?;
                    }
                }
            }
        }
        Ok(false)
    }

    fn is_crowded(&self) -> bool {
        // The program waits for us at each write.
        false
    }

    fn waiting(&self, pid: i32, pages: &PageSet) -> PageSet {
        let Some(guarded) = self.processes.get(&pid) else { return PageSet::default() };
        let listed = |page: &u64| {
            guarded.listed.get(&(page / AROUND)).is_some_and(|bits| bits & 1 << (page % AROUND) != 0)
        };
        let mut waiting = PageSet::default();
        for page in pages.ranges().iter().cloned().flatten().filter(listed) {
            waiting.push(page..page + 1);
        }
        waiting
    }

    fn release(&mut self, pid: i32, pages: &PageSet) {
        let Some(guarded) = self.processes.get_mut(&pid) else { return };
        for page in pages.ranges().iter().cloned().flatten() {
            if let Some(bits) = guarded.listed.get_mut(&(page / AROUND)) {
                *bits &= !(1 << (page % AROUND));
            }
        }
    }

    fn end(self: Box<Self>, spaces: &BTreeMap<i32, Space>, pids: &[i32]) -> Result<BTreeMap<i32, PageSet>> {
        let mut written = BTreeMap::new();
        let frozen = self.freeze(spaces, pids).context("stopping the job to track its memory as before")?;
        let mut result = Ok(());
        for (pid, guarded) in self.processes {
            let Some((space, asking, tracking)) =
                spaces.get(&pid).and_then(|space| Some((space, space.asking()?, space.tracker()?)))
            else {
                continue;
            };
            let mut pages = guarded.unprotected;
            // What a request under way writes late would be missed, if its pages were protected again. It is not
            // waited for: it may need our answer to a fault.
            let quiet = proc::maps(pid).is_ok_and(|maps| rings::are_quiet(pid, &maps));
            for (start, end) in guarded.mappings {
                let range = start / PAGE_SIZE as u64..end / PAGE_SIZE as u64;
                let all = PageSet::from_iter([range]);
                let changed = tracker::unwritten(space.pagemap(), &all, space.maps()).and_then(|unwritten| {
                    // Mappings may have been changed since; what is not registered counts as written the next time.
                    let _ = asking.unregister(start, end);
                    let _ = tracking.userfaultfd().register(start, end, mode::WP);
                    if !quiet {
                        // Unprotected, everything counts as written the next time.
                        return Ok(PageSet::default());
                    }
                    Ok(tracking.protect(space.pagemap(), start..end)?.difference(&unwritten))
                });
                match changed {
                    Ok(changed) => pages = pages.union(&changed),
                    Err(error) => result = result.and(Err(error)),
                }
            }
            written.insert(pid, pages);
        }
        frozen.thaw().context("letting the job run on")?;
        result.map(|()| written)
    }

    fn is_patient(&self) -> bool {
        true
    }
}
