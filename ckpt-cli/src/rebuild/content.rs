//! Content of memory on its way into a stub: unpacked by several threads, each of which writes what it has unpacked.

use crate::store::{PartReader, Piece};
use crate::sys::vm_write;
use anyhow::{Context as _, Result, anyhow};
use ckpt_common::image::PAGE_SIZE;
use ckpt_common::image::pages::{PageRun, Source};
use ckpt_common::image::process::{AddressSpace, Backing, Mapping};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Writes these pages of an address space, whose mappings are there, into process `pid`.
pub(super) fn fill(pid: i32, space: &AddressSpace, part: &PartReader, runs: &[PageRun]) -> Result<()> {
    let path = format!("/proc/{pid}/mem");
    let target = Target {
        pid,
        mappings: &space.mappings,
        mem: File::options().write(true).open(path).context("opening the stub's memory")?,
    };
    for run in runs.iter().filter(|run| run.source() == Source::Zero) {
        target.zero(run)?;
    }
    part.scatter(&[runs], |pieces| target.write(pieces))
}

struct Target<'a> {
    pid: i32,
    mappings: &'a [Mapping],
    mem: File,
}

impl Target<'_> {
    /// The mapping of an address, and how many of the `len` bytes from there lie in it.
    fn at(&self, address: u64, len: usize) -> Result<(&Mapping, usize)> {
        let index = self.mappings.partition_point(|m| m.end <= address);
        let mapping = self.mappings.get(index).filter(|m| m.start <= address);
        let mapping = mapping
            .with_context(|| format!("the image has memory at {address:#x}, where nothing is mapped"))?;
        Ok((mapping, len.min((mapping.end - address) as usize)))
    }

    fn write(&self, pieces: &[Piece<'_>]) -> Result<()> {
        let mut writable = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let (mut at, mut data) = (piece.page * PAGE_SIZE as u64, piece.data);
            while !data.is_empty() {
                let (mapping, len) = self.at(at, data.len())?;
                let (part, rest) = data.split_at(len);
                if mapping.prot & libc::PROT_WRITE == 0 {
                    // Not writable for the program, and so for process_vm_writev(2); /proc/PID/mem does not mind.
                    let written = self.mem.write_all_at(part, at);
                    written.with_context(|| format!("filling memory at {at:#x}"))?;
                } else {
                    writable.push((at, part));
                }
                (at, data) = (at + len as u64, rest);
            }
        }
        vm_write::write_pieces(self.pid, &writable)
            .map_err(|(at, error)| anyhow!(error).context(format!("filling memory at {at:#x}")))
    }

    /// Fresh anonymous memory is zero; a private page of a file is not.
    fn zero(&self, run: &PageRun) -> Result<()> {
        static ZEROS: [u8; 64 * PAGE_SIZE] = [0; 64 * PAGE_SIZE];
        let (mut at, end) = (run.page.get() * PAGE_SIZE as u64, run.end() * PAGE_SIZE as u64);
        while at < end {
            let (mapping, len) = self.at(at, (end - at) as usize)?;
            let end = at + len as u64;
            if mapping.backing != Backing::Anonymous {
                for from in (at..end).step_by(ZEROS.len()) {
                    let zeros = &ZEROS[..ZEROS.len().min((end - from) as usize)];
                    let written = self.mem.write_all_at(zeros, from);
                    written.with_context(|| format!("filling memory at {from:#x}"))?;
                }
            }
            at = end;
        }
        Ok(())
    }
}
