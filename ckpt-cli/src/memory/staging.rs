//! Bytes copied while the job is frozen, to be compressed and written while it runs.

use crate::store::PartWriter;
use crate::sys::memory;
use anyhow::{Context as _, Result};
use ckpt_common::image::{MemoryId, PAGE_SIZE};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

/// Read and written in pieces of this many bytes: large reads are several times as fast as single pages.
const PIECE: usize = 1 << 20;

/// A run of pages.
#[derive(Debug)]
struct Run {
    first_page: u64,
    data: Vec<u8>,
}

/// Staged memory objects.
#[derive(Debug, Default)]
pub struct Staging {
    next: u32,
    objects: BTreeMap<MemoryId, Vec<Run>>,
    bytes: u64,
}

impl Staging {
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

    fn push(&mut self, id: MemoryId, first_page: u64, data: Vec<u8>) {
        self.bytes += data.len() as u64;
        self.objects.entry(id).or_default().push(Run { first_page, data });
    }

    /// Copies address ranges of a process. `readable`: may they be read by process_vm_readv(2), which respects their
    /// protection? Otherwise /proc/PID/mem is used, which does not.
    pub fn copy_pages(
        &mut self,
        pid: i32,
        id: MemoryId,
        ranges: &[(u64, u64)],
        readable: bool,
    ) -> Result<()> {
        let mem = (!readable)
            .then(|| File::open(format!("/proc/{pid}/mem")).context("opening the memory of a process"))
            .transpose()?;
        for &(start, end) in ranges {
            let mut at = start;
            while at < end {
                let len = PIECE.min((end - at) as usize);
                let mut data = vec![0u8; len];
                match &mem {
                    None => memory::read(pid, at, &mut data),
                    Some(mem) => mem.read_exact_at(&mut data, at),
                }
                .with_context(|| format!("reading memory of process {pid} at {at:#x}"))?;
                self.push(id, at / PAGE_SIZE as u64, data);
                at += len as u64;
            }
        }
        Ok(())
    }

    /// Copies a file, holes left out.
    pub fn copy_file(&mut self, id: MemoryId, file: &File) -> Result<()> {
        use nix::unistd::{Whence, lseek};
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
                let mut bytes = vec![0u8; len.next_multiple_of(PAGE_SIZE)];
                let mut done = 0;
                while done < len {
                    match file.read_at(&mut bytes[done..len], at + done as u64).context("reading a file")? {
                        0 => break,
                        n => done += n,
                    }
                }
                self.push(id, at / PAGE_SIZE as u64, bytes);
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
                part.pages(run.first_page, &run.data)?;
            }
        }
        Ok(())
    }
}
