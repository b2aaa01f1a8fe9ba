//! The engine that works on real processes: between the agent's words and those of the rooms that
//! capture and rebuild.

use super::{
    engine::{DumpSession, Engine, Outcome, RestoreSession},
    error::Classified,
    keeping::Keeping,
};
use crate::{
    capture,
    memory::{
        cow::{Lost, Way},
        dump as memory,
        lazy::server,
    },
    objects, rebuild,
    store::{PartReader, PartWriter, Store},
    sys::pidfd,
};
use anyhow::{Context, Result};
use ckpt_common::{
    image::manifest::{PartRef, ProcessSummary},
    wire::{
        Blocker, Connection, CopyBeforeWrite, CutReport, DumpTask, FailureClass, FilePolicy, MemoryReport,
        NetworkTask, PidPolicy, PlanReport, RestoreOptions, RestoreReport, Stdio,
    },
};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};
use std::{cell::RefCell, os::fd::AsFd, rc::Rc, time::Duration};

/// Real processes.
#[derive(Default)]
pub struct LiveEngine {
    /// What the last attempt has lost because it was not copied in the freeze.
    lost: Rc<RefCell<Lost>>,
}

impl Engine for LiveEngine {
    fn plan_dump(
        &self,
        pids: &[i32],
        task: &DumpTask,
        store: &Store,
    ) -> Result<(Box<dyn DumpSession>, PlanReport)> {
        check_privileges()?;
        // What `restore --lazy` has not filled yet would look like memory that was never touched.
        server::wait_for(pids)?;
        let options = &task.options;
        let way = match options.cow {
            CopyBeforeWrite::Auto => Way::Auto,
            CopyBeforeWrite::Bpf => Way::Bpf,
            CopyBeforeWrite::Uffd => Way::Uffd,
            CopyBeforeWrite::Stop => Way::Stop,
        };
        let memory = memory::Options {
            max_pause: Duration::from_micros(options.max_pause),
            way,
            stop: options.stop,
            lost: self.lost.borrow().0.clone(),
        };
        let full = options.full;
        let options = capture::Options {
            allow: options.allow.iter().cloned().collect(),
            files: match options.files {
                FilePolicy::Content => objects::FilePolicy::Content,
                FilePolicy::Length => objects::FilePolicy::Length,
                FilePolicy::None => objects::FilePolicy::None,
            },
            memory,
        };
        let session = capture::Session::plan(pids, options)?;
        let found = session.found();
        let report = PlanReport {
            processes: found.processes.clone(),
            blockers: found.blockers.iter().map(blocker).collect(),
            left_out: found.left_out.iter().map(blocker).collect(),
            connections: found.connections.iter().map(connection).collect(),
            ..Default::default()
        };
        let processes = found.processes.clone();
        let keeping = Keeping {
            keeper: None,
            store: store.clone(),
            job: task.job.clone(),
            dump: task.dump.clone(),
            base: None,
            full,
        };
        let lost = Rc::clone(&self.lost);
        Ok((Box::new(LiveDump { session: Some(session), processes, keeping, lost }), report))
    }

    fn plan_restore(
        &self,
        part: PartReader,
        options: &RestoreOptions,
    ) -> Result<(Box<dyn RestoreSession>, RestoreReport)> {
        check_privileges()?;
        let mut rebuild = rebuild::Options {
            lazy: options.lazy,
            pids: match options.pids {
                PidPolicy::Same => rebuild::Pids::Same,
                PidPolicy::Namespace => rebuild::Pids::Namespace,
                PidPolicy::Auto => rebuild::Pids::Auto,
            },
            ..Default::default()
        };
        match &options.stdio {
            Stdio::Log(directory) => {
                rebuild.stdio = rebuild::Stdio::Log;
                rebuild.log_directory = directory.into();
            }
            Stdio::Inherit { pid } => {
                take_streams(*pid)?;
                rebuild.stdio = rebuild::Stdio::Inherit;
            }
            Stdio::Null => rebuild.stdio = rebuild::Stdio::Null,
        }
        let session = rebuild::Session::plan(part, rebuild)?;
        let blockers = session.obstacles().iter().map(|obstacle| {
            let process = session.processes().iter().find(|process| Some(process.pid) == obstacle.pid);
            let name = process.and_then(|process| process.exe.rsplit('/').next());
            Blocker {
                pid: obstacle.pid.unwrap_or_default(),
                process: name.unwrap_or_default().to_owned(),
                item: obstacle.what.clone(),
                reason: obstacle.reason.clone(),
                allow: None,
            }
        });
        let blockers = blockers.collect();
        let report = RestoreReport { blockers, finished: session.finished()?, ..Default::default() };
        Ok((Box::new(LiveRestore(session)), report))
    }
}

/// Without privileges every look at a process fails in a way of its own: said once, and first.
fn check_privileges() -> Result<()> {
    let hint = Some("run ckpt as root; `ckpt doctor` shows what else is missing".to_owned());
    let class = FailureClass::System;
    crate::doctor::privileges()
        .map_err(|message| Classified { message: format!("no privileges: {message}"), hint, class }.into())
}

fn connection(end: &capture::Connection) -> Connection {
    Connection {
        pid: end.pid,
        fd: end.fd,
        local: end.local.into(),
        remote: end.peer.into(),
        peer_closed: end.peer_closed,
        position: end.position,
    }
}

fn blocker(found: &capture::Blocker) -> Blocker {
    Blocker {
        pid: found.pid,
        process: found.process.clone(),
        item: found.what.clone(),
        reason: found.reason.clone(),
        allow: found.allow.map(str::to_owned),
    }
}

/// Makes the standard streams of the coordinator, a process of this node, our own.
fn take_streams(pid: u32) -> Result<()> {
    let pid = i32::try_from(pid)?;
    let pidfd =
        pidfd::open(pid).with_context(|| format!("opening process {pid}, whose streams to inherit"))?;
    let take = |fd| {
        let taken = pidfd::getfd(pidfd.as_fd(), fd);
        taken.with_context(|| format!("taking descriptor {fd} of process {pid}"))
    };
    dup2_stdin(take(0)?).context("taking standard input")?;
    dup2_stdout(take(1)?).context("taking standard output")?;
    dup2_stderr(take(2)?).context("taking standard error")?;
    Ok(())
}

/// What passes by itself is marked as such.
fn classified(error: anyhow::Error) -> anyhow::Error {
    let passes = capture::passes(&error);
    // The next dump saves them before it lets the job run on.
    let lost = error.downcast_ref::<Lost>().is_some();
    if !passes && !lost {
        return error;
    }
    Classified { message: format!("{error:#}"), hint: None, class: FailureClass::Transient }.into()
}

/// A dump of this node's processes. Its end, whatever it is, goes to the keeper.
struct LiveDump {
    session: Option<capture::Session>,
    processes: Vec<ProcessSummary>,
    keeping: Keeping,
    lost: Rc<RefCell<Lost>>,
}

impl LiveDump {
    fn session(&mut self) -> Result<&mut capture::Session> {
        self.session.as_mut().context("the dump has ended")
    }
}

impl DumpSession for LiveDump {
    fn base(&mut self) -> Result<Option<PartReader>> {
        let Some((base, kept)) = self.keeping.take() else { return Ok(None) };
        self.session()?.build_on(base.clone(), kept);
        Ok(Some(base))
    }

    fn arm(&mut self, part: &mut PartWriter) -> Result<()> {
        self.session()?.arm(part)
    }

    fn sample(&mut self) -> Result<u64> {
        self.session()?.sample()
    }

    fn cut(&mut self) -> Result<CutReport> {
        let processes = self.processes.clone();
        let report = self.session()?.cut().map_err(classified)?;
        let left_out = report.left_out.iter().map(blocker).collect();
        Ok(CutReport { us: report.took.as_micros() as u64, processes, bytes: report.bytes, left_out })
    }

    fn settle(&mut self) -> Result<Vec<Connection>> {
        Ok(self.session()?.settle().map_err(classified)?.iter().map(connection).collect())
    }

    fn thaw(&mut self) -> Result<()> {
        self.session()?.thaw()
    }

    fn save(&mut self, part: &mut PartWriter) -> Result<()> {
        let saved = self.session()?.save(part);
        if let Some(lost) = saved.as_ref().err().and_then(|error| error.downcast_ref::<Lost>()) {
            self.lost.replace(lost.clone());
        }
        saved.map_err(classified)
    }

    fn memory(&self) -> MemoryReport {
        let report = self.session.as_ref().map(capture::Session::memory).unwrap_or_default();
        let base = self.keeping.base_name().filter(|_| report.incremental);
        MemoryReport { base, times: report.times, processes: report.processes }
    }

    fn finish(mut self: Box<Self>, outcome: Outcome, part: &PartRef) -> Result<()> {
        let session = self.session.take().context("the dump has ended")?;
        let kept = session.finish(match outcome {
            Outcome::LeaveRunning => capture::Outcome::LeaveRunning,
            Outcome::Kill => capture::Outcome::Kill,
        })?;
        self.keeping.give_new(part, kept);
        Ok(())
    }
}

impl Drop for LiveDump {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            self.keeping.give_back(session.abandon());
        }
    }
}

struct LiveRestore(rebuild::Session);

impl RestoreSession for LiveRestore {
    fn build(&mut self, task: &NetworkTask) -> Result<()> {
        let (peers, stand_ins) = (task.peers.clone(), task.stand_ins.clone());
        let mut network = rebuild::Network { peers, stand_ins, ..Default::default() };
        task.addresses.iter().for_each(|(old, new)| network.addresses.insert(*old, *new));
        self.0.build(&network)
    }

    fn connect(&mut self) -> Result<()> {
        self.0.connect()
    }

    fn release(self: Box<Self>) -> Result<Vec<i32>> {
        self.0.release()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::error::failure_of;

    #[test]
    fn lost_pages_pass_with_the_next_attempt() {
        let lost = || {
            let pages = std::iter::once(1..3).collect();
            anyhow::Error::from(Lost(std::iter::once((7, pages)).collect()))
        };
        for error in [lost(), lost().context("saving memory")] {
            let failure = failure_of(&classified(error));
            assert_eq!(failure.class, FailureClass::Transient);
            assert!(failure.message.contains("2 pages of process 7"), "{}", failure.message);
        }
        let other = failure_of(&classified(anyhow::anyhow!("no memory")));
        assert_eq!(other.class, FailureClass::Other);
    }
}
