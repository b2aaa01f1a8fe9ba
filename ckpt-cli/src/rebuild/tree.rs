//! The tree of stubs: every process with its PID, parent, session and process group.

use super::grow::Grower;
use super::layout::Layout;
use super::seed::Inheritance;
use super::segments::Segments;
use super::spaces::Spaces;
use super::thread;
use crate::sys::{pidfd, ptrace};
use crate::tracee::healing::Finder;
use crate::tracee::{Stopped, proc};
use anyhow::{Context as _, Result};
use ckpt_common::image::process::Process;
use std::collections::BTreeMap;
use std::os::fd::AsFd;

/// A stub process with its threads; the leader first.
pub(super) struct Stub {
    /// What it inherited.
    pub(super) inheritance: Inheritance,
    /// The process whose memory it has; `None`: it is empty.
    pub(super) holds: Option<i32>,
    /// Its threads.
    pub(super) threads: Vec<Stopped>,
}

impl Stub {
    /// Gives it the memory of process `pid`, which it stands for, so that others can be cloned from it.
    pub(super) fn prepare(&mut self, spaces: &Spaces<'_>, pid: i32) -> Result<()> {
        if self.holds != Some(pid) {
            let (inheritance, holds) = (self.inheritance.clone(), self.holds);
            let built = spaces.prepare(self.leader()?, &inheritance, holds, pid);
            built.with_context(|| format!("preparing the address space of process {pid}"))?;
            self.holds = Some(pid);
        }
        Ok(())
    }

    /// The leader.
    pub(super) fn leader(&mut self) -> Result<&mut Stopped> {
        self.threads.first_mut().context("the stub has no thread")
    }
}

/// A stub in the place of a process that has ended.
pub(super) struct Helper {
    /// It.
    pub(super) stopped: Stopped,
    /// The stub whose child it is, and who must reap it; `None` for the parent of all.
    pub(super) parent: Option<i32>,
    /// The process whose memory it has; `None`: it is empty.
    pub(super) holds: Option<i32>,
}

/// All stubs. Dropping it kills them.
pub(super) struct Tree {
    pub(super) stubs: BTreeMap<i32, Stub>,
    /// Stubs that are needed only while the tree grows.
    pub(super) helpers: BTreeMap<i32, Helper>,
    /// Parent of the root processes; init of the job's PID namespace, where it has one.
    pub(super) parent: Option<Stopped>,
    pub(super) layout: Layout,
}

impl Tree {
    /// Makes a stub for every process, and the memory of those whose children share it.
    pub(super) fn grow(
        processes: &[Process],
        spaces: &Spaces<'_>,
        segments: &mut Segments,
        layout: Layout,
        namespace: bool,
    ) -> Result<Self> {
        Grower::grow(processes, spaces, segments, layout, namespace)
    }

    /// The stub of a process.
    pub(super) fn stub(&mut self, pid: i32) -> Result<&mut Stub> {
        self.stubs.get_mut(&pid).with_context(|| format!("process {pid} has no stub"))
    }

    /// Gives every thread its own registers and lets it run.
    pub(super) fn release(mut self, processes: &[Process]) -> Result<Vec<i32>> {
        let arena = self.layout.arena;
        for process in processes.iter().filter(|p| p.zombie.is_none()) {
            let stub = self.stubs.get_mut(&process.pid).context("a process has no stub")?;
            for (stopped, thread) in stub.threads.iter_mut().zip(&process.threads) {
                thread::finish(stopped, thread)?;
            }
            let leader = stub.leader()?;
            let maps = proc::maps(leader.pid).context("reading the mappings")?;
            let pieces =
                Finder::default().find(leader.pid, &maps).context("the rebuilt process has no vdso")?;
            leader.unmap_arena(&pieces, None, arena).context("removing the arena")?;
        }
        let mut roots = Vec::new();
        for process in processes.iter().filter(|p| p.zombie.is_none()) {
            let Some(stub) = self.stubs.remove(&process.pid) else { continue };
            let pid = stub.threads.first().map_or(0, |t| t.pid);
            if process.ppid == 0 {
                roots.push(pid);
            }
            if process.stopped {
                let pidfd = pidfd::open(pid).context("opening a pidfd")?;
                pidfd::send_signal(pidfd.as_fd(), libc::SIGSTOP)
                    .context("stopping a process that was stopped")?;
            }
            for thread in stub.threads {
                thread.release()?;
            }
        }
        if let Some(init) = self.parent.take() {
            init.write(crate::sys::clone::reap_flag(), &[1])?;
            init.release()?;
        }
        Ok(roots)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let stubs = std::mem::take(&mut self.stubs).into_values().flat_map(|s| s.threads);
        let helpers = std::mem::take(&mut self.helpers).into_values().map(|helper| helper.stopped);
        for stopped in stubs.chain(helpers).chain(self.parent.take()) {
            if let Err(error) = kill(stopped) {
                tracing::warn!(%error, "a stub could not be removed");
            }
        }
    }
}

/// Kills a stub and waits until it is gone.
pub(super) fn kill(stub: Stopped) -> Result<()> {
    let (pid, tid) = (stub.pid, stub.tid);
    stub.abandon();
    match pidfd::open(pid) {
        Ok(process) => match pidfd::send_signal(process.as_fd(), libc::SIGKILL) {
            Err(e) if e.raw_os_error() != Some(libc::ESRCH) => return Err(e).context("killing a stub"),
            _ => {}
        },
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        Err(e) => return Err(e).context("opening a pidfd"),
    }
    while let Ok(wait) = ptrace::wait(tid, true) {
        if matches!(wait, ptrace::Wait::Gone(_)) {
            break;
        }
    }
    Ok(())
}
