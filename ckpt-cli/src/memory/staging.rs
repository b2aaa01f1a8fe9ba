//! Bytes copied while the job is frozen, to be compressed and written while it runs.
//!
//! The memory for the copies is made before the freeze ([`Staging::prepare`]): faulting it in takes as long as the
//! copying itself. During the freeze ranges are only noted, and then copied at once by several threads
//! ([`Staging::collect`]).

use crate::store::PartWriter;
use crate::sys::{arena::Arena, memory};
use anyhow::{Context as _, Result};
use ckpt_common::image::{MemoryId, PAGE_SIZE};
use nix::unistd::{Whence, lseek};
use std::collections::BTreeMap;
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

/// A run of pages, staged in an arena.
#[derive(Clone, Copy, Debug)]
struct Run {
    first_page: u64,
    arena: usize,
    start: usize,
    len: usize,
}

/// Ranges of a process that are still to be copied, to one place in an arena.
#[derive(Debug)]
struct Copy {
    pid: i32,
    /// May they be read by process_vm_readv(2)?
    readable: bool,
    ranges: Vec<(u64, usize)>,
    arena: usize,
    start: usize,
    len: usize,
}

/// Staged memory objects.
#[derive(Debug, Default)]
pub struct Staging {
    next: u32,
    objects: BTreeMap<MemoryId, Vec<Run>>,
    /// Each with the bytes taken from it.
    arenas: Vec<(Arena, usize)>,
    copies: Vec<Copy>,
    bytes: u64,
}

impl Staging {
    /// Makes memory ready for so many bytes. A failure is none: then the copying takes longer.
    pub fn prepare(&mut self, bytes: u64) {
        let prepared = usize::try_from(bytes).ok().and_then(|bytes| Arena::new(bytes.max(ARENA)).ok());
        if let Some(mut arena) = prepared {
            if let Err(error) = arena.fault_in() {
                tracing::debug!(%error, bytes, "memory for the copy is not made ready");
            }
            self.arenas.push((arena, 0));
        }
    }

    /// Forgets everything but the prepared memory.
    pub fn clear(&mut self) {
        (self.next, self.bytes) = (0, 0);
        self.objects.clear();
        self.copies.clear();
        self.arenas.truncate(1);
        self.arenas.iter_mut().for_each(|(_, used)| *used = 0);
    }

    /// A new, empty memory object.
    pub fn new_object(&mut self) -> MemoryId {
        let id = MemoryId(self.next);
        self.next += 1;
        self.objects.insert(id, Vec::new());
        id
    }

    /// Bytes staged so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes `len` bytes of the newest arena, or of a new one.
    fn take(&mut self, len: usize) -> Result<(usize, usize)> {
        if self.arenas.last().is_none_or(|(arena, used)| arena.bytes().len() - used < len) {
            let arena = Arena::new(len.max(ARENA)).context("no memory for the copy of the job's memory")?;
            self.arenas.push((arena, 0));
        }
        let at = self.arenas.len() - 1;
        let used = &mut self.arenas[at].1;
        *used += len;
        Ok((at, *used - len))
    }

    fn push(&mut self, id: MemoryId, run: Run) {
        self.bytes += run.len as u64;
        let runs = self.objects.entry(id).or_default();
        match runs.last_mut() {
            // One behind the other in the process and here.
            Some(last)
                if (last.arena, last.start + last.len) == (run.arena, run.start)
                    && last.first_page + (last.len / PAGE_SIZE) as u64 == run.first_page =>
            {
                last.len += run.len;
            }
            _ => runs.push(run),
        }
    }

    /// Notes address ranges of a process for [`Self::collect`]. `readable`: may they be read by process_vm_readv(2),
    /// which respects their protection? Otherwise /proc/PID/mem is used, which does not.
    pub fn copy_pages(
        &mut self,
        pid: i32,
        id: MemoryId,
        ranges: &[(u64, u64)],
        readable: bool,
    ) -> Result<()> {
        for &(start, end) in ranges {
            let mut at = start;
            while at < end {
                let len = PIECE.min((end - at) as usize);
                let (arena, place) = self.take(len)?;
                self.push(id, Run { first_page: at / PAGE_SIZE as u64, arena, start: place, len });
                match self.copies.last_mut() {
                    Some(last)
                        if (last.pid, last.readable) == (pid, readable)
                            && (last.arena, last.start + last.len) == (arena, place)
                            && last.len + len <= PIECE =>
                    {
                        last.ranges.push((at, len));
                        last.len += len;
                    }
                    _ => {
                        let ranges = vec![(at, len)];
                        self.copies.push(Copy { pid, readable, ranges, arena, start: place, len });
                    }
                }
                at += len as u64;
            }
        }
        Ok(())
    }

    /// Copies what was noted; the processes are still frozen.
    pub fn collect(&mut self) -> Result<()> {
        let copies = std::mem::take(&mut self.copies);
        let bytes: usize = copies.iter().map(|copy| copy.len).sum();
        let mut work = Vec::with_capacity(copies.len());
        let mut copies = copies.into_iter().peekable();
        // They are in the order of their places: each arena is cut from front to back.
        for (index, (arena, _)) in self.arenas.iter_mut().enumerate() {
            let (mut rest, mut at) = (arena.bytes_mut(), 0);
            while let Some(copy) = copies.next_if(|copy| copy.arena == index) {
                let (place, behind) = rest[copy.start - at..].split_at_mut(copy.len);
                (rest, at) = (behind, copy.start + copy.len);
                work.push((copy, place));
            }
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.min(THREADS).min(bytes.div_ceil(PER_THREAD)).max(1);
        let work = Mutex::new(work.into_iter());
        let copy_all = || -> Result<()> {
            loop {
                // The lock is released before the copying.
                let next = work.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((copy, place)) = next else { return Ok(()) };
                copy.perform(place)?;
            }
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(copy_all)).collect();
            let own = copy_all();
            let joined = others.into_iter().map(|other| {
                other.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread that copies memory panicked")))
            });
            joined.fold(own, Result::and)
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
                let (arena, start) = self.take(whole)?;
                let place = &mut self.arenas[arena].0.bytes_mut()[start..start + whole];
                let mut done = 0;
                while done < len {
                    match file.read_at(&mut place[done..len], at + done as u64).context("reading a file")? {
                        0 => break,
                        n => done += n,
                    }
                }
                // An attempt before this one may have left something.
                place[done..].fill(0);
                self.push(id, Run { first_page: at / PAGE_SIZE as u64, arena, start, len: whole });
                at += len as u64;
            }
            at = at.max(hole);
        }
        Ok(())
    }

    /// Hands everything to the store, freeing memory on the way.
    pub fn save(&mut self, part: &mut PartWriter) -> Result<()> {
        for (id, runs) in std::mem::take(&mut self.objects) {
            part.memory(id)?;
            for run in runs {
                let arena = &mut self.arenas[run.arena].0;
                for at in (0..run.len).step_by(SAVED) {
                    let (start, end) = (run.start + at, run.start + run.len.min(at + SAVED));
                    part.pages(id, run.first_page + (at / PAGE_SIZE) as u64, &arena.bytes()[start..end])?;
                    arena.discard(start, end);
                }
            }
        }
        self.arenas.clear();
        Ok(())
    }
}

impl Copy {
    fn perform(&self, into: &mut [u8]) -> Result<()> {
        let pid = self.pid;
        let (at, _) = self.ranges.first().copied().unwrap_or_default();
        let context = || format!("reading memory of process {pid} at {at:#x}");
        if self.readable {
            return memory::read_ranges(pid, &self.ranges, into).with_context(context);
        }
        let mem = File::open(format!("/proc/{pid}/mem")).context("opening the memory of a process")?;
        let mut done = 0;
        for (at, len) in &self.ranges {
            mem.read_exact_at(&mut into[done..done + len], *at).with_context(context)?;
            done += len;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Our own memory, in many small ranges and large ones, with and without a prepared arena.
    #[test]
    fn every_range_lands_where_it_belongs() {
        let data: Vec<u8> = (0..9_usize << 20).map(|i| (i / 7 + i / PAGE_SIZE) as u8).collect();
        let base = (data.as_ptr() as u64).next_multiple_of(PAGE_SIZE as u64);
        let page = PAGE_SIZE as u64;
        let small: Vec<_> =
            (0..1500).map(|i| (base + 2 * i * page / 2, base + (2 * i + 1) * page / 2)).collect();
        let small: Vec<_> = small.iter().map(|(a, _)| (*a, a + page)).step_by(2).collect();
        let large = [(base, base + (2000 * page)), (base + 100 * page, base + 101 * page)];
        for prepared in [0, 64 << 20] {
            let mut staging = Staging::default();
            if prepared > 0 {
                staging.prepare(prepared);
            }
            for _ in 0..2 {
                staging.clear();
                let id = staging.new_object();
                let pid = std::process::id() as i32;
                staging.copy_pages(pid, id, &small, true).unwrap();
                staging.copy_pages(pid, id, &large, false).unwrap();
                staging.copy_pages(pid, id, &large, true).unwrap();
                staging.collect().unwrap();
                let mut found = 0;
                for run in &staging.objects[&id] {
                    let at = (run.first_page * page - data.as_ptr() as u64) as usize;
                    let copy = &staging.arenas[run.arena].0.bytes()[run.start..run.start + run.len];
                    assert!(copy == &data[at..at + run.len]);
                    found += run.len as u64;
                }
                assert_eq!(found, staging.bytes());
                assert_eq!(found, (750 + 2 * 2001) * page);
            }
        }
    }
}
