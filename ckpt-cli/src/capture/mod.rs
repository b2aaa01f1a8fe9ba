//! A live process tree becomes an image.
//!
//! [`Session`] goes through the phases of a dump on one node: *plan* (nothing is touched, everything that stands in
//! the way is listed), *cut* (freeze, take registers, objects and memory), *thaw*, *save*, *finish*. Dropping a
//! session at any point lets the job run on unharmed.

mod address_space;
mod descriptors;
mod plan;
mod process;
mod reference;
mod segments;
mod thread;

use crate::memory::dump::{self as memory, MemoryDump};
use crate::memory::kept::Kept;
use crate::network::hold::Hold;
use crate::objects::sysv;
use crate::objects::tcp::{CaptureError, Guard};
use crate::objects::{FilePolicy, Passing};
use crate::store::{PartReader, PartWriter};
use crate::sys::ptrace;
use crate::tracee::proc::{self, Maps};
use crate::tracee::rings;
use crate::tracee::{
    freeze::{Frozen, FrozenProcess},
    healing::Finder,
};
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::manifest::{PhaseTime, ProcessMemory};
use ckpt_common::image::{file::OpenFile, process::Process};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use plan::{Blocker, Connection, Plan};

/// How often the cut is tried where something passes by itself, and the time the job runs in between.
const TRIES: usize = 20;
const BETWEEN_TRIES: Duration = Duration::from_millis(5);

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Kinds of things outside the job that may come back closed or disconnected (`--allow`).
    pub allow: BTreeSet<String>,
    /// How files open for writing come back (`--files`).
    pub files: FilePolicy,
    /// What is wanted of the memory part, and whether the job is killed after the commit (`--stop`).
    pub memory: memory::Options,
}

/// Did a capture fail for something that passes by itself? Then it is worth another try.
pub fn passes(error: &anyhow::Error) -> bool {
    error.downcast_ref::<CaptureError>().is_some_and(CaptureError::is_transient)
        || error.is::<rings::Busy>()
        || error.is::<Passing>()
}

/// What is known after the cut.
#[derive(Clone, Debug, Default)]
pub struct CutReport {
    /// Time from the first stopped thread to the end of the cut on this node.
    pub took: Duration,
    /// Processes, zombies included.
    pub processes: usize,
    /// Threads.
    pub threads: usize,
    /// Bytes of memory copied.
    pub bytes: u64,
    /// What comes back closed or disconnected, as allowed.
    pub left_out: Vec<Blocker>,
}

/// How the memory was saved.
#[derive(Clone, Debug, Default)]
pub struct MemoryReport {
    /// Only what was modified since an older checkpoint.
    pub incremental: bool,
    /// What took how long.
    pub times: Vec<PhaseTime>,
    /// By process.
    pub processes: Vec<ProcessMemory>,
}

/// What becomes of the job at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It runs on.
    LeaveRunning,
    /// It is killed, its sockets silently closed.
    Kill,
}

/// One dump on one node. All calls must come from one thread: ptrace(2) knows its tracer by thread.
pub struct Session {
    options: Options,
    pids: Vec<i32>,
    plan: Plan,
    hold: Option<Hold>,
    /// From the first capture of a TCP socket to the last; stands by from `arm` on.
    guard: Option<Guard>,
    frozen: Option<Frozen>,
    halves: descriptors::Halves,
    sockets: descriptors::TcpSockets,
    processes: Vec<Process>,
    files: Vec<OpenFile>,
    memory: MemoryDump,
    /// Mappings with their flags as they were just before the freeze: reading flags walks all page tables.
    mappings: BTreeMap<i32, Maps>,
    /// PIDs as we see them, and as the processes do.
    numbers: Vec<(i32, i32)>,
}

impl Session {
    /// Looks at the processes and their descendants and lists what cannot be saved. Nothing is stopped.
    pub fn plan(pids: &[i32], options: Options) -> Result<Self> {
        crate::sys::task::raise_descriptor_limit().context("raising the limit on open files")?;
        let plan = plan::plan(pids, &options)?;
        let memory = MemoryDump::new(options.memory.clone(), None, Kept::default());
        Ok(Self {
            pids: pids.to_vec(),
            plan,
            options,
            hold: None,
            guard: None,
            frozen: None,
            halves: descriptors::Halves::default(),
            sockets: descriptors::TcpSockets::default(),
            processes: Vec::new(),
            files: Vec::new(),
            memory,
            mappings: BTreeMap::new(),
            numbers: Vec::new(),
        })
    }

    /// What [`Self::plan`] found.
    pub fn found(&self) -> &Plan {
        &self.plan
    }

    /// Goes on with what an earlier dump has left: the checkpoint that it made, and what tracks writes since.
    pub fn build_on(&mut self, base: PartReader, kept: Kept) {
        self.memory = MemoryDump::new(self.options.memory.clone(), Some(base), kept);
    }

    /// Makes ready what the freeze should not wait for, and copies memory ahead of it.
    pub fn arm(&mut self, part: &mut PartWriter) -> Result<()> {
        if self.options.memory.stop && !self.plan.connections.is_empty() {
            self.hold = Some(Hold::load().context("loading the traffic hold")?);
        }
        // It is a fork of us: while we are small.
        if self.plan.has_tcp {
            self.guard = Some(Guard::start()?);
        }
        let pids: Vec<i32> = self.plan.processes.iter().map(|process| process.pid).collect();
        let loading = self.memory.load_flags(&pids);
        self.memory.save_early(&self.pids, part).context("copying memory ahead of the freeze")?;
        match loading.map(JoinHandle::join) {
            Some(Ok(Ok(flags))) => self.memory.set_flags(flags),
            Some(Ok(Err(error))) => tracing::debug!("flags of mappings are read from smaps: {error:#}"),
            Some(Err(_)) => bail!("loading a BPF program panicked"),
            None => {}
        }
        if self.memory.flags().is_some() {
            return Ok(());
        }
        for process in &self.plan.processes {
            // One that has ended meanwhile is no obstacle.
            let maps = proc::maps_with_flags(process.pid).unwrap_or_default();
            self.mappings.insert(process.pid, maps);
        }
        Ok(())
    }

    /// Bytes of memory that were modified since the checkpoint that this one builds on, or since [`Self::arm`]. The job
    /// runs.
    pub fn sample(&mut self) -> Result<u64> {
        let mut pids: Vec<i32> = self.pids.iter().flat_map(|pid| proc::tree(*pid)).collect();
        pids.sort_unstable();
        pids.dedup();
        self.memory.sample(&pids)
    }

    /// Freezes the job and takes its state. The job stays frozen until [`Self::thaw`], [`Self::finish`] or drop.
    ///
    /// Some states pass by themselves, such as a connection that waits to be accepted: then the job runs on for a
    /// moment, and it is tried again.
    pub fn cut(&mut self) -> Result<CutReport> {
        let mut tries = 0;
        loop {
            let error = match self.try_cut() {
                Ok(report) => return Ok(report),
                Err(error) => error,
            };
            if !passes(&error) || tries == TRIES {
                return Err(error);
            }
            tries += 1;
            self.processes.clear();
            // It holds descriptors: a socket that the program closes meanwhile would stay open.
            if let Some(guard) = self.guard.take() {
                guard.dismiss()?;
                self.guard = Some(Guard::start()?);
            }
            std::thread::sleep(BETWEEN_TRIES);
        }
    }

    fn try_cut(&mut self) -> Result<CutReport> {
        let start = Instant::now();
        let mut frozen = Frozen::freeze(&self.pids).context("freezing the job")?;
        let mut finder = Finder::default();
        self.memory.begin_cut();
        let (options, foreign) = (&self.options, &self.plan.foreign);
        let mut table =
            descriptors::Table::new(&frozen, options, foreign, &mut self.memory, &mut self.guard)?;
        for pid in table.with_rings() {
            if let Some(process) = frozen.processes.get_mut(&pid) {
                settle(process, &mut finder).with_context(|| format!("capturing process {pid}"))?;
            }
        }
        table.capture()?;
        let (mut threads, mut reaped) = (0, Vec::new());
        for process in frozen.processes.values_mut() {
            threads += process.threads.len();
            let known = self.mappings.entry(process.pid).or_default();
            match process::capture(process, &mut finder, known, &mut table) {
                Ok(captured) => self.processes.push(captured),
                // A zombie whose parent does not stand still: it is not in the job.
                Err(_) if process.threads.is_empty() && proc::state(process.pid).is_none() => {
                    reaped.push(process.pid);
                }
                Err(error) => return Err(error.context(format!("capturing process {}", process.pid))),
            }
        }
        frozen.processes.retain(|pid, _| !reaped.contains(pid));
        let left_out;
        (self.files, self.halves, left_out) = table.finish()?;
        self.memory.copy_in_cut()?;
        reference::copy(&frozen).context("making a copy for a test")?;
        let pids: Vec<(i32, i32)> =
            frozen.processes.keys().copied().zip(self.processes.iter().map(|p| p.pid)).collect();
        process::relate(&mut self.processes, &pids);
        self.numbers = pids;
        let report = CutReport {
            took: start.elapsed(),
            processes: frozen.processes.len(),
            threads,
            bytes: self.memory.bytes(),
            left_out,
        };
        self.frozen = Some(frozen);
        Ok(report)
    }

    /// Takes what TCP sockets have received, when the sending halves of all nodes are taken: so no byte is missing
    /// between the two, and no packet has to be dropped. The job is still frozen.
    pub fn settle(&mut self) -> Result<Vec<Connection>> {
        self.sockets = std::mem::take(&mut self.halves).receiving()?;
        self.guard.take().map_or(Ok(()), Guard::dismiss)?;
        Ok(self.sockets.connections())
    }

    /// Lets the job run on; its state stays staged for [`Self::save`].
    pub fn thaw(&mut self) -> Result<()> {
        if let Some(frozen) = self.frozen.take() {
            frozen.thaw().context("letting the job run on")?;
        }
        Ok(())
    }

    /// Writes everything to the part.
    pub fn save(&mut self, part: &mut PartWriter) -> Result<()> {
        for process in &self.processes {
            part.record(process)?;
        }
        for file in &self.files {
            part.record(file)?;
        }
        for file in self.sockets.records() {
            part.record(&file?)?;
        }
        self.memory.save(part)
    }

    /// How the memory was saved.
    pub fn memory(&self) -> MemoryReport {
        let inner =
            |pid| self.numbers.iter().find(|(outer, _)| *outer == pid).map_or(pid, |(_, inner)| *inner);
        let processes = self.memory.statistics().map(|(pid, statistics)| ProcessMemory {
            pid: inner(pid),
            resident_bytes: statistics.own,
            modified_bytes: statistics.modified,
            presaved_bytes: statistics.presaved,
            cut_bytes: statistics.cut,
            copied_before_write_bytes: statistics.before_write,
        });
        MemoryReport {
            incremental: self.memory.is_incremental(),
            times: self.memory.times().to_vec(),
            processes: processes.collect(),
        }
    }

    /// Ends the session after the commit. Gives what is to be kept for the next dump.
    pub fn finish(mut self, outcome: Outcome) -> Result<Kept> {
        if outcome == Outcome::LeaveRunning {
            self.thaw()?;
            return Ok(self.take_memory().end(true));
        }
        let Some(frozen) = self.frozen.take() else { return Ok(Kept::default()) };
        // Their peers never notice: sockets in repair mode close without a word, and what others still send gets no
        // answer while the hold is there.
        if let Some(hold) = &mut self.hold {
            hold.add(self.sockets.cookies()?).context("holding the traffic of the job")?;
        }
        self.sockets.silence()?;
        let mut threads = Vec::new();
        for process in frozen.processes.into_values() {
            let pidfd = crate::sys::pidfd::open(process.pid).context("opening a pidfd")?;
            threads.extend(process.threads.iter().map(|t| t.tid));
            process.threads.into_iter().for_each(crate::tracee::Stopped::abandon);
            match crate::sys::pidfd::send_signal(pidfd.as_fd(), libc::SIGKILL) {
                Err(e) if e.raw_os_error() != Some(libc::ESRCH) => return Err(e).context("ending the job"),
                _ => {}
            }
        }
        // A traced thread is gone for its parent only when its tracer has seen its end; a leader ends behind the others.
        for tid in threads.into_iter().rev() {
            while !matches!(ptrace::wait(tid, true), Ok(ptrace::Wait::Gone(_)) | Err(_)) {}
        }
        // They would outlive the job, and be in its way when it comes back.
        sysv::remove(&self.files)?;
        Ok(Kept::default())
    }

    /// Ends the session without a checkpoint; the job runs on. Gives what is to be kept for the next dump.
    pub fn abandon(mut self) -> Kept {
        let memory = self.take_memory();
        drop(self);
        memory.end(false)
    }

    fn take_memory(&mut self) -> MemoryDump {
        std::mem::replace(
            &mut self.memory,
            MemoryDump::new(self.options.memory.clone(), None, Kept::default()),
        )
    }
}

/// Waits until no request of a process to an io_uring is under way. It must not have registered the ring with a number
/// of its own.
fn settle(process: &mut FrozenProcess, finder: &mut Finder) -> Result<()> {
    let pid = process.pid;
    let maps = proc::maps(pid).context("reading the mappings")?;
    rings::settle(process, finder, &maps)?.ok_or(rings::Busy { pid })?;
    process.with_arena(finder, &maps, |threads, arena| {
        for thread in threads {
            if rings::are_registered(thread, arena)? {
                bail!(
                    "thread {} has registered an io_uring (IORING_REGISTER_RING_FDS): not supported yet",
                    thread.tid
                );
            }
        }
        Ok(())
    })
}

impl Drop for Session {
    fn drop(&mut self) {
        // It acts while the programs still stand.
        drop(self.guard.take());
        if let Err(error) = self.thaw() {
            tracing::warn!(%error, "the job could not be let go cleanly");
        }
    }
}
