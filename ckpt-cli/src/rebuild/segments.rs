//! System V shared memory at a restore: segments with the ids they had, and their attaches.
//!
//! The id of the next segment can be chosen, but not its creator: so a process with the creator's PID and credentials
//! makes it, before the job's own processes are there. In a PID namespace of its own the job gets an IPC namespace, too,
//! if it has segments: there all ids are free.

use super::files::{self, Files};
use super::grow::taken;
use super::layout::Layout;
use super::seed::{self, Inheritance};
use super::tree;
use crate::objects::sysv::{self, Made};
use crate::store::PartReader;
use crate::sys;
use crate::tracee::{Batch, Stopped};
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::file::{FileId, OpenFile};
use ckpt_common::image::objects::SysvMemory;
use ckpt_common::image::process::{AddressSpace, Backing, Mapping};
use nix::sched::{CloneFlags, unshare};
use std::collections::BTreeMap;

/// How often somebody else may get the id that was chosen. The chance of one try is that no other process of the node makes
/// a segment within a tenth of a millisecond.
const TRIES: usize = 100;
const KEEP: u64 = u32::MAX as u64;

/// The segments of a part.
#[derive(Debug)]
pub(super) struct Segments {
    wanted: Vec<SysvMemory>,
    made: Vec<Made>,
}

impl Segments {
    /// Those of these records. The thread, and what it forks from now on, is in a new IPC namespace where one is needed.
    pub(super) fn new(files: &[OpenFile], namespace: bool) -> Result<Self> {
        let wanted = sysv::records(files)?;
        if namespace && !wanted.is_empty() {
            unshare(CloneFlags::CLONE_NEWIPC).context("making an IPC namespace")?;
        }
        Ok(Self { wanted, made: Vec::new() })
    }

    /// Makes them, each by a child of the first stub.
    pub(super) fn make(&mut self, seed: &mut Stopped, layout: Layout) -> Result<()> {
        for segment in std::mem::take(&mut self.wanted) {
            let pid = Some(segment.creator_pid).filter(|pid| *pid > 0);
            let mut creator = match seed::clone_process(seed, layout, pid, 0) {
                // It has ended, and the number is another's.
                Err(e) if taken(&e) => seed::clone_process(seed, layout, None, 0)?,
                other => other?,
            };
            let made = make(&mut creator, segment, layout);
            let pid = creator.ns.0;
            tree::kill(creator)?;
            let mut batch = Batch::new(layout.arena);
            batch.call("reaping a helper", libc::SYS_wait4, &[pid as u64, 0, libc::__WALL as u64, 0]);
            seed.run(batch, false)?.all_ok()?;
            self.made.push(made?);
        }
        Ok(())
    }

    /// Gives them their content.
    pub(super) fn fill(&self, part: &PartReader) -> Result<()> {
        let fill = |made: &Made| made.fill(|segment, file| files::fill(part, segment.content, file));
        self.made.iter().try_for_each(fill)
    }

    /// Everything is attached: owners are set, and what is marked for destruction is marked again.
    pub(super) fn complete(&mut self) -> Result<()> {
        self.made.iter_mut().try_for_each(Made::complete)
    }

    /// The restore has succeeded: they stay.
    pub(super) fn keep(self) {
        self.made.into_iter().for_each(Made::keep);
    }
}

/// Makes a segment in a process that is there for nothing else.
fn make(creator: &mut Stopped, segment: SysvMemory, layout: Layout) -> Result<Made> {
    let mut batch = Batch::new(layout.arena);
    let (uid, gid) = segment.creator;
    batch.call("setresgid", libc::SYS_setresgid, &[KEEP, gid.into(), KEEP]);
    batch.call("setresuid", libc::SYS_setresuid, &[KEEP, uid.into(), KEEP]);
    creator.run(batch, false)?.all_ok()?;
    for _ in 0..TRIES {
        sysv::choose(segment.id)?;
        let mut batch = Batch::new(layout.arena);
        let flags = (libc::IPC_CREAT | libc::IPC_EXCL) as u64 | u64::from(segment.mode & 0o777);
        let what = format!("making System V segment {} (shmget with key {:#x})", segment.id, segment.key);
        let call = batch.call(what, libc::SYS_shmget, &[segment.key as u64, segment.size, flags]);
        let id = creator.run(batch, false)?.result(call)? as i32;
        if id == segment.id {
            return Made::new(segment);
        }
        sys::sysv::remove(id).context("removing a segment with another id than was chosen")?;
    }
    bail!(
        "System V segment {} cannot be made: its id is in use on this node; use --pids namespace",
        segment.id
    )
}

/// One attach: what is left of it may be several mappings, which shmdt(2) removes together.
#[derive(Debug)]
pub(super) struct Attach<'a> {
    segment: files::Segment,
    mappings: Vec<(&'a Mapping, u64)>,
}

/// The attaches among those mappings.
pub(super) fn attaches<'a>(
    space: &'a AddressSpace,
    which: &[usize],
    files: &Files,
) -> Result<Vec<Attach<'a>>> {
    let mut all: BTreeMap<(FileId, u64), Attach<'a>> = BTreeMap::new();
    for mapping in which.iter().filter_map(|index| space.mappings.get(*index)) {
        let Backing::SharedFile { file, offset } = mapping.backing else { continue };
        let Some(segment) = files.segment(file) else { continue };
        let size = mapping.end.checked_sub(mapping.start).context("a mapping ends before it begins")?;
        if offset.checked_add(size).is_none_or(|end| end > segment.size) {
            bail!("the mapping at {:x} reaches behind the end of segment {}", mapping.start, segment.id);
        }
        let attach = all.entry((file, mapping.start.wrapping_sub(offset)));
        let attach = attach.or_insert(Attach { segment, mappings: Vec::new() });
        attach.mappings.push((mapping, offset));
    }
    Ok(all.into_values().collect())
}

impl Attach<'_> {
    /// Makes it in a stub.
    pub(super) fn make(&self, leader: &mut Stopped, inheritance: &Inheritance) -> Result<()> {
        let files::Segment { id, size, read_only } = self.segment;
        let mut batch = Batch::new(inheritance.layout.arena);
        let flags = if read_only { libc::SHM_RDONLY } else { 0 } as u64;
        let whole = match self.mappings.as_slice() {
            [(mapping, 0)] if mapping.end - mapping.start == size => Some(mapping.start),
            _ => None,
        };
        for (mapping, _) in self.mappings.iter().filter(|_| whole.is_none()) {
            // So that it is not made where its own pieces go.
            let flags =
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
            let (start, size) = (mapping.start, mapping.end - mapping.start);
            let what = format!("reserving {start:x} for a part of segment {id}");
            batch.call(what, libc::SYS_mmap, &[start, size, 0, flags as u64, u64::MAX, 0]);
            leader.flush(&mut batch)?;
        }
        let what = format!("attaching segment {id}");
        let attach = batch.call(what, libc::SYS_shmat, &[id as u64, whole.unwrap_or(0), flags]);
        if whole.is_none() {
            // Made where there is room; the pieces go to their places, and what had been unmapped goes away.
            let done = leader.run(batch, false)?;
            done.all_ok()?;
            let at = done.result(attach)? as u64;
            batch = Batch::new(inheritance.layout.arena);
            let mut done = 0;
            let unmap = |batch: &mut Batch, from: u64, to: u64| {
                if from < to {
                    let what = format!("unmapping a part of segment {id}");
                    batch.call(what, libc::SYS_munmap, &[at + from, to - from]);
                }
            };
            for (mapping, offset) in &self.mappings {
                let size = mapping.end - mapping.start;
                unmap(&mut batch, done, *offset);
                let what = format!("moving a part of segment {id} to {:x}", mapping.start);
                let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
                batch.call(what, libc::SYS_mremap, &[at + offset, size, size, flags, mapping.start]);
                done = offset + size;
                leader.flush(&mut batch)?;
            }
            unmap(&mut batch, done, size);
        }
        let usual = libc::PROT_READ | if read_only { 0 } else { libc::PROT_WRITE };
        for (mapping, _) in self.mappings.iter().filter(|(mapping, _)| mapping.prot != usual) {
            let (start, size) = (mapping.start, mapping.end - mapping.start);
            let what = format!("protecting a part of segment {id} at {start:x}");
            batch.call(what, libc::SYS_mprotect, &[start, size, mapping.prot as u64]);
            leader.flush(&mut batch)?;
        }
        Ok(leader.run(batch, false)?.all_ok()?)
    }
}
