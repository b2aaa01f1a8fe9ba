//! The first stub: a fork of ours, emptied of everything but the batch's arena and the kernel's mappings.

use super::layout::Layout;
use crate::sys::{clone, pidfd, ptrace};
use crate::tracee::healing::{Finder, Pieces};
use crate::tracee::{Batch, Stopped, TraceeError, proc};
use anyhow::{Context as _, Result, bail};
use nix::fcntl::{FcntlArg, fcntl};
use std::os::fd::AsRawFd;
use zerocopy::IntoBytes;

/// First address that user space does not have (x86-64, four-level page tables).
const END: u64 = 0x7fff_ffff_f000;
/// Lowest address that may be mapped at all (vm.mmap_min_addr is at least one page).
const BEGIN: u64 = 0x1000;
const RSEQ_FLAG_UNREGISTER: u64 = 1;

const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_EXITKILL;

/// A mapping of the kernel's, parked out of the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Parked {
    /// Name as in /proc/PID/maps.
    pub(super) name: String,
    /// Where it is.
    pub(super) start: u64,
    /// Its size in bytes.
    pub(super) size: u64,
}

/// What every stub inherits from the first.
#[derive(Clone, Debug)]
pub(super) struct Inheritance {
    /// Where things are.
    pub(super) layout: Layout,
    /// The kernel's mappings.
    pub(super) parked: Vec<Parked>,
    /// Descriptor of a stub that refers to us, to take descriptors from our table.
    pub(super) restorer: i32,
    /// Bytes of this node's vdso.
    pub(super) vdso: Vec<u8>,
}

/// The first stub and its parent.
pub(super) struct Seed {
    /// Emptied; others are cloned from it.
    pub(super) stub: Stopped,
    /// Parent of all processes without parent in the job: the init of their PID namespace, or a launcher that ends
    /// when they are there, so that they belong to this node's init and not to us.
    pub(super) parent: Stopped,
    /// What stubs inherit.
    pub(super) inheritance: Inheritance,
}

/// Waits for the stop of a traced thread and takes it over.
pub(super) fn take(pid: i32, tid: i32) -> Result<Stopped> {
    match ptrace::wait(tid, true).map_err(TraceeError::request("waiting", tid))? {
        ptrace::Wait::EventStop(_) => Ok(Stopped::new(pid, tid)?),
        other => bail!("thread {tid} did something else than stop: {other:?}"),
    }
}

fn adopt(pid: i32) -> Result<Stopped> {
    ptrace::seize(pid, OPTIONS).map_err(TraceeError::request("seizing", pid))?;
    ptrace::interrupt(pid).map_err(TraceeError::request("interrupting", pid))?;
    take(pid, pid)
}

/// Forks and empties the first stub. `above` is the highest descriptor number of the job.
pub(super) fn grow(layout: Layout, namespace: bool, above: i32) -> Result<Seed> {
    let us = pidfd::open(std::process::id() as i32).context("opening a pidfd of our own")?;
    let number = fcntl(&us, FcntlArg::F_DUPFD(above + 1)).with_context(|| {
        format!("placing a descriptor above {above}, the highest of the job (limit on open files?)")
    })?;
    let restorer = crate::sys::unix_socket::own(number);
    let flags = if namespace { (libc::CLONE_NEWPID | libc::CLONE_NEWNS) as u64 } else { 0 };
    let pid = clone::spawn_pausing(flags).context("forking the first stub (clone3)")?;
    let mut first = match adopt(pid) {
        Ok(stub) => stub,
        Err(error) => {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
            return Err(error);
        }
    };
    let maps = proc::maps(pid).context("reading the stub's mappings")?;
    let pieces =
        Finder::default().find(pid, &maps).context("this kernel gives no vdso: nothing can be injected")?;
    map_arena(&mut first, &pieces, layout)?;
    if namespace {
        remount_proc(&mut first, layout)?;
    }
    let mut stub = clone_process(&mut first, layout, None, 0)?;
    let mut batch = Batch::new(layout.arena);
    batch.call("closing descriptors", libc::SYS_close_range, &[0, u64::from(u32::MAX), 0]);
    first.run(batch, false)?.all_ok()?;
    let mut inheritance =
        Inheritance { layout, parked: Vec::new(), restorer: restorer.as_raw_fd(), vdso: Vec::new() };
    empty(&mut stub, &maps, &mut inheritance).context("emptying the first stub")?;
    Ok(Seed { stub, parent: first, inheritance })
}

fn map_arena(stub: &mut Stopped, pieces: &Pieces, layout: Layout) -> Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let args = [layout.arena.base, layout.arena.len, 7, flags as u64, u64::MAX, 0];
    stub.single_call("mapping the arena", pieces, None, libc::SYS_mmap, args)?;
    layout.arena.install(stub.pid)?;
    Ok(())
}

/// The namespace needs a /proc of its own.
fn remount_proc(init: &mut Stopped, layout: Layout) -> Result<()> {
    let mut batch = Batch::new(layout.arena);
    let (root, proc, kind) = (batch.cstr("/"), batch.cstr("/proc"), batch.cstr("proc"));
    batch.call("making mounts private", libc::SYS_mount, &[0, root, 0, libc::MS_REC | libc::MS_PRIVATE, 0]);
    batch.call("mounting /proc", libc::SYS_mount, &[kind, proc, kind, 0, 0]);
    Ok(init.run(batch, false)?.all_ok()?)
}

fn empty(stub: &mut Stopped, maps: &proc::Maps, inheritance: &mut Inheritance) -> Result<()> {
    let layout = inheritance.layout;
    let mut batch = Batch::new(layout.arena);
    if let Some(rseq) = ptrace::rseq(stub.tid).context("reading the stub's rseq registration")? {
        let args = [rseq.address, rseq.length.into(), RSEQ_FLAG_UNREGISTER, rseq.signature.into()];
        batch.call("unregistering rseq", libc::SYS_rseq, &args);
    }
    batch.call("clearing the robust list", libc::SYS_set_robust_list, &[0, 24]);
    let kernel: Vec<_> = maps.iter().filter(|m| m.by_kernel()).collect();
    let first = kernel.first().context("this kernel gives no vdso")?.start;
    for map in &kernel {
        let start = layout.parking + (map.start - first);
        let flags = (libc::MREMAP_FIXED | libc::MREMAP_MAYMOVE) as u64;
        batch.call(
            format!("moving {}", map.path),
            libc::SYS_mremap,
            &[map.start, map.size(), map.size(), flags, start],
        );
        inheritance.parked.push(Parked { name: map.path.clone(), start, size: map.size() });
    }
    unmap_all(&mut batch, layout);
    let restorer = inheritance.restorer as u64;
    batch.call("closing descriptors", libc::SYS_close_range, &[0, restorer - 1, 0]);
    batch.call("closing descriptors", libc::SYS_close_range, &[restorer + 1, u64::from(u32::MAX), 0]);
    stub.run(batch, false)?.all_ok()?;
    if let Some(vdso) = inheritance.parked.iter().find(|p| p.name == "[vdso]") {
        inheritance.vdso = vec![0; vdso.size as usize];
        crate::sys::memory::read(stub.pid, vdso.start, &mut inheritance.vdso).context("reading the vdso")?;
    }
    Ok(())
}

/// Unmaps everything but the arena and what is parked behind it.
pub(super) fn unmap_all(batch: &mut Batch, layout: Layout) {
    let (low, high) = layout.range();
    batch.call("unmapping what lies below", libc::SYS_munmap, &[BEGIN, low - BEGIN]);
    batch.call("unmapping what lies above", libc::SYS_munmap, &[high, END - high]);
}

/// Clones a process from a stub: its child, or with `CLONE_PARENT` in `flags` its sibling.
pub(super) fn clone_process(
    stub: &mut Stopped,
    layout: Layout,
    pid: Option<i32>,
    flags: u64,
) -> Result<Stopped> {
    let exit_signal = if flags & libc::CLONE_PARENT as u64 == 0 { libc::SIGCHLD as u64 } else { 0 };
    let args = clone::CloneArgs { flags, exit_signal, ..Default::default() };
    let tid = clone(stub, layout, pid, args)?;
    take(tid, tid)
}

/// Clones a thread; it is stopped before its first instruction.
pub(super) fn clone_thread(leader: &mut Stopped, layout: Layout, tid: i32) -> Result<Stopped> {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let args = clone::CloneArgs { flags: flags as u64, ..Default::default() };
    let pid = leader.pid;
    let tid = clone(leader, layout, Some(tid), args)?;
    take(pid, tid)
}

fn clone(stub: &mut Stopped, layout: Layout, pid: Option<i32>, mut args: clone::CloneArgs) -> Result<i32> {
    let mut batch = Batch::new(layout.arena);
    if let Some(pid) = pid {
        args.set_tid = batch.bytes(&pid.to_ne_bytes());
        args.set_tid_size = 1;
    }
    let at = batch.bytes(args.as_bytes());
    let what = match pid {
        Some(pid) => format!("creating process or thread {pid} (clone3 with set_tid)"),
        None => "creating a process (clone3)".into(),
    };
    batch.call(what, libc::SYS_clone3, &[at, size_of::<clone::CloneArgs>() as u64]);
    stub.run(batch, false)?.all_ok()?;
    stub.born().last().copied().context("the kernel did not report the new process")
}
