//! Address spaces of stubs: each made from nothing, or from that of the stub it was cloned from.

use super::files::Files;
use super::seed::Inheritance;
use super::share::{self, Plan, View};
use super::{content, huge, lazy, mappings, vdso};
use crate::store::PartReader;
use crate::tracee::{Batch, Stopped};
use anyhow::{Context as _, Result};
use ckpt_common::image::file::{FileId, OpenFile};
use ckpt_common::image::pages::PageRun;
use ckpt_common::image::process::{AddressSpace, Backing, Process};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Fewer shared pages are not worth the table of pages that a clone copies.
const WORTH: u64 = 16;

/// All address spaces of a part.
pub(super) struct Spaces<'a> {
    processes: BTreeMap<i32, &'a Process>,
    files: &'a Files,
    part: &'a PartReader,
    bases: RefCell<BTreeMap<i32, Pages<'a>>>,
    /// For each executable the first of those that are the same file.
    programs: BTreeMap<FileId, FileId>,
    /// May memory follow later?
    lazy: bool,
}

/// A page map, of the image or made up.
type Pages<'a> = Rc<Cow<'a, [PageRun]>>;

impl<'a> Spaces<'a> {
    /// `records` are those of all open files: a file may be there once for each process that executes it.
    pub(super) fn new(
        processes: &'a [Process],
        records: &[OpenFile],
        files: &'a Files,
        part: &'a PartReader,
        lazy: bool,
    ) -> Self {
        let living = processes.iter().filter(|p| p.zombie.is_none());
        let processes: BTreeMap<i32, &Process> = living.map(|p| (p.pid, p)).collect();
        let executables: BTreeSet<FileId> = processes.values().map(|p| p.mm.exe).collect();
        let (mut programs, mut first) = (BTreeMap::new(), BTreeMap::new());
        for record in records.iter().filter(|record| executables.contains(&record.id)) {
            let same = (&record.kind, record.version, record.flags, &record.payload);
            programs.insert(record.id, *first.entry(same).or_insert(record.id));
        }
        Self { processes, files, part, bases: RefCell::default(), programs, lazy }
    }

    fn process(&self, pid: i32) -> Result<&'a Process> {
        self.processes.get(&pid).copied().with_context(|| format!("process {pid} is not in the image"))
    }

    fn own(&self, process: &'a Process) -> Result<View<'a>> {
        let space = &process.mm;
        Ok(self.view(space, self.part.page_map(space.memory)?))
    }

    fn view<'b>(&self, space: &'b AddressSpace, pages: &'b [PageRun]) -> View<'b> {
        View { space, pages, exe: self.programs.get(&space.exe).copied().unwrap_or(space.exe) }
    }

    /// The pages that a process has while others are cloned from it: those that it shares with most of its children.
    fn base(&self, process: &'a Process) -> Result<Pages<'a>> {
        if let Some(base) = self.bases.borrow().get(&process.pid) {
            return Ok(base.clone());
        }
        let own = self.own(process)?;
        let mut children = Vec::new();
        for child in self.processes.values().filter(|child| child.ppid == process.pid) {
            let child = self.own(child)?;
            if share::plan(own, child).is_some_and(|plan| plan.shared >= WORTH) {
                children.push(child.pages);
            }
        }
        let base = match children.len() {
            // Where there is only one, the parent's own pages are as good.
            0 | 1 => Cow::Borrowed(own.pages),
            _ => Cow::Owned(share::common(own.space, own.pages, &children)),
        };
        let base = Rc::new(base);
        self.bases.borrow_mut().insert(process.pid, base.clone());
        Ok(base)
    }

    /// What turns a clone of process `from` into a process with `space` and `pages`, if they have pages in common.
    fn plan(&self, from: i32, space: &AddressSpace, pages: &[PageRun]) -> Result<Option<Plan>> {
        // A zombie has no memory.
        let Some(from) = self.processes.get(&from).copied() else { return Ok(None) };
        let base = self.base(from)?;
        let plan = share::plan(self.view(&from.mm, &base), self.view(space, pages));
        Ok(plan.filter(|plan| plan.shared >= WORTH))
    }

    /// Is it worth while to clone `child` from a stub that has the memory of `from`?
    pub(super) fn share(&self, from: i32, child: i32) -> Result<bool> {
        let Some(child) = self.processes.get(&child).copied() else { return Ok(false) };
        Ok(self.plan(from, &child.mm, self.own(child)?.pages)?.is_some())
    }

    /// Makes the address space of process `pid` for others to be cloned from it, in a stub that `holds` that of another
    /// process, its own, or none.
    pub(super) fn prepare(
        &self,
        leader: &mut Stopped,
        inheritance: &Inheritance,
        holds: Option<i32>,
        pid: i32,
    ) -> Result<()> {
        let process = self.process(pid)?;
        let base = self.base(process)?;
        self.build(leader, inheritance, holds, process, &base)
    }

    /// Makes the address space as it is in the image. Nothing is cloned from it any more. Gives the ranges of addresses
    /// whose content is to follow. Memory that is shared with other processes does not: it has to be there when they
    /// are cloned.
    pub(super) fn finish(
        &self,
        leader: &mut Stopped,
        inheritance: &Inheritance,
        holds: Option<i32>,
        pid: i32,
    ) -> Result<Vec<(u64, u64)>> {
        let process = self.process(pid)?;
        let own = self.own(process)?;
        if holds == Some(pid) {
            let plan = share::rewrite(own.space, &self.base(process)?, own.pages);
            self.change(leader, inheritance, own.space, &plan)?;
            return Ok(Vec::new());
        }
        let shares = match holds {
            Some(other) => self.plan(other, own.space, own.pages)?.is_some(),
            None => false,
        };
        let later = if self.lazy && !shares {
            lazy::ranges(process, own.pages, &self.files.pinned(process))
        } else {
            Vec::new()
        };
        let now = match later.is_empty() {
            true => Cow::Borrowed(own.pages),
            false => Cow::Owned(lazy::at_once(process, own.pages, &later)),
        };
        if shares {
            self.build(leader, inheritance, holds, process, own.pages)?;
        } else {
            self.make_room(leader, inheritance, holds)?;
            self.anew(leader, inheritance, own.space, &now)?;
        }
        Ok(later)
    }

    /// Empties a stub that has the memory of another process.
    fn make_room(&self, leader: &mut Stopped, inheritance: &Inheritance, holds: Option<i32>) -> Result<()> {
        match holds {
            Some(other) => mappings::empty(leader, &self.process(other)?.mm, inheritance),
            None => Ok(()),
        }
    }

    fn build(
        &self,
        leader: &mut Stopped,
        inheritance: &Inheritance,
        holds: Option<i32>,
        process: &'a Process,
        pages: &[PageRun],
    ) -> Result<()> {
        let space = &process.mm;
        if let Some(other) = holds
            && let Some(plan) = self.plan(other, space, pages)?
        {
            return self.change(leader, inheritance, space, &plan);
        }
        self.make_room(leader, inheritance, holds)?;
        self.anew(leader, inheritance, space, pages)
    }

    fn anew(
        &self,
        leader: &mut Stopped,
        inheritance: &Inheritance,
        space: &AddressSpace,
        pages: &[PageRun],
    ) -> Result<()> {
        let pulled = mappings::pull(leader, &mappings::mapped(space), self.files, inheritance)?;
        let all: Vec<usize> = (0..space.mappings.len()).collect();
        mappings::map(leader, space, &all, self.files, &pulled, inheritance)?;
        mappings::fields(leader, space, pulled.get(&space.exe).copied(), inheritance)?;
        huge::prepare(leader, inheritance.layout, space, pages)?;
        content::fill(leader.pid, space, self.part, pages)?;
        vdso::rebuild(leader, space, inheritance)
    }

    fn change(
        &self,
        leader: &mut Stopped,
        inheritance: &Inheritance,
        space: &AddressSpace,
        plan: &Plan,
    ) -> Result<()> {
        mappings::change(leader, plan, inheritance)?;
        let new = plan.map.iter().filter_map(|index| space.mappings.get(*index));
        let files = new.filter_map(|mapping| match mapping.backing {
            Backing::PrivateFile { file, .. } | Backing::SharedFile { file, .. } => Some(file),
            _ => None,
        });
        let pulled = mappings::pull(leader, &mappings::numbered(files), self.files, inheritance)?;
        mappings::map(leader, space, &plan.map, self.files, &pulled, inheritance)?;
        // The executable is the same, and the kernel's mappings are where they belong.
        mappings::fields(leader, space, None, inheritance)?;
        let mut batch = Batch::new(inheritance.layout.arena);
        for (range, advice) in &plan.advise {
            let name = format!("madvise({advice}) for {:x}-{:x}", range.start, range.end);
            let args = [range.start, range.end - range.start, *advice as u64];
            batch.call(name, libc::SYS_madvise, &args);
            leader.flush(&mut batch)?;
        }
        for range in &plan.discard {
            let name = format!("dropping pages {:x}-{:x}", range.start, range.end);
            let args = [range.start, range.end - range.start, libc::MADV_DONTNEED as u64];
            batch.call(name, libc::SYS_madvise, &args);
            leader.flush(&mut batch)?;
        }
        leader.run(batch, false)?.all_ok()?;
        content::fill(leader.pid, space, self.part, &plan.write)
    }
}
