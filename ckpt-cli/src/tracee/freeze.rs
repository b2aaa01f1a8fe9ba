//! Stopping a whole tree of processes, and letting it go.

use super::healing::Finder;
use super::proc::{self, Maps};
use super::{Arena, Result, Stopped, TraceeError};
use crate::sys::ptrace::{self, Wait};
use anyhow::Context as _;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a thread may take to stop before the freeze is given up. Uninterruptible waits (D state) end in
/// milliseconds on a healthy node.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a thread that waits in vfork(2) is given before everything is thawed and tried again.
const VFORK_PATIENCE: Duration = Duration::from_millis(20);
/// How often a freeze is tried where something passes by itself, and the time everything runs in between.
const RETRIES: usize = 500;
const BETWEEN_TRIES: Duration = Duration::from_millis(2);

const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK;

/// A process whose threads are all stopped, or a zombie.
#[derive(Debug)]
pub struct FrozenProcess {
    /// PID as we see it.
    pub pid: i32,
    /// Its threads, the leader first; none for a zombie.
    pub threads: Vec<Stopped>,
    /// The stop signal where the process was stopped by job control before we came.
    pub group_stop: Option<i32>,
}

/// A frozen tree. Dropping it lets every thread run on unharmed.
#[derive(Debug, Default)]
pub struct Frozen {
    /// Processes by PID.
    pub processes: BTreeMap<i32, FrozenProcess>,
}

/// A thread on its way to a stop.
struct Stopping {
    pid: i32,
    tid: i32,
}

/// Why a thread cannot be seized.
enum Refusal {
    /// It has ended.
    Ended,
    /// It was born by one that we trace, so it is traced already and stops by itself; the event has not been read yet.
    Ours,
    /// We may not, or another one traces it.
    Other,
}

impl Refusal {
    fn of(pid: i32, tid: i32) -> Self {
        let thread = procfs::process::Process::new(pid).and_then(|process| process.task_from_tid(tid));
        match thread.and_then(|thread| thread.status()) {
            // Whatever else keeps us from looking at it: it may run on, so it is not left out.
            Err(_) if Path::new(&format!("/proc/{pid}/task/{tid}")).exists() => Self::Other,
            Err(_) => Self::Ended,
            Ok(status) if status.state.starts_with(['Z', 'X']) => Self::Ended,
            Ok(status) if status.tracerpid == nix::unistd::gettid().as_raw() => Self::Ours,
            Ok(_) => Self::Other,
        }
    }
}

#[derive(Default)]
struct Freezer {
    seized: BTreeSet<i32>,
    stopping: Vec<Stopping>,
    frozen: Frozen,
}

impl Frozen {
    /// Freezes the processes and all their descendants, those born meanwhile included.
    pub fn freeze(pids: &[i32]) -> Result<Self> {
        let mut tries = 0;
        loop {
            let mut freezer = Freezer::default();
            match freezer.freeze(pids) {
                Ok(()) => match freezer.stands_in_arena() {
                    None => return Ok(freezer.frozen),
                    Some(_) if tries < RETRIES => {}
                    Some(tid) => {
                        let place = "a batch of a ckpt that was killed".to_owned();
                        return Err(TraceeError::Stuck { tid, seconds: 0, place });
                    }
                },
                Err(TraceeError::Stuck { .. }) if tries < RETRIES && freezer.waits_in_vfork() => {
                    freezer.abandon_stopping();
                }
                Err(error) => {
                    freezer.abandon_stopping();
                    return Err(error);
                }
            }
            drop(freezer);
            tries += 1;
            std::thread::sleep(BETWEEN_TRIES);
        }
    }

    /// Lets everything run on. Errors of single threads do not keep the others frozen; the first is returned. That
    /// a thread is gone is none: the first to run on may end the process.
    pub fn thaw(self) -> Result<()> {
        let mut first = Ok(());
        for process in self.processes.into_values() {
            for thread in process.threads {
                match thread.release() {
                    Err(TraceeError::Request { source, .. })
                        if source.raw_os_error() == Some(libc::ESRCH) => {}
                    done => first = first.and(done),
                }
            }
        }
        first
    }
}

impl Freezer {
    fn freeze(&mut self, pids: &[i32]) -> Result<()> {
        let mut known: Vec<i32> = pids.to_vec();
        // Were all descendants of what is stopped known when it was looked for them?
        let mut complete = false;
        loop {
            let seized = self.seized.len();
            for pid in known.clone() {
                self.seize_threads(pid)?;
            }
            self.collect()?;
            if complete && self.seized.len() == seized {
                return Ok(());
            }
            let before = known.len();
            for pid in known.clone() {
                known.extend(proc::tree(pid));
            }
            known.extend(self.frozen.processes.keys().copied());
            known.sort_unstable();
            known.dedup();
            complete = known.len() == before;
        }
    }

    fn seize_threads(&mut self, pid: i32) -> Result<()> {
        if proc::state(pid).is_some_and(|s| s == 'Z') && !self.frozen.processes.contains_key(&pid) {
            self.process(pid);
            return Ok(());
        }
        for tid in proc::threads(pid).unwrap_or_default() {
            if self.seized.contains(&tid) || (tid != pid && proc::is_kernels(pid, tid)) {
                continue;
            }
            match ptrace::seize(tid, OPTIONS) {
                Ok(()) => {}
                // Ended meanwhile, or a thread that is already on its way out.
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => continue,
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => match Refusal::of(pid, tid) {
                    Refusal::Ended => continue,
                    Refusal::Ours => {
                        self.seized.insert(tid);
                        self.stopping.push(Stopping { pid, tid });
                        continue;
                    }
                    Refusal::Other => return Err(TraceeError::request("seizing", tid)(e)),
                },
                Err(e) => return Err(TraceeError::request("seizing", tid)(e)),
            }
            self.seized.insert(tid);
            self.stopping.push(Stopping { pid, tid });
            ptrace::interrupt(tid).map_err(TraceeError::request("interrupting", tid))?;
        }
        Ok(())
    }

    /// Waits until every seized thread has stopped or ended.
    fn collect(&mut self) -> Result<()> {
        let start = Instant::now();
        while !self.stopping.is_empty() {
            let mut waiting = std::mem::take(&mut self.stopping);
            let before = waiting.len();
            while let Some(thread) = waiting.pop() {
                match self.step(&thread) {
                    Ok(true) => {}
                    Ok(false) => self.stopping.push(thread),
                    Err(error) => {
                        self.stopping.push(thread);
                        self.stopping.append(&mut waiting);
                        return Err(error);
                    }
                }
            }
            let waited = start.elapsed();
            if let Some(thread) = self
                .stopping
                .first()
                .filter(|_| waited > PATIENCE || (waited > VFORK_PATIENCE && self.waits_in_vfork()))
            {
                let place =
                    std::fs::read_to_string(format!("/proc/{}/wchan", thread.tid)).unwrap_or_default();
                return Err(TraceeError::Stuck { tid: thread.tid, seconds: waited.as_secs(), place });
            }
            if self.stopping.len() == before {
                match waited {
                    w if w < Duration::from_millis(1) => std::thread::yield_now(),
                    _ => std::thread::sleep(Duration::from_micros(100)),
                }
            }
        }
        Ok(())
    }

    /// One look at a thread; true once it is stopped or gone.
    fn step(&mut self, thread: &Stopping) -> Result<bool> {
        let tid = thread.tid;
        match ptrace::wait(tid, false).map_err(TraceeError::request("waiting for the stop", tid))? {
            Wait::Nothing => Ok(false),
            Wait::Gone(_) => {
                self.seized.remove(&tid);
                Ok(true)
            }
            Wait::EventStop(signal) => {
                let stopped = Stopped::new(thread.pid, tid)?;
                let process = self.process(thread.pid);
                let at =
                    process.threads.partition_point(|t| (t.tid != t.pid, t.tid) < (tid != thread.pid, tid));
                process.threads.insert(at, stopped);
                if signal != libc::SIGTRAP {
                    process.group_stop = Some(signal);
                }
                Ok(true)
            }
            Wait::Event(_) => {
                // clone, fork or vfork: the child is traced already and will stop by itself.
                let child =
                    ptrace::event_message(tid).map_err(TraceeError::request("reading an event", tid))? as i32;
                if child != 0 && self.seized.insert(child) {
                    self.stopping.push(Stopping { pid: tgid(child).unwrap_or(child), tid: child });
                }
                go_on(tid, 0)
            }
            Wait::Signal(signal) => go_on(tid, signal),
            Wait::Syscall => go_on(tid, 0),
        }
    }

    fn process(&mut self, pid: i32) -> &mut FrozenProcess {
        self.frozen.processes.entry(pid).or_insert_with(|| FrozenProcess {
            pid,
            threads: Vec::new(),
            group_stop: None,
        })
    }

    /// Does a thread that does not stop wait for its vfork child? ptrace cannot stop it there, and the child, once
    /// stopped, would never end the wait.
    fn waits_in_vfork(&self) -> bool {
        self.stopping.iter().any(|t| {
            let call = std::fs::read_to_string(format!("/proc/{}/syscall", t.tid)).unwrap_or_default();
            let state = procfs::process::Process::new(t.pid)
                .and_then(|p| p.task_from_tid(t.tid))
                .and_then(|t| t.stat())
                .map_or('?', |s| s.state);
            let number = call.split(' ').next().and_then(|n| n.parse::<i64>().ok());
            state == 'D' && [libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3].map(Some).contains(&number)
        })
    }

    /// A thread that has not come out of a batch yet since the ckpt that had it run was killed: what we would take for
    /// its registers would be the batch's.
    fn stands_in_arena(&self) -> Option<i32> {
        let mut threads = self.frozen.processes.values().flat_map(|process| &process.threads);
        threads.find(|thread| Arena::has(thread.regs().rip)).map(|thread| thread.tid)
    }

    /// Lets threads go that never reached a stop: they must stop once to be detached.
    fn abandon_stopping(&mut self) {
        // Everything that is stopped goes first: a vfork waiter stops only after its child has run on.
        for process in std::mem::take(&mut self.frozen).processes.into_values() {
            drop(process.threads);
        }
        let deadline = Instant::now() + PATIENCE;
        let mut left = std::mem::take(&mut self.stopping);
        while !left.is_empty() && Instant::now() < deadline {
            left.retain(|t| match ptrace::wait(t.tid, false) {
                Ok(Wait::Nothing) => true,
                Ok(Wait::Signal(signal)) => ptrace::detach(t.tid, signal).is_err(),
                Ok(Wait::Gone(_)) | Err(_) => false,
                Ok(_) => ptrace::detach(t.tid, 0).is_err(),
            });
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// Lets a thread go on from a stop that is not the one waited for. Any stop makes the kernel forget the one that was asked
/// for (`ptrace_stop`, kernel/signal.c: "any trap clears pending STOP trap"), so it is asked for again.
fn go_on(tid: i32, signal: i32) -> Result<bool> {
    ptrace::interrupt(tid).map_err(TraceeError::request("interrupting", tid))?;
    ptrace::cont(tid, signal).map_err(TraceeError::request("resuming", tid))?;
    Ok(false)
}

fn tgid(tid: i32) -> Option<i32> {
    procfs::process::Process::new(tid).and_then(|p| p.status()).ok().map(|s| s.tgid)
}

impl FrozenProcess {
    /// Maps memory of ours in the process for the time of `act`: the arena of its batches.
    ///
    /// # Errors
    /// Nothing can be asked from inside the process; what `act` says. The arena is gone in any case.
    pub fn with_arena<T>(
        &mut self,
        finder: &mut Finder,
        maps: &Maps,
        act: impl FnOnce(&mut Vec<Stopped>, Arena) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let pieces = finder.find(self.pid, maps).ok_or(TraceeError::Unfit {
            pid: self.pid,
            reason: "it has no vdso with a system call instruction, so nothing can be asked from inside it",
        })?;
        let heals = scratch(self, maps, Stopped::healing_size());
        let leader = self.threads.first_mut().context("it has no thread left")?;
        let arena = match Arena::left_in(self.pid, maps) {
            Some(left) => {
                // Whoever made it may have been killed before its code was there.
                left.install(self.pid)?;
                left
            }
            None => leader.map_arena(&pieces, heals, Arena::SMALL)?,
        };
        let inside = act(&mut self.threads, arena);
        // Whoever did not come to the end of a batch stands in the arena still, and would run on there if we were killed.
        let mut back = Ok(());
        for thread in &mut self.threads {
            back = back.and(thread.give_back());
        }
        back?;
        // A failure is looked at behind the removal.
        if let Some(leader) = self.threads.first_mut() {
            leader.unmap_arena(&pieces, heals, arena)?;
        }
        inside
    }
}

/// An address in the program's stack at which `size` bytes are certainly unused, for the frames that heal injected
/// calls: below everything in `[stack]` where it was never touched, or below the leader's stack pointer.
pub fn scratch(process: &FrozenProcess, maps: &Maps, size: u64) -> Option<u64> {
    const RED_ZONE: u64 = 128;
    let stack = maps.iter().find(|m| m.path == "[stack]")?;
    let leader = process.threads.first()?;
    let sp = leader.regs().rsp;
    if (stack.start..stack.end).contains(&sp) {
        let at = sp.checked_sub(RED_ZONE + size)?;
        return (at >= stack.start).then_some(at & !63);
    }
    let pagemap = std::fs::File::open(format!("/proc/{}/pagemap", process.pid)).ok()?;
    let mut touched = false;
    let query = crate::sys::pagemap::Query {
        any: crate::sys::pagemap::category::PRESENT | crate::sys::pagemap::category::SWAPPED,
        ..Default::default()
    };
    use std::os::fd::AsFd;
    crate::sys::pagemap::scan(
        pagemap.as_fd(),
        stack.start,
        stack.start + size.next_multiple_of(4096),
        query,
        |_| {
            touched = true;
        },
    )
    .ok()?;
    (!touched).then_some(stack.start)
}
