//! Copies of pages, on their way from the job to the store.
//!
//! Copying is fast and compressing is slow, so pages are copied into memory of ours first and compressed from there.
//! That memory has a bound; who copies while the job runs waits at the bound until the store has taken some.
//! Memory for what is copied in the freeze is made before ([`Staging::prepare`]): faulting it in takes as long as the
//! copying itself.

use super::latest::{Run, latest};
use super::page_set::PageSet;
use crate::store::PartWriter;
use crate::sys::task::processors;
use crate::sys::{arena::Arena, memory};
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::{MemoryId, PAGE_SIZE};
use nix::unistd::{Whence, lseek};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Mutex, PoisonError};

/// What one thread copies at a time.
const PIECE: usize = 4 << 20;
/// What is handed to the store at a time.
const SAVED: usize = 1 << 20;
/// Size of an arena at least.
const ARENA: usize = 32 << 20;
/// More threads than this only fight for the memory's bandwidth.
const THREADS: usize = 4;
/// Where it is less, no further thread is worth its start.
const PER_THREAD: usize = 8 << 20;

/// Where pages are copied from.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// The process.
    pub pid: i32,
    /// Its /proc/PID/mem, which goes with the address space, not with the PID; it disregards protection.
    pub mem: &'a File,
    /// May the pages be read by process_vm_readv(2), which is faster and respects their protection?
    pub readable: bool,
}

/// Ranges of addresses that are to be copied for an object.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// The object.
    pub id: MemoryId,
    /// Where its pages are.
    pub origin: Origin<'a>,
    /// Which.
    pub ranges: Vec<(u64, u64)>,
}

/// A part of an arena.
#[derive(Clone, Copy, Debug)]
struct Place {
    arena: usize,
    start: usize,
}

/// Ranges that are to be copied, one behind the other, to one place.
#[derive(Debug)]
struct Copy<'a> {
    origin: Origin<'a>,
    id: MemoryId,
    ranges: Vec<(u64, usize)>,
    place: Place,
    len: usize,
}

/// How much was there at some moment.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    runs: usize,
    bytes: u64,
}

/// Staged pages of memory objects.
#[derive(Debug, Default)]
pub struct Staging {
    /// Each with the bytes taken from it.
    arenas: Vec<(Arena, usize)>,
    runs: Vec<Run>,
    bytes: u64,
    limit: u64,
    /// Memory objects that the part has been told of.
    declared: BTreeSet<MemoryId>,
}

impl Staging {
    /// Staging memory with a bound in bytes for what is copied while the job runs.
    pub fn new(limit: u64) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Makes memory ready for so many bytes. A failure is none: then the copying takes longer.
    pub fn prepare(&mut self, bytes: u64) {
        let Ok(bytes) = usize::try_from(bytes) else { return };
        let ready = self.make_room(bytes).and_then(|()| match self.arenas.last_mut() {
            Some((arena, used)) => arena.fault_in(*used, *used + bytes),
            None => Ok(()),
        });
        if let Err(error) = ready {
            tracing::debug!(%error, bytes, "memory for the copy is not made ready");
        }
    }

    /// A new arena, where the last has no room for so many bytes.
    fn make_room(&mut self, bytes: usize) -> std::io::Result<()> {
        if self.arenas.last().is_none_or(|(arena, used)| arena.bytes().len() - used < bytes) {
            self.arenas.push((Arena::new(bytes.max(ARENA))?, 0));
        }
        Ok(())
    }

    /// Bytes that may still be staged while the job runs.
    pub fn room(&self) -> u64 {
        self.limit.saturating_sub(self.bytes)
    }

    /// Bytes staged.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How much there is, for [`Self::back_to`].
    pub fn mark(&self) -> Mark {
        Mark { runs: self.runs.len(), bytes: self.bytes }
    }

    /// Forgets what was staged since.
    pub fn back_to(&mut self, mark: Mark) {
        self.runs.truncate(mark.runs);
        self.bytes = mark.bytes;
        for (index, (_, used)) in self.arenas.iter_mut().enumerate() {
            *used = self
                .runs
                .iter()
                .filter(|run| run.arena == index)
                .map(|run| run.start + run.len)
                .max()
                .unwrap_or(0);
        }
    }

    /// Of what was staged since, forgets all pages but these.
    pub fn keep_since(&mut self, mark: Mark, pages: &PageSet) {
        let since = self.runs.split_off(mark.runs);
        for run in since {
            let size = PAGE_SIZE as u64;
            let all = run.first_page..run.first_page + run.len as u64 / size;
            for kept in pages.within(all).ranges() {
                self.runs.push(run.clip(kept.start, kept.end));
            }
        }
    }

    /// Takes `len` bytes of the newest arena, or of a new one.
    fn take(&mut self, len: usize) -> Result<Place> {
        self.make_room(len).context("no memory for the copy of the job's memory")?;
        let arena = self.arenas.len() - 1;
        let used = &mut self.arenas[arena].1;
        *used += len;
        Ok(Place { arena, start: *used - len })
    }

    fn push(&mut self, id: MemoryId, first_page: u64, place: Place, len: usize) {
        self.bytes += len as u64;
        let Place { arena, start } = place;
        match self.runs.last_mut() {
            // One behind the other in the process and here.
            Some(last)
                if (last.id, last.arena, last.start + last.len) == (id, arena, start)
                    && last.first_page + (last.len / PAGE_SIZE) as u64 == first_page =>
            {
                last.len += len;
            }
            _ => self.runs.push(Run { id, first_page, arena, start, len }),
        }
    }

    /// Copies address ranges of stopped processes.
    ///
    /// # Errors
    /// A page that cannot be read.
    pub fn copy(&mut self, wanted: &[Wanted<'_>]) -> Result<()> {
        let failed = self.copy_with(wanted, processors())?;
        match failed.first() {
            Some((id, page)) => {
                let at = page * PAGE_SIZE as u64;
                let pid = wanted.iter().find(|wanted| wanted.id == *id).map_or(0, |wanted| wanted.origin.pid);
                bail!("memory of process {pid} at {at:#x} cannot be read")
            }
            None => Ok(()),
        }
    }

    /// Copies address ranges of processes that run. Pages that are not there any more are left out, and given back.
    ///
    /// # Errors
    /// No memory.
    pub fn copy_some(&mut self, wanted: &[Wanted<'_>]) -> Result<Vec<(MemoryId, u64)>> {
        // The job needs processors, too.
        self.copy_with(wanted, processors() / 2)
    }

    fn copy_with(&mut self, wanted: &[Wanted<'_>], threads: usize) -> Result<Vec<(MemoryId, u64)>> {
        let mut copies = Vec::new();
        for Wanted { id, origin, ranges } in wanted {
            self.note(*id, *origin, ranges, &mut copies)?;
        }
        let done = self.perform(&copies, threads)?;
        let mut failed = Vec::new();
        for (copy, mut bad) in copies.iter().zip(done) {
            bad.sort_unstable();
            let mut at = copy.place.start;
            for (start, len) in &copy.ranges {
                let mut from = 0;
                for page in bad.iter().filter(|page| (*start..start + *len as u64).contains(page)) {
                    let to = (page - start) as usize;
                    self.push_part(copy, *start, at, from..to);
                    from = to + PAGE_SIZE;
                    failed.push((copy.id, page / PAGE_SIZE as u64));
                }
                self.push_part(copy, *start, at, from..*len);
                at += len;
            }
        }
        Ok(failed)
    }

    fn push_part(&mut self, copy: &Copy<'_>, address: u64, at: usize, part: std::ops::Range<usize>) {
        if !part.is_empty() {
            let place = Place { start: at + part.start, ..copy.place };
            self.push(copy.id, (address + part.start as u64) / PAGE_SIZE as u64, place, part.len());
        }
    }

    fn note<'a>(
        &mut self,
        id: MemoryId,
        origin: Origin<'a>,
        ranges: &[(u64, u64)],
        copies: &mut Vec<Copy<'a>>,
    ) -> Result<()> {
        for &(start, end) in ranges {
            let mut at = start;
            while at < end {
                let len = PIECE.min((end - at) as usize);
                let place = self.take(len)?;
                match copies.last_mut() {
                    Some(last)
                        if last.id == id
                            && last.origin.is(&origin)
                            && (last.place.arena, last.place.start + last.len)
                                == (place.arena, place.start)
                            && last.len + len <= PIECE =>
                    {
                        last.ranges.push((at, len));
                        last.len += len;
                    }
                    _ => copies.push(Copy { origin, id, ranges: vec![(at, len)], place, len }),
                }
                at += len as u64;
            }
        }
        Ok(())
    }

    /// Copies with up to so many threads; gives for each copy the addresses of pages that could not be read.
    fn perform(&mut self, copies: &[Copy<'_>], threads: usize) -> Result<Vec<Vec<u64>>> {
        let bytes: usize = copies.iter().map(|copy| copy.len).sum();
        let mut work = Vec::with_capacity(copies.len());
        let mut rest = copies.iter().enumerate().peekable();
        // They are in the order of their places: each arena is cut from front to back.
        for (index, (arena, _)) in self.arenas.iter_mut().enumerate() {
            let (mut free, mut at) = (arena.bytes_mut(), 0);
            while let Some((number, copy)) = rest.next_if(|(_, copy)| copy.place.arena == index) {
                let (place, behind) = free[copy.place.start - at..].split_at_mut(copy.len);
                (free, at) = (behind, copy.place.start + copy.len);
                work.push((number, copy, place));
            }
        }
        let threads = threads.min(THREADS).min(bytes.div_ceil(PER_THREAD)).max(1);
        let work = Mutex::new(work.into_iter());
        let copy_all = || {
            let mut done = Vec::new();
            loop {
                // The lock is released before the copying.
                let next = work.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((number, copy, place)) = next else { return done };
                done.push((number, copy.perform(place)));
            }
        };
        let mut failed = vec![Vec::new(); copies.len()];
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(copy_all)).collect();
            let own = copy_all();
            let panicked = |_| anyhow::anyhow!("a thread that copies memory panicked");
            let mut all = vec![own];
            for other in others {
                all.push(other.join().map_err(panicked)?);
            }
            all.into_iter().flatten().for_each(|(number, bad)| failed[number] = bad);
            Ok(failed)
        })
    }

    /// Copies a file, holes left out.
    pub fn copy_file(&mut self, id: MemoryId, file: &File) -> Result<()> {
        let size = file.metadata()?.size();
        let mut at = 0;
        while at < size {
            let data = match lseek(file, at as i64, Whence::SeekData) {
                Ok(offset) => offset as u64,
                Err(nix::Error::ENXIO) => break,
                Err(e) => return Err(e).context("looking for data in a file"),
            };
            let hole =
                lseek(file, data as i64, Whence::SeekHole).context("looking for a hole in a file")? as u64;
            at = data / PAGE_SIZE as u64 * PAGE_SIZE as u64;
            while at < hole {
                let len = PIECE.min((hole - at) as usize);
                let whole = len.next_multiple_of(PAGE_SIZE);
                let place = self.take(whole)?;
                let into = &mut self.arenas[place.arena].0.bytes_mut()[place.start..place.start + whole];
                let mut done = 0;
                while done < len {
                    match file.read_at(&mut into[done..len], at + done as u64).context("reading a file")? {
                        0 => break,
                        n => done += n,
                    }
                }
                // An attempt before this one may have left something.
                into[done..].fill(0);
                self.push(id, at / PAGE_SIZE as u64, place, whole);
                at += len as u64;
            }
            at = at.max(hole);
        }
        Ok(())
    }

    /// Takes pages that are in our memory already.
    pub fn add(&mut self, id: MemoryId, first_page: u64, pages: &[u8]) -> Result<()> {
        let place = self.take(pages.len())?;
        self.arenas[place.arena].0.bytes_mut()[place.start..place.start + pages.len()].copy_from_slice(pages);
        self.push(id, first_page, place, pages.len());
        Ok(())
    }

    /// Tells the part of a memory object, once.
    pub fn declare(&mut self, id: MemoryId, part: &mut PartWriter) -> Result<()> {
        if self.declared.insert(id) {
            part.memory(id)?;
        }
        Ok(())
    }

    /// Hands everything to the store, the newest copy of each page only, freeing memory on the way.
    pub fn save(&mut self, part: &mut PartWriter) -> Result<()> {
        self.hand_over(part, true)?;
        self.arenas.clear();
        self.bytes = 0;
        Ok(())
    }

    /// Hands everything to the store; with `free`, memory is given back on the way.
    fn hand_over(&mut self, part: &mut PartWriter, free: bool) -> Result<()> {
        for run in latest(std::mem::take(&mut self.runs)) {
            self.declare(run.id, part)?;
            let arena = &mut self.arenas[run.arena].0;
            for at in (0..run.len).step_by(SAVED) {
                let (start, end) = (run.start + at, run.start + run.len.min(at + SAVED));
                part.pages(run.id, run.first_page + (at / PAGE_SIZE) as u64, &arena.bytes()[start..end])?;
                if free && end - start == SAVED {
                    arena.discard(start, end);
                }
            }
        }
        Ok(())
    }

    /// Has pieces of up to `size` bytes copied by `copy`, while what was copied before goes to the store: no more than two
    /// of them are in memory at a time. The last one stays staged.
    ///
    /// # Errors
    /// As of `copy` and of [`Self::save`].
    pub fn stream<T>(
        &mut self,
        size: u64,
        pieces: impl IntoIterator<Item = T>,
        part: &mut PartWriter,
        mut copy: impl FnMut(&mut Self, T) -> Result<()>,
    ) -> Result<()> {
        self.save(part)?;
        // The same memory again and again: fresh memory costs more than the copying.
        let mut other = Self::new(self.limit);
        for half in [&mut *self, &mut other] {
            half.prepare(size);
        }
        for piece in pieces {
            other.rewind();
            std::thread::scope(|scope| {
                let saving = scope.spawn(|| self.hand_over(part, false));
                let copied = copy(&mut other, piece);
                let saved =
                    saving.join().map_err(|_| anyhow::anyhow!("a thread that saves memory panicked"))?;
                saved.and(copied)
            })?;
            std::mem::swap(&mut self.arenas, &mut other.arenas);
            std::mem::swap(&mut self.runs, &mut other.runs);
            std::mem::swap(&mut self.bytes, &mut other.bytes);
        }
        Ok(())
    }

    /// Forgets what was staged; its first memory stays.
    fn rewind(&mut self) {
        self.runs.clear();
        self.bytes = 0;
        self.arenas.truncate(1);
        self.arenas.iter_mut().for_each(|(_, used)| *used = 0);
    }
}

impl Origin<'_> {
    fn is(&self, other: &Self) -> bool {
        (self.pid, self.readable) == (other.pid, other.readable) && std::ptr::eq(self.mem, other.mem)
    }
}

impl Copy<'_> {
    /// Copies everything; gives the addresses of pages that could not be read.
    fn perform(&self, into: &mut [u8]) -> Vec<u64> {
        let Origin { pid, mem, readable } = self.origin;
        let read = |address: u64, into: &mut [u8]| match readable {
            true => memory::read(pid, address, into).or_else(|_| mem.read_exact_at(into, address)),
            false => mem.read_exact_at(into, address),
        };
        if readable && memory::read_ranges(pid, &self.ranges, into).is_ok() {
            return Vec::new();
        }
        let (mut bad, mut done) = (Vec::new(), 0);
        for (address, len) in &self.ranges {
            let into = &mut into[done..done + len];
            if read(*address, into).is_err() {
                for (at, page) in (*address..).step_by(PAGE_SIZE).zip(into.chunks_exact_mut(PAGE_SIZE)) {
                    if read(at, page).is_err() {
                        bad.push(at);
                    }
                }
            }
            done += len;
        }
        bad
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{PartOptions, Store};
    use std::collections::BTreeMap;

    /// What a part has of an object.
    fn written(staging: &mut Staging, id: MemoryId) -> BTreeMap<u64, Vec<u8>> {
        let directory = tempfile::TempDir::new().unwrap();
        let store = Store::create(&directory.path().join("store")).unwrap();
        let mut part = store.part_writer(PartOptions::default()).unwrap();
        staging.declare(id, &mut part).unwrap();
        staging.save(&mut part).unwrap();
        store.open_part(&part.finish().unwrap()).unwrap().contents(id).unwrap()
    }

    /// Our own memory, in many small ranges and large ones, with and without prepared memory.
    #[test]
    fn every_range_lands_where_it_belongs() {
        let data: Vec<u8> = (0..9_usize << 20).map(|i| (i / 7 + i / PAGE_SIZE) as u8).collect();
        let page = PAGE_SIZE as u64;
        let base = (data.as_ptr() as u64).next_multiple_of(page);
        let small: Vec<_> = (0..750).map(|i| (base + 2 * i * page, base + (2 * i + 1) * page)).collect();
        let large = vec![(base + 1500 * page, base + (2100 * page))];
        let mem = File::open("/proc/self/mem").unwrap();
        let id = MemoryId(3);
        for prepared in [0, 64 << 20] {
            let mut staging = Staging::new(1 << 30);
            staging.prepare(prepared);
            let wanted = |readable, ranges: &[(u64, u64)]| {
                let origin = Origin { pid: std::process::id() as i32, mem: &mem, readable };
                Wanted { id, origin, ranges: ranges.to_vec() }
            };
            staging.copy(&[wanted(true, &large)]).unwrap();
            let mark = staging.mark();
            staging.copy(&[wanted(true, &[(base + page, base + 9 * page)])]).unwrap();
            staging.back_to(mark);
            staging.copy(&[wanted(true, &small), wanted(false, &large)]).unwrap();
            assert_eq!(staging.bytes(), (750 + 2 * 600) * page);
            let all = written(&mut staging, id);
            assert_eq!(all.len(), 750 + 600);
            for (number, content) in all {
                let at = (number * page - data.as_ptr() as u64) as usize;
                assert!(content == data[at..at + PAGE_SIZE], "page {number:x}");
            }
        }
    }

    /// A hole in the middle of what is wanted.
    #[test]
    fn what_is_gone_is_left_out() {
        let mut arena = Arena::new(8 * PAGE_SIZE).unwrap();
        arena.bytes_mut().fill(5);
        let start = arena.bytes().as_ptr() as u64;
        let page = PAGE_SIZE as u64;
        let mem = File::open("/proc/self/mem").unwrap();
        // The last page of the range of addresses is never mapped.
        let wanted = |readable| {
            let origin = Origin { pid: std::process::id() as i32, mem: &mem, readable };
            [Wanted { id: MemoryId(0), origin, ranges: vec![(start, start + 8 * page), (0x1000, 0x3000)] }]
        };
        for readable in [true, false] {
            let mut staging = Staging::new(1 << 20);
            assert!(staging.copy(&wanted(readable)).is_err());
            let mut staging = Staging::new(1 << 20);
            let failed = staging.copy_some(&wanted(readable)).unwrap();
            assert_eq!(failed, [(MemoryId(0), 1), (MemoryId(0), 2)]);
            let all = written(&mut staging, MemoryId(0));
            assert_eq!(all.len(), 8);
            assert!(all.values().flatten().all(|byte| *byte == 5));
        }
    }
}
