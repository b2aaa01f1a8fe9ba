//! Old content saved by a BPF program on the page-fault tracepoints: no context switch, the program just goes on.
//!
//! The kernel's side is `ckpt-ebpf/src/cow.rs`. Slots for old content are a ring: the program in the kernel takes the
//! next one, and we empty them in that order.

use super::{Guard, Sink, Space};
use crate::memory::page_set::PageSet;
use crate::sys::{bpf_object, shared_map::SharedMap};
use crate::tracee::proc;
use anyhow::{Context as _, Result, ensure};
use aya::Ebpf;
use aya::programs::BtfTracePoint;
use ckpt_common::bpf::{
    COW_MAX_NAMESPACES, COW_MAX_REGIONS, COW_RESERVE, CowControl, CowPage, CowRegion, PageState,
    PidNamespace, SlotOwner,
};
use nix::sys::stat::{major, minor, stat};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Slots: 32 to 256 MiB of old content on its way.
const SLOTS: std::ops::RangeInclusive<u64> = 8192..=65_536;
/// A testing aid: with this in the environment there are no more slots than the fewest.
const FEW_SLOTS: &str = "CKPT_FAULT_FEW_SLOTS";
/// Slots that are emptied before something else is done: 4 MiB.
const AT_A_TIME: u64 = 1024;
/// Most pages that can be guarded: 256 GiB.
const MOST_PAGES: u64 = 1 << 26;
/// Gaps between listed pages up to this size are put into one region.
const GAP: u64 = 512;

/// Can such programs be loaded and attached here? Tried, with next to no memory for them.
pub(super) fn probe() -> Result<()> {
    Loaded::new(1, 1).map(drop)
}

/// Pages guarded by a BPF program.
#[derive(Debug, Default)]
pub(super) struct BpfGuard(Option<Loaded>);

/// The programs, attached.
#[derive(Debug)]
struct Loaded {
    /// Detaches the programs when it is dropped.
    _programs: Ebpf,
    control: SharedMap<CowControl>,
    regions: SharedMap<CowRegion>,
    pages: SharedMap<u64>,
    slots: SharedMap<CowPage>,
    owners: SharedMap<u64>,
    /// What the regions mean: first word, PID, first page, pages.
    meaning: Vec<(u64, i32, u64, u64)>,
}

impl Loaded {
    /// Loads and attaches the programs, with nothing guarded yet.
    fn new(pages: u64, slots: u64) -> Result<Self> {
        let sizes = [("COW_PAGES", pages as u32), ("COW_SLOTS", slots as u32), ("COW_OWNERS", slots as u32)];
        let mut programs = bpf_object::load(&sizes)?;
        let btf = bpf_object::kernel_types()?;
        for (name, tracepoint) in
            [("cow_fault_user", "page_fault_user"), ("cow_fault_kernel", "page_fault_kernel")]
        {
            let program: &mut BtfTracePoint =
                programs.program_mut(name).context("not in the object")?.try_into().context(name)?;
            program.load(tracepoint, btf).with_context(|| format!("load the BPF program {name}"))?;
            program.attach().with_context(|| format!("attach the BPF program {name}"))?;
        }
        let control = shared(&programs, "COW_CONTROL", 1)?;
        control.set(0, CowControl { slots, ..CowControl::default() });
        Ok(Self {
            control,
            regions: shared(&programs, "COW_REGIONS", COW_MAX_REGIONS as usize)?,
            pages: shared(&programs, "COW_PAGES", pages as usize)?,
            slots: shared(&programs, "COW_SLOTS", slots as usize)?,
            owners: shared(&programs, "COW_OWNERS", slots as usize)?,
            meaning: Vec::new(),
            _programs: programs,
        })
    }

    fn word(&self, pid: i32, page: u64) -> Option<usize> {
        // Ascending by process and page.
        let behind = self.meaning.partition_point(|(_, owner, start, _)| (*owner, *start) <= (pid, page));
        let (first, owner, start, count) = *self.meaning.get(behind.checked_sub(1)?)?;
        if owner != pid || page >= start + count {
            return None;
        }
        Some((first + page - start) as usize)
    }
}

fn shared<T: crate::sys::shared_map::Plain>(
    programs: &Ebpf,
    name: &str,
    length: usize,
) -> Result<SharedMap<T>> {
    let map = programs.map(name).with_context(|| format!("the object has no map {name}"))?;
    let aya::maps::Map::Array(data) = map else { anyhow::bail!("{name} is no array") };
    SharedMap::new(data.fd().as_fd(), length).with_context(|| format!("mapping {name}"))
}

/// Regions with gaps of less than [`GAP`] pages closed.
fn closed(pages: &PageSet) -> PageSet {
    let mut closed = PageSet::default();
    let mut end = 0;
    for range in pages.ranges() {
        let start = if !closed.is_empty() && range.start - end < GAP { end } else { range.start };
        closed.push(start..range.end);
        end = range.end;
    }
    closed
}

/// The PID namespace of a process, and its PID in there.
fn namespaced(pid: i32) -> Result<(PidNamespace, u32)> {
    let stat = stat(format!("/proc/{pid}/ns/pid").as_str()).context("looking at the PID namespace")?;
    let inner = proc::inner(pid)?;
    let device = major(stat.st_dev) << 20 | minor(stat.st_dev);
    Ok((PidNamespace { device, inode: stat.st_ino }, inner as u32))
}

impl Loaded {
    fn begin(&mut self, spaces: &[&Space]) -> Result<BTreeMap<i32, PageSet>> {
        let mut guarded = BTreeMap::new();
        let mut namespaces: Vec<PidNamespace> = Vec::new();
        let mut regions = Vec::new();
        let mut next = 0;
        for space in spaces {
            let (namespace, pid) = namespaced(space.pid)?;
            let number = namespaces.iter().position(|known| *known == namespace).unwrap_or_else(|| {
                namespaces.push(namespace);
                namespaces.len() - 1
            });
            let list = space.guardable();
            let mut taken = PageSet::default();
            for range in closed(&list).ranges() {
                let fits = next + (range.end - range.start) <= self.pages.len() as u64
                    && regions.len() < COW_MAX_REGIONS as usize
                    && number < COW_MAX_NAMESPACES;
                if !fits {
                    // What is left is copied now instead.
                    break;
                }
                let process = (number as u64) << 32 | u64::from(pid);
                regions.push(CowRegion { process, start: range.start, end: range.end, first: next });
                self.meaning.push((next, space.pid, range.start, range.end - range.start));
                for listed in list.within(range.clone()).ranges() {
                    for page in listed.clone() {
                        self.pages.set((next + page - range.start) as usize, PageState::Listed as u64);
                    }
                    taken.push(listed.clone());
                }
                next += range.end - range.start;
            }
            guarded.insert(space.pid, taken);
        }
        namespaces.truncate(COW_MAX_NAMESPACES);
        regions.sort_unstable_by_key(|region| (region.process, region.start));
        for (at, region) in regions.iter().enumerate() {
            self.regions.set(at, *region);
        }
        let mut control = self.control.get(0);
        control.namespaces[..namespaces.len()].copy_from_slice(&namespaces);
        control.regions = regions.len() as u64;
        self.control.set(0, control);
        Ok(guarded)
    }

    /// Slots that are full, from and to.
    fn full(&self) -> std::ops::Range<u64> {
        let (taken, emptied) = self.control.progress();
        emptied.load(Ordering::Relaxed)..taken.load(Ordering::Acquire)
    }

    fn deliver(&mut self, sink: Sink<'_>) -> Result<bool> {
        let (_, emptied) = self.control.progress();
        let full = self.full();
        ensure!(full.end - full.start <= self.slots.len() as u64, "slots were taken that are not free");
        let (mut at, end) = (full.start, full.end.min(full.start + AT_A_TIME));
        while at < end {
            let slot = (at % self.slots.len() as u64) as usize;
            let owner = self.owners.word(slot);
            let mut looks = 0;
            let whose = loop {
                match owner.load(Ordering::Acquire) {
                    // A copy on another processor that takes less than a microsecond.
                    SlotOwner::EMPTY if looks < 10_000 => std::hint::spin_loop(),
                    // Unless it was interrupted, by us perhaps, who run before others.
                    SlotOwner::EMPTY => std::thread::sleep(Duration::from_micros(50)),
                    whose => break whose,
                }
                looks += 1;
            };
            if let Some(word) = whose.checked_sub(SlotOwner::FIRST) {
                let found = self.meaning.partition_point(|(first, ..)| *first <= word);
                let (first, pid, start, _) = self.meaning[found.saturating_sub(1)];
                sink(pid, start + word - first, self.slots.page(slot))?;
            }
            owner.store(SlotOwner::EMPTY, Ordering::Release);
            at += 1;
            emptied.store(at, Ordering::Release);
        }
        Ok(end < full.end)
    }

    fn waiting(&self, pid: i32, pages: &PageSet) -> PageSet {
        let mut waiting = PageSet::default();
        for range in pages.ranges() {
            let Some(first) = self.word(pid, range.start) else { continue };
            for (page, word) in range.clone().zip(first..) {
                if self.pages.word(word).load(Ordering::Acquire) == PageState::Listed as u64 {
                    waiting.push(page..page + 1);
                }
            }
        }
        waiting
    }

    fn release(&mut self, pid: i32, pages: &PageSet) {
        for range in pages.ranges() {
            // A range is a part of one region.
            let Some(first) = self.word(pid, range.start) else { continue };
            for word in first..first + (range.end - range.start) as usize {
                let (listed, free) = (PageState::Listed as u64, PageState::Free as u64);
                // Where the program was faster, its copy is the same as ours.
                let _ =
                    self.pages.word(word).compare_exchange(listed, free, Ordering::AcqRel, Ordering::Relaxed);
            }
        }
    }
}

impl Guard for BpfGuard {
    fn prepare(&mut self, pages: u64, listed: u64) -> Result<()> {
        let pages = (pages + pages / 8).clamp(1 << 12, MOST_PAGES);
        let slots = match std::env::var_os(FEW_SLOTS) {
            None => listed.next_power_of_two().clamp(*SLOTS.start(), *SLOTS.end()),
            Some(_) => *SLOTS.start(),
        };
        self.0 = Some(Loaded::new(pages, slots)?);
        Ok(())
    }

    fn begin(&mut self, spaces: &[&Space]) -> Result<BTreeMap<i32, PageSet>> {
        self.0.as_mut().map_or(Ok(BTreeMap::new()), |loaded| loaded.begin(spaces))
    }

    fn deliver(&mut self, _: &BTreeMap<i32, Space>, sink: Sink<'_>) -> Result<bool> {
        self.0.as_mut().map_or(Ok(false), |loaded| loaded.deliver(sink))
    }

    fn is_crowded(&self) -> bool {
        let crowded = |loaded: &Loaded| {
            let full = loaded.full();
            full.end - full.start > loaded.slots.len() as u64 / 4
        };
        self.0.as_ref().is_some_and(crowded)
    }

    fn waiting(&self, pid: i32, pages: &PageSet) -> PageSet {
        self.0.as_ref().map(|loaded| loaded.waiting(pid, pages)).unwrap_or_default()
    }

    fn release(&mut self, pid: i32, pages: &PageSet) {
        if let Some(loaded) = &mut self.0 {
            loaded.release(pid, pages);
        }
    }

    fn end(self: Box<Self>, _: &BTreeMap<i32, Space>, _: &[i32]) -> Result<BTreeMap<i32, PageSet>> {
        // The trackers saw everything.
        Ok(BTreeMap::new())
    }

    fn is_patient(&self) -> bool {
        false
    }
}

const _: () = assert!(*SLOTS.start() > 4 * COW_RESERVE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_gaps_are_closed() {
        let pages: PageSet = [5..6, 7..9, 600..601, 5000..5001].into_iter().collect();
        assert_eq!(closed(&pages).ranges(), [5..9, 600..601, 5000..5001]);
        let pages: PageSet = [5..6, 9..10, 400..401].into_iter().collect();
        assert_eq!(closed(&pages), PageSet::from_iter(std::iter::once(5..401)));
        assert!(closed(&PageSet::default()).is_empty());
    }
}
