//! One stub becomes the process it stands for.

use super::files::Files;
use super::layout::Layout;
use super::spaces::Spaces;
use super::tree::Stub;
use super::{descriptors, mappings, seed, thread};
use crate::memory::lazy::{Space, server};
use crate::sys::userfaultfd::Userfaultfd;
use crate::sys::{pidfd, task};
use crate::tracee::{Batch, Stopped};
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::process::{PosixTimer, Process, SigInfo};
use std::os::fd::AsFd;

const SIGNALS: i32 = 64;
// prctl(2)
const PR_SET_DUMPABLE: u64 = 4;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const PR_SET_THP_DISABLE: u64 = 41;
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;

/// Rebuilds everything of the process but its registers. Gives what is to follow of its memory.
pub(super) fn rebuild(
    stub: &mut Stub,
    process: &Process,
    files: &Files,
    spaces: &Spaces<'_>,
    layout: Layout,
) -> Result<Option<Space>> {
    let (inheritance, holds) = (stub.inheritance.clone(), stub.holds);
    let later = spaces
        .finish(stub.leader()?, &inheritance, holds, process.pid)
        .context("rebuilding the address space")?;
    // Made while it may: the process's own credentials come later.
    let uffd = if later.is_empty() { None } else { Some(userfaultfd(stub.leader()?, layout)?) };
    descriptors::rebuild(stub, process, files).context("rebuilding the descriptor table")?;
    attributes(stub.leader()?, process, layout)?;
    for record in process.threads.iter().skip(1) {
        let clone = seed::clone_thread(stub.leader()?, layout, record.tid)
            .with_context(|| format!("creating thread {}", record.tid))?;
        stub.threads.push(clone);
    }
    if stub.threads.len() != process.threads.len() {
        bail!("the image has a process without threads");
    }
    timers(stub.leader()?, process, layout).context("rebuilding timers")?;
    let waiting = process.threads.iter().flat_map(|t| &t.pending).chain(&process.pending);
    let waiting = waiting.filter_map(signal).fold(0u64, |set, s| set | 1 << (s - 1));
    limits(stub.leader()?, process, layout)?;
    for (stopped, record) in stub.threads.iter_mut().zip(&process.threads) {
        thread::rebuild(stopped, record, layout)
            .with_context(|| format!("rebuilding thread {}", record.tid))?;
    }
    if process.dumpable < 2 {
        // A change of credentials resets it.
        let mut batch = Batch::new(layout.arena);
        batch.call("prctl(PR_SET_DUMPABLE)", libc::SYS_prctl, &[PR_SET_DUMPABLE, process.dumpable.into()]);
        stub.leader()?.run(batch, false)?.all_ok()?;
    }
    for (stopped, record) in stub.threads.iter_mut().zip(&process.threads) {
        stopped.avoid_bells(waiting);
        thread::queue(stopped, &record.pending, false, layout).context("queueing a thread's signals")?;
    }
    thread::queue(stub.leader()?, &process.pending, true, layout)
        .context("queueing the process's signals")?;
    let Some(uffd) = uffd else { return Ok(None) };
    // From here on, whoever touches what is missing waits.
    server::register(&uffd, &later)?;
    Ok(Some(Space { uffd, pid: stub.leader()?.pid, memory: process.mm.memory, ranges: later }))
}

/// A userfaultfd for the address space of a stub, which has no descriptors yet.
fn userfaultfd(leader: &mut Stopped, layout: Layout) -> Result<Userfaultfd> {
    let mut batch = Batch::new(layout.arena);
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let call = batch.call("userfaultfd", libc::SYS_userfaultfd, &[flags]);
    let number = leader.run(batch, false)?.result(call)?;
    let process = pidfd::open(leader.pid).context("opening a pidfd")?;
    let taken = pidfd::getfd(process.as_fd(), number as i32).context("taking a userfaultfd")?;
    let mut batch = Batch::new(layout.arena);
    batch.call("closing the userfaultfd", libc::SYS_close, &[number as u64]);
    leader.run(batch, false)?.all_ok()?;
    Ok(taken.into())
}

fn signal(info: &SigInfo) -> Option<i32> {
    let signal = i32::from_ne_bytes(info.0.get(..4)?.try_into().ok()?);
    (1..=SIGNALS).contains(&signal).then_some(signal)
}

fn attributes(leader: &mut Stopped, process: &Process, layout: Layout) -> Result<()> {
    let mut batch = Batch::new(layout.arena);
    // Children that ended while the tree grew have left SIGCHLD behind.
    let (set, now) = (batch.bytes(&u64::MAX.to_ne_bytes()), batch.bytes(&[0; 16]));
    for _ in 0..=SIGNALS {
        batch.call("dropping a signal", libc::SYS_rt_sigtimedwait, &[set, 0, now, 8]);
    }
    leader.run(batch, false)?;
    let mut batch = Batch::new(layout.arena);
    if process.root != "/" {
        let root = batch.cstr(&process.root);
        batch.call(format!("chroot({})", process.root), libc::SYS_chroot, &[root]);
    }
    let cwd = process.cwd.strip_prefix(process.root.trim_end_matches('/')).unwrap_or(&process.cwd);
    let at = batch.cstr(if cwd.is_empty() { "/" } else { cwd });
    batch.call(format!("chdir({})", process.cwd), libc::SYS_chdir, &[at]);
    batch.call("umask", libc::SYS_umask, &[process.umask.into()]);
    for number in (1..=SIGNALS).filter(|s| ![libc::SIGKILL, libc::SIGSTOP].contains(s)) {
        let action = process.actions.iter().find(|a| a.signal == number);
        let words = action.map_or([0; 4], |a| [a.handler, a.flags, a.restorer, a.mask]);
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let at = batch.bytes(&bytes);
        batch.call(format!("rt_sigaction({number})"), libc::SYS_rt_sigaction, &[number as u64, at, 0, 8]);
    }
    if process.subreaper {
        batch.call("prctl(PR_SET_CHILD_SUBREAPER)", libc::SYS_prctl, &[PR_SET_CHILD_SUBREAPER, 1]);
    }
    if process.thp_disable {
        batch.call("prctl(PR_SET_THP_DISABLE)", libc::SYS_prctl, &[PR_SET_THP_DISABLE, 1, 0, 0, 0]);
    }
    mappings::lock(&mut batch, &process.mm)?;
    leader.run(batch, false)?.all_ok()?;
    Ok(())
}

/// Resource limits, set from inside while the process may still do so.
fn limits(leader: &mut Stopped, process: &Process, layout: Layout) -> Result<()> {
    let mut batch = Batch::new(layout.arena);
    let mut set = Vec::new();
    for (resource, soft, hard) in &process.limits {
        let bytes = |soft: u64, hard: u64| [soft.to_ne_bytes(), hard.to_ne_bytes()].concat();
        let (_, have) = task::limit(0, *resource).context("reading our own resource limit")?;
        let (wanted, possible) = (bytes(*soft, *hard), bytes((*soft).min(have), (*hard).min(have)));
        let (wanted, possible) = (batch.bytes(&wanted), batch.bytes(&possible));
        // A hard limit can be raised with CAP_SYS_RESOURCE only; what is possible is set first and stays then.
        batch.call("prlimit64", libc::SYS_prlimit64, &[0, (*resource).into(), possible, 0]);
        set.push((
            *resource,
            batch.call("prlimit64", libc::SYS_prlimit64, &[0, (*resource).into(), wanted, 0]),
        ));
    }
    let done = leader.run(batch, false)?;
    for (resource, call) in set {
        if let Err(error) = done.result(call) {
            tracing::warn!(pid = process.pid, resource, %error, "a resource limit could not be raised to what it was");
        }
    }
    if process.oom_score_adj != 0 {
        let path = format!("/proc/{}/oom_score_adj", leader.pid);
        std::fs::write(&path, process.oom_score_adj.to_string())
            .with_context(|| format!("writing {path}"))?;
    }
    Ok(())
}

fn timers(leader: &mut Stopped, process: &Process, layout: Layout) -> Result<()> {
    let mut batch = Batch::new(layout.arena);
    for (which, timer) in process.itimers.iter().enumerate() {
        // One that has expired and whose signal still waits shows no time: the kernel starts it again with the
        // signal's delivery (kernel/time/itimer.c).
        let value = if timer.value == 0 { timer.interval } else { timer.value };
        if value == 0 {
            continue;
        }
        let parts = |us: u64| [us / 1_000_000, us % 1_000_000];
        let bytes: Vec<u8> =
            [parts(timer.interval), parts(value)].concat().iter().flat_map(|w| w.to_ne_bytes()).collect();
        let at = batch.bytes(&bytes);
        batch.call("setitimer", libc::SYS_setitimer, &[which as u64, at, 0]);
    }
    let restore_ids = (!process.timers.is_empty())
        .then(|| batch.call("timer ids (on)", libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0]));
    let done = leader.run(batch, false)?;
    let exact = restore_ids.is_some_and(|call| done.raw(call) == 0);
    let mut next = 0;
    for timer in &process.timers {
        // Without the option of Linux 6.15, ids count up: those before are made and deleted.
        if !exact {
            while next < timer.id {
                create(leader, layout, &PosixTimer { id: next, notify: libc::SIGEV_NONE, ..*timer }, true)?;
                next += 1;
            }
        }
        create(leader, layout, timer, false)?;
        next = timer.id + 1;
    }
    if exact {
        let mut batch = Batch::new(layout.arena);
        batch.call("timer ids (off)", libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0]);
        leader.run(batch, false)?.all_ok()?;
    }
    Ok(())
}

fn create(leader: &mut Stopped, layout: Layout, timer: &PosixTimer, delete: bool) -> Result<()> {
    let mut batch = Batch::new(layout.arena);
    // struct sigevent: value, signal, notify, tid
    let mut event = timer.value.to_ne_bytes().to_vec();
    for word in [timer.signal, timer.notify, timer.tid] {
        event.extend_from_slice(&word.to_ne_bytes());
    }
    event.resize(64, 0);
    let (event, id) = (batch.bytes(&event), batch.bytes(&timer.id.to_ne_bytes()));
    batch.call("timer_create", libc::SYS_timer_create, &[timer.clock as u64, event, id]);
    if delete {
        batch.call("timer_delete", libc::SYS_timer_delete, &[timer.id as u64]);
    } else if timer.remaining != 0 || timer.interval != 0 {
        let parts = |ns: u64| [ns / 1_000_000_000, ns % 1_000_000_000];
        let words = [parts(timer.interval), parts(timer.remaining.max(1))].concat();
        let at = batch.bytes(&words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>());
        batch.call("timer_settime", libc::SYS_timer_settime, &[timer.id as u64, 0, at, 0]);
    }
    let done = leader.run(batch, false)?;
    done.all_ok()?;
    let got = i32::from_ne_bytes(done.read(id, 4).try_into().unwrap_or_default());
    anyhow::ensure!(got == timer.id, "POSIX timer {} came back as {got}", timer.id);
    Ok(())
}
