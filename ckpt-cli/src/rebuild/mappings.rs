//! The address space of a stub: its mappings, and the fields of `mm`.

use super::files::Files;
use super::rings;
use super::seed::{self, Inheritance};
use super::share::Plan;
use super::{segments, vdso};
use crate::tracee::{Batch, Stopped};
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::file::FileId;
use ckpt_common::image::process::{AddressSpace, Backing, Mapping};
use std::collections::BTreeMap;

const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;

/// Takes files into the stub's empty descriptor table, each to its number there.
pub(super) fn pull(
    leader: &mut Stopped,
    wanted: &BTreeMap<FileId, u64>,
    files: &Files,
    inheritance: &Inheritance,
) -> Result<BTreeMap<FileId, u64>> {
    let mut order: Vec<(u64, FileId)> = wanted.iter().map(|(id, number)| (*number, *id)).collect();
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
    Ok(wanted.clone())
}

/// Files, with the number each gets in the stub's empty descriptor table: the n-th gets n.
pub(super) fn numbered(files: impl Iterator<Item = FileId>) -> BTreeMap<FileId, u64> {
    let mut numbers = BTreeMap::new();
    for file in files {
        let next = numbers.len() as u64;
        numbers.entry(file).or_insert(next);
    }
    numbers
}

/// The executable and the mapped files, numbered.
pub(super) fn mapped(space: &AddressSpace) -> BTreeMap<FileId, u64> {
    let files = space.mappings.iter().filter_map(|mapping| match mapping.backing {
        Backing::PrivateFile { file, .. } | Backing::SharedFile { file, .. } => Some(file),
        _ => None,
    });
    numbered([space.exe].into_iter().chain(files))
}

/// Makes those of the mappings.
pub(super) fn map(
    leader: &mut Stopped,
    space: &AddressSpace,
    which: &[usize],
    files: &Files,
    pulled: &BTreeMap<FileId, u64>,
    inheritance: &Inheritance,
) -> Result<()> {
    let attaches = segments::attaches(space, which, files)?;
    attaches.iter().try_for_each(|attach| attach.make(leader, inheritance))?;
    let mut batch = Batch::new(inheritance.layout.arena);
    for mapping in which.iter().filter_map(|index| space.mappings.get(*index)) {
        let size = mapping.end.checked_sub(mapping.start).context("a mapping ends before it begins")?;
        let (flags, fd, offset) = match &mapping.backing {
            Backing::Kernel { .. } => continue,
            Backing::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, u64::MAX, 0),
            Backing::PrivateFile { file, offset } => (libc::MAP_PRIVATE, pulled[file], *offset),
            Backing::SharedFile { file, .. } if files.is_ring(*file) => continue,
            Backing::SharedFile { file, offset } => (libc::MAP_SHARED, pulled[file], *offset),
        };
        let attached =
            matches!(mapping.backing, Backing::SharedFile { file, .. } if files.segment(file).is_some());
        if !attached {
            let flags = (flags | libc::MAP_FIXED_NOREPLACE | mapping.flags) as u64;
            let name = format!("mapping {:x}-{:x}", mapping.start, mapping.end);
            batch.call(name, libc::SYS_mmap, &[mapping.start, size, mapping.prot as u64, flags, fd, offset]);
        }
        advise(&mut batch, mapping);
        leader.flush(&mut batch)?;
    }
    leader.run(batch, false)?.all_ok()?;
    for mapping in which.iter().filter_map(|index| space.mappings.get(*index)) {
        let Backing::SharedFile { file, offset } = mapping.backing else { continue };
        if files.is_ring(file) {
            rings::place(leader, mapping, pulled[&file], offset, inheritance)?;
            let mut batch = Batch::new(inheritance.layout.arena);
            advise(&mut batch, mapping);
            leader.run(batch, false)?.all_ok()?;
        }
    }
    Ok(())
}

fn advise(batch: &mut Batch, mapping: &Mapping) {
    for advice in &mapping.advice {
        let name = format!("madvise({advice}) for {:x}-{:x}", mapping.start, mapping.end);
        let args = [mapping.start, mapping.end - mapping.start, *advice as u64];
        batch.call(name, libc::SYS_madvise, &args);
    }
}

/// Changes the mappings of a clone, up to those that have to be made.
pub(super) fn change(leader: &mut Stopped, plan: &Plan, inheritance: &Inheritance) -> Result<()> {
    let mut batch = Batch::new(inheritance.layout.arena);
    for range in &plan.unmap {
        let name = format!("unmapping {:x}-{:x}", range.start, range.end);
        batch.call(name, libc::SYS_munmap, &[range.start, range.end - range.start]);
        leader.flush(&mut batch)?;
    }
    for (range, prot) in &plan.protect {
        let name = format!("protecting {:x}-{:x}", range.start, range.end);
        batch.call(name, libc::SYS_mprotect, &[range.start, range.end - range.start, *prot as u64]);
        leader.flush(&mut batch)?;
    }
    for (range, end) in &plan.grow {
        let name = format!("extending {:x}-{:x} to {end:x}", range.start, range.end);
        let args = [range.start, range.end - range.start, end - range.start, 0];
        batch.call(name, libc::SYS_mremap, &args);
        leader.flush(&mut batch)?;
    }
    Ok(leader.run(batch, false)?.all_ok()?)
}

/// Takes everything of `space` out of a clone again.
pub(super) fn empty(leader: &mut Stopped, space: &AddressSpace, inheritance: &Inheritance) -> Result<()> {
    let mut batch = Batch::new(inheritance.layout.arena);
    vdso::park(&mut batch, space, inheritance);
    seed::unmap_all(&mut batch, inheritance.layout);
    leader.run(batch, false)?.all_ok().context("emptying a clone")
}

/// `struct prctl_mm_map` (linux/prctl.h): the fields, the auxiliary vector, and where it changes the executable, by its
/// number in the descriptor table. Closes what was pulled.
pub(super) fn fields(
    leader: &mut Stopped,
    space: &AddressSpace,
    exe: Option<u64>,
    inheritance: &Inheritance,
) -> Result<()> {
    let mut batch = Batch::new(inheritance.layout.arena);
    let auxv = batch.bytes(&space.auxv);
    let mut map = Vec::new();
    for word in space.fields.iter().chain([&auxv]) {
        map.extend_from_slice(&word.to_ne_bytes());
    }
    map.extend_from_slice(&(space.auxv.len() as u32).to_ne_bytes());
    map.extend_from_slice(&exe.map_or(u32::MAX, |number| number as u32).to_ne_bytes());
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
