//! The engine that works on real processes: between the agent's words and those of the rooms that
//! capture and rebuild.

use super::{
    engine::{DumpSession, Engine, Outcome, RestoreSession},
    error::Classified,
};
use crate::{
    capture,
    objects::{self, tcp::CaptureError},
    rebuild,
    store::{PartReader, PartWriter},
    sys::pidfd,
};
use anyhow::{Context, Result};
use ckpt_common::{
    image::manifest::ProcessSummary,
    wire::{
        Blocker, Connection, CutReport, DumpOptions, FailureClass, FilePolicy, NetworkTask, PidPolicy,
        PlanReport, RestoreOptions, RestoreReport, Stdio,
    },
};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};
use std::os::fd::AsFd;

/// Real processes.
pub struct LiveEngine;

impl Engine for LiveEngine {
    fn plan_dump(&self, pids: &[i32], options: &DumpOptions) -> Result<(Box<dyn DumpSession>, PlanReport)> {
        check_privileges()?;
        let options = capture::Options {
            allow: options.allow.iter().cloned().collect(),
            files: match options.files {
                FilePolicy::Content => objects::FilePolicy::Content,
                FilePolicy::Length => objects::FilePolicy::Length,
                FilePolicy::None => objects::FilePolicy::None,
            },
            stop: options.stop,
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
        Ok((Box::new(LiveDump { session, processes }), report))
    }

    fn plan_restore(
        &self,
        part: PartReader,
        options: &RestoreOptions,
    ) -> Result<(Box<dyn RestoreSession>, RestoreReport)> {
        check_privileges()?;
        let mut rebuild = rebuild::Options {
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
    let passes = error.downcast_ref::<CaptureError>().is_some_and(CaptureError::is_transient);
    if !passes {
        return error;
    }
    Classified { message: format!("{error:#}"), hint: None, class: FailureClass::Transient }.into()
}

struct LiveDump {
    session: capture::Session,
    processes: Vec<ProcessSummary>,
}

impl DumpSession for LiveDump {
    fn arm(&mut self) -> Result<()> {
        self.session.arm()
    }

    fn cut(&mut self) -> Result<CutReport> {
        let report = self.session.cut().map_err(classified)?;
        Ok(CutReport {
            us: report.took.as_micros() as u64,
            processes: self.processes.clone(),
            bytes: report.bytes,
        })
    }

    fn settle(&mut self) -> Result<Vec<Connection>> {
        Ok(self.session.settle().map_err(classified)?.iter().map(connection).collect())
    }

    fn thaw(&mut self) -> Result<()> {
        self.session.thaw()
    }

    fn save(&mut self, part: &mut PartWriter) -> Result<()> {
        self.session.save(part)
    }

    fn finish(self: Box<Self>, outcome: Outcome) -> Result<()> {
        self.session.finish(match outcome {
            Outcome::LeaveRunning => capture::Outcome::LeaveRunning,
            Outcome::Kill => capture::Outcome::Kill,
        })
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
