//! The address space of a stub: its mappings, and the fields of `mm`.

use super::content;
use super::files::Files;
use super::seed::Inheritance;
use super::tree::Stub;
use super::vdso;
use crate::store::PartReader;
use crate::tracee::{Batch, Stopped};
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::file::FileId;
use ckpt_common::image::process::{AddressSpace, Backing, Process};
use std::collections::BTreeMap;

const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;

/// Makes all mappings and fills them.
pub(super) fn rebuild(stub: &mut Stub, process: &Process, files: &Files, part: &PartReader) -> Result<()> {
    let space = &process.mm;
    let inheritance = stub.inheritance.clone();
    let leader = stub.leader()?;
    let pulled = pull(leader, space, files, &inheritance)?;
    map(leader, space, &pulled, &inheritance)?;
    fields(leader, space, &pulled, &inheritance)?;
    content::fill(leader.pid, space, part, part.page_map(space.memory)?)?;
    vdso::rebuild(leader, space, &inheritance)
}

/// Takes every mapped file into the stub's empty descriptor table: the n-th gets number n.
fn pull(
    leader: &mut Stopped,
    space: &AddressSpace,
    files: &Files,
    inheritance: &Inheritance,
) -> Result<BTreeMap<FileId, u64>> {
    let pulled = mapped(space);
    let mut order: Vec<(u64, FileId)> = pulled.iter().map(|(id, number)| (*number, *id)).collect();
    order.sort_unstable();
    let mut batch = Batch::new(inheritance.layout.arena);
    for (_, id) in order {
        let ours = files.number(id)?;
        batch.call(
            "taking a mapped file (pidfd_getfd)",
            libc::SYS_pidfd_getfd,
            &[inheritance.restorer as u64, ours as u64, 0],
        );
        leader.flush(&mut batch)?;
    }
    leader.run(batch, false)?.all_ok()?;
    Ok(pulled)
}

/// The executable and the mapped files, with the number each gets in the stub's empty descriptor table.
pub(super) fn mapped(space: &AddressSpace) -> BTreeMap<FileId, u64> {
    let mut numbers = BTreeMap::from([(space.exe, 0)]);
    for mapping in &space.mappings {
        if let Backing::PrivateFile { file, .. } | Backing::SharedFile { file, .. } = mapping.backing {
            let next = numbers.len() as u64;
            numbers.entry(file).or_insert(next);
        }
    }
    numbers
}

fn map(
    leader: &mut Stopped,
    space: &AddressSpace,
    pulled: &BTreeMap<FileId, u64>,
    inheritance: &Inheritance,
) -> Result<()> {
    let mut batch = Batch::new(inheritance.layout.arena);
    for mapping in &space.mappings {
        let size = mapping.end.checked_sub(mapping.start).context("a mapping ends before it begins")?;
        let (flags, fd, offset) = match &mapping.backing {
            Backing::Kernel { .. } => continue,
            Backing::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, u64::MAX, 0),
            Backing::PrivateFile { file, offset } => (libc::MAP_PRIVATE, pulled[file], *offset),
            Backing::SharedFile { file, offset } => (libc::MAP_SHARED, pulled[file], *offset),
        };
        let flags = (flags | libc::MAP_FIXED_NOREPLACE | mapping.flags) as u64;
        let name = format!("mapping {:x}-{:x}", mapping.start, mapping.end);
        batch.call(name, libc::SYS_mmap, &[mapping.start, size, mapping.prot as u64, flags, fd, offset]);
        for advice in &mapping.advice {
            let name = format!("madvise({advice}) for {:x}-{:x}", mapping.start, mapping.end);
            batch.call(name, libc::SYS_madvise, &[mapping.start, size, *advice as u64]);
        }
        leader.flush(&mut batch)?;
    }
    Ok(leader.run(batch, false)?.all_ok()?)
}

/// `struct prctl_mm_map` (linux/prctl.h): the fields, the auxiliary vector, the executable.
fn fields(
    leader: &mut Stopped,
    space: &AddressSpace,
    pulled: &BTreeMap<FileId, u64>,
    inheritance: &Inheritance,
) -> Result<()> {
    let mut batch = Batch::new(inheritance.layout.arena);
    let auxv = batch.bytes(&space.auxv);
    let mut map = Vec::new();
    for word in space.fields.iter().chain([&auxv]) {
        map.extend_from_slice(&word.to_ne_bytes());
    }
    map.extend_from_slice(&(space.auxv.len() as u32).to_ne_bytes());
    map.extend_from_slice(&(pulled[&space.exe] as u32).to_ne_bytes());
    let at = batch.bytes(&map);
    batch.call("prctl(PR_SET_MM_MAP)", libc::SYS_prctl, &[PR_SET_MM, PR_SET_MM_MAP, at, map.len() as u64, 0]);
    batch.call("closing mapped files", libc::SYS_close_range, &[0, inheritance.restorer as u64 - 1, 0]);
    Ok(leader.run(batch, false)?.all_ok()?)
}

/// Locks what was mlock(2)ed, once the content is there.
pub(super) fn lock(batch: &mut Batch, space: &AddressSpace) -> Result<()> {
    for mapping in space.mappings.iter().filter(|m| m.locked != 0) {
        if mapping.end <= mapping.start {
            bail!("a mapping ends before it begins");
        }
        let name = format!("mlock of {:x}-{:x}", mapping.start, mapping.end);
        batch.call(name, libc::SYS_mlock, &[mapping.start, mapping.end - mapping.start]);
    }
    Ok(())
}
