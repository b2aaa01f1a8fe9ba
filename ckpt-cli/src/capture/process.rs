//! One process: what its threads share, and its relations.

use super::descriptors::Table;
use super::{address_space, thread};
use crate::tracee::freeze::FrozenProcess;
use crate::tracee::healing::Finder;
use crate::tracee::proc::Maps;
use crate::tracee::{Arena, Batch, Done, Stopped, proc};
use anyhow::{Context as _, Result};
use ckpt_common::image::MemoryId;
use ckpt_common::image::file::FileId;
use ckpt_common::image::process::{AddressSpace, IntervalTimer, PosixTimer, Process, SignalAction};
use procfs::process::Process as Proc;

const SIGNALS: i32 = 64;
const LIMITS: u32 = 16;
// prctl(2)
const PR_GET_DUMPABLE: u64 = 3;
const PR_GET_CHILD_SUBREAPER: u64 = 37;
const PR_GET_THP_DISABLE: u64 = 42;

/// Captures a frozen process; `known` are its mappings as they were a moment before.
pub(super) fn capture(
    frozen: &mut FrozenProcess,
    finder: &mut Finder,
    known: &Maps,
    table: &mut Table<'_>,
) -> Result<Process> {
    let pid = frozen.pid;
    let proc = Proc::new(pid)?;
    let (stat, status) = (proc.stat()?, proc.status()?);
    let last = |v: &Option<Vec<i32>>, or| v.as_ref().and_then(|v| v.last().copied()).unwrap_or(or);
    let mut process = Process {
        pid: last(&status.nspid, pid),
        ppid: stat.ppid,
        pgid: last(&status.nspgid, stat.pgrp),
        sid: last(&status.nssid, stat.session),
        zombie: stat.exit_code.filter(|_| frozen.threads.is_empty()),
        stopped: frozen.group_stop.is_some(),
        subreaper: false,
        exit_signal: stat.exit_signal.unwrap_or(libc::SIGCHLD),
        exe: String::new(),
        cmdline: Vec::new(),
        umask: status.umask.unwrap_or(0o022),
        cwd: String::new(),
        root: String::new(),
        limits: Vec::new(),
        actions: Vec::new(),
        pending: Vec::new(),
        itimers: [IntervalTimer::default(); 3],
        timers: Vec::new(),
        oom_score_adj: 0,
        dumpable: 1,
        thp_disable: false,
        mm: AddressSpace {
            memory: MemoryId(0),
            fields: [0; 11],
            auxv: Vec::new(),
            exe: FileId(0),
            mappings: Vec::new(),
            vdso: Vec::new(),
        },
        threads: Vec::new(),
        fds: Vec::new(),
    };
    if process.zombie.is_some() {
        return Ok(process);
    }
    process.exe =
        proc::link(pid, "exe").context("reading the executable's path")?.to_string_lossy().into_owned();
    process.cmdline = proc.cmdline().unwrap_or_default();
    process.cwd =
        proc::link(pid, "cwd").context("reading the working directory")?.to_string_lossy().into_owned();
    process.root =
        proc::link(pid, "root").context("reading the root directory")?.to_string_lossy().into_owned();
    process.oom_score_adj = i32::from(proc.oom_score_adj().unwrap_or(0));
    process.fds = table.descriptors(pid);

    let maps = table.memory().flags().and_then(|flags| {
        let maps = flags.maps(pid);
        maps.inspect_err(|error| tracing::debug!(pid, "its mappings are read from smaps: {error:#}")).ok()
    });
    let maps = maps.map_or_else(|| proc::maps_like_before(pid, known), Ok).context("reading the mappings")?;
    if let Some(leader) = frozen.threads.first() {
        process.pending = thread::pending(leader.tid, true)?;
    }
    let brk = frozen.with_arena(finder, &maps, |threads, arena| ask(threads, arena, &mut process))?;
    process.mm = address_space::capture(frozen, &stat, &maps, brk, table)?;
    Ok(process)
}

/// Asks from inside for what cannot be seen from outside; returns the end of the heap.
fn ask(threads: &mut [Stopped], arena: Arena, process: &mut Process) -> Result<u64> {
    let leader = threads.first_mut().context("it has no thread left")?;
    let brk = shared_state(leader, arena, process)?;
    for thread in threads {
        let captured =
            thread::capture(thread, arena).with_context(|| format!("capturing thread {}", thread.tid))?;
        process.threads.push(captured);
    }
    Ok(brk)
}

/// Runs the batch for what threads share; returns the end of the heap.
fn shared_state(leader: &mut Stopped, arena: Arena, process: &mut Process) -> Result<u64> {
    let pid = leader.pid;
    let mut batch = Batch::new(arena);
    let actions: Vec<_> = (1..=SIGNALS)
        .filter(|s| ![libc::SIGKILL, libc::SIGSTOP].contains(s))
        .map(|signal| {
            let old = batch.bytes(&[0; 32]);
            batch.call(
                format!("rt_sigaction({signal})"),
                libc::SYS_rt_sigaction,
                &[signal as u64, 0, old, 8],
            );
            (signal, old)
        })
        .collect();
    let itimers = [0, 1, 2].map(|which| {
        let at = batch.bytes(&[0; 32]);
        batch.call("getitimer", libc::SYS_getitimer, &[which, at]);
        at
    });
    // From outside it takes CAP_SYS_RESOURCE where the process is another user's (prlimit(2)).
    let limits: Vec<_> = (0..LIMITS)
        .map(|resource| {
            let at = batch.bytes(&[0; 16]);
            batch.call("prlimit64", libc::SYS_prlimit64, &[0, resource.into(), 0, at]);
            (resource, at)
        })
        .collect();
    let brk = batch.call("brk", libc::SYS_brk, &[0]);
    let dumpable = batch.call("prctl(PR_GET_DUMPABLE)", libc::SYS_prctl, &[PR_GET_DUMPABLE]);
    let thp = batch.call("prctl(PR_GET_THP_DISABLE)", libc::SYS_prctl, &[PR_GET_THP_DISABLE]);
    let subreaper = batch.bytes(&[0; 8]);
    batch.call("prctl(PR_GET_CHILD_SUBREAPER)", libc::SYS_prctl, &[PR_GET_CHILD_SUBREAPER, subreaper]);
    let mut timers = posix_timers(pid)?;
    let spaces: Vec<_> = timers
        .iter()
        .map(|t| {
            let at = batch.bytes(&[0; 32]);
            batch.call("timer_gettime", libc::SYS_timer_gettime, &[t.id as u64, at]);
            (at, batch.call("timer_getoverrun", libc::SYS_timer_getoverrun, &[t.id as u64]))
        })
        .collect();
    let done = leader.run(batch, true)?;
    done.all_ok()?;

    for (signal, at) in actions {
        let action = SignalAction {
            signal,
            handler: done.word(at),
            flags: done.word(at + 8),
            restorer: done.word(at + 16),
            mask: done.word(at + 24),
        };
        if (action.handler, action.flags, action.mask) != (0, 0, 0) {
            process.actions.push(action);
        }
    }
    process.itimers = itimers.map(|at| {
        let us = |at| done.word(at) * 1_000_000 + done.word(at + 8);
        IntervalTimer { interval: us(at), value: us(at + 16) }
    });
    for (timer, (at, overrun)) in timers.iter_mut().zip(spaces) {
        finish_timer(timer, &done, at);
        timer.overrun = done.result(overrun)? as i32;
    }
    process.timers = timers;
    process.limits = limits.into_iter().map(|(n, at)| (n, done.word(at), done.word(at + 8))).collect();
    process.dumpable = done.result(dumpable)? as u32;
    process.thp_disable = done.result(thp)? == 1;
    process.subreaper = done.word(subreaper) as u32 != 0;
    Ok(done.result(brk)? as u64)
}

fn finish_timer(timer: &mut PosixTimer, done: &Done, at: u64) {
    let ns = |at| done.word(at) * 1_000_000_000 + done.word(at + 8);
    (timer.interval, timer.remaining) = (ns(at), ns(at + 16));
}

/// /proc/PID/timers: `ID: 0`, `signal: 14/0000000000000000`, `notify: signal/pid.4242`, `ClockID: 1`.
fn posix_timers(pid: i32) -> Result<Vec<PosixTimer>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/timers")).context("reading POSIX timers")?;
    let mut timers: Vec<PosixTimer> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        if key == "ID" {
            let id = value.parse().context("POSIX timer id")?;
            timers.push(PosixTimer {
                id,
                clock: 0,
                notify: 0,
                signal: 0,
                value: 0,
                tid: 0,
                interval: 0,
                remaining: 0,
                overrun: 0,
            });
        }
        let Some(timer) = timers.last_mut() else { continue };
        match key {
            "signal" => {
                let (signal, data) = value.split_once('/').unwrap_or((value, "0"));
                timer.signal = signal.parse().unwrap_or(0);
                timer.value = u64::from_str_radix(data.trim_start_matches("0x"), 16).unwrap_or(0);
            }
            "notify" => {
                let (how, whom) = value.split_once('/').unwrap_or((value, ""));
                timer.notify = match how {
                    "none" => libc::SIGEV_NONE,
                    "thread" => libc::SIGEV_THREAD,
                    _ => libc::SIGEV_SIGNAL,
                };
                if let Some(tid) = whom.strip_prefix("tid.") {
                    timer.notify |= libc::SIGEV_THREAD_ID;
                    timer.tid = tid.parse().unwrap_or(0);
                }
            }
            "ClockID" => timer.clock = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    Ok(timers)
}

/// Turns parents from our PID namespace into the job's, and drops those outside the job.
pub(super) fn relate(processes: &mut [Process], ours: &[(i32, i32)]) {
    for process in processes {
        let parent = process.ppid;
        process.ppid = ours.iter().find(|(outer, _)| *outer == parent).map_or(0, |(_, inner)| *inner);
    }
}
