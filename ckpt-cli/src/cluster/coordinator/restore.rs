//! A restore, from the coordinator's side.

use super::{Context, abort, all, ask_all, blocked, done, phase};
use crate::{
    cluster::{Result, addresses, fault::Faults, link::Link},
    job::placement,
    store::Store,
};
use ckpt_common::{
    image::manifest::{Checkpoint, Manifest, NodePart, PhaseTime},
    wire::{
        NetworkTask, Phase, PidPolicy, Request, Response, RestoreOptions, RestoreReport, RestoreTask, Stdio,
    },
};
use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// What to restore, and where.
pub struct RestoreRequest {
    /// Path of the store, the same on every node.
    pub store: PathBuf,
    /// Name of the checkpoint.
    pub name: String,
    /// Pairs of old and new node.
    pub places: Vec<(String, String)>,
    /// Nodes to use, where given.
    pub nodes: Option<Vec<String>>,
    /// Which PIDs the processes get.
    pub pids: PidPolicy,
    /// Where standard streams go that led out of the job.
    pub stdio: StdioChoice,
}

/// Where standard streams go that led out of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdioChoice {
    /// To files in the store.
    Log,
    /// To our own.
    Inherit,
    /// To /dev/null.
    Null,
}

/// What came of it.
pub struct RestoreOutcome {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    /// The nodes, in the order of the manifest, and the restored PIDs on each.
    pub nodes: Vec<(String, Vec<i32>)>,
    /// What took how long.
    pub phases: Vec<PhaseTime>,
    /// Time from the beginning to the release.
    pub took: Duration,
    /// Directories with the output of the processes, one per node.
    pub logs: Vec<PathBuf>,
    links: Vec<Link>,
}

impl RestoreOutcome {
    /// Waits until the restored processes have ended.
    pub fn wait(&self, context: &Context<'_>) -> Result<()> {
        let wait = |link: &Link| link.ask_within(&Request::Wait, context.interrupted, None);
        all(&self.links, wait).map(drop)
    }
}

/// Brings a checkpoint back.
///
/// # Errors
/// Whatever fails, nothing of the job runs afterwards: what was built is removed.
pub fn restore(request: &RestoreRequest, context: &Context<'_>) -> Result<RestoreOutcome> {
    let faults = context.faults()?;
    let start = Instant::now();
    let store = Store::open(&request.store)?;
    let checkpoint = store.resolve(&request.name)?;
    let old: Vec<_> = checkpoint.manifest.nodes.iter().map(|node| node.name.clone()).collect();
    let nodes = placement::place(&old, &request.places, request.nodes.as_deref())?;
    if request.stdio == StdioChoice::Inherit
        && let Some(node) = nodes.iter().find(|node| !context.launcher.is_local(node))
    {
        let why = format!("--stdio inherit works only on this machine, but a part goes to {node}");
        return Err(crate::job::JobError::BadPlacement(why).into());
    }
    let links = context.open(&nodes)?;
    let run =
        Run { request, context, faults, times: RefCell::default(), checkpoint: &checkpoint, store: &store };
    match run.phases(&links) {
        Ok((pids, logs)) => Ok(RestoreOutcome {
            nodes: nodes.into_iter().zip(pids).collect(),
            phases: run.times.into_inner(),
            took: start.elapsed(),
            logs,
            links,
            checkpoint,
        }),
        Err(error) => {
            abort(&links, context);
            Err(error)
        }
    }
}

struct Run<'a> {
    request: &'a RestoreRequest,
    context: &'a Context<'a>,
    faults: Faults,
    times: RefCell<Vec<PhaseTime>>,
    checkpoint: &'a Checkpoint,
    store: &'a Store,
}

impl Run<'_> {
    fn phase<R>(&self, which: Phase, act: impl FnOnce() -> Result<R>) -> Result<R> {
        phase(which, self.context, &self.faults, &self.times, act)
    }

    fn phases(&self, links: &[Link]) -> Result<(Vec<Vec<i32>>, Vec<PathBuf>)> {
        let logs = self.logs()?;
        let reports = self.phase(Phase::Plan, || self.plan(links, &logs))?;
        let tasks = network_tasks(&self.checkpoint.manifest, &reports);
        let request = |node: usize| Request::Build(tasks[node].clone());
        self.phase(Phase::Build, || ask_all(links, self.context, request, done))?;
        self.phase(Phase::Connect, || ask_all(links, self.context, |_| Request::Connect, done))?;
        let take = |response| match response {
            Response::Released(pids) => Some(pids),
            _ => None,
        };
        let pids = self.phase(Phase::Release, || ask_all(links, self.context, |_| Request::Release, take))?;
        Ok((pids, logs))
    }

    /// Log directories of the nodes, in the order of the manifest; none where they are not wanted.
    fn logs(&self) -> Result<Vec<PathBuf>> {
        if self.request.stdio != StdioChoice::Log {
            return Ok(Vec::new());
        }
        let nodes = self.checkpoint.manifest.nodes.iter();
        nodes.map(|node| Ok(self.store.log_directory(self.checkpoint, &node.name)?)).collect()
    }

    fn plan(&self, links: &[Link], logs: &[PathBuf]) -> Result<Vec<RestoreReport>> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let stdio = |node: usize| match (self.request.stdio, logs.get(node)) {
            (StdioChoice::Log, Some(log)) => Stdio::Log(text(log)),
            (StdioChoice::Inherit, _) => Stdio::Inherit { pid: std::process::id() },
            _ => Stdio::Null,
        };
        let manifest = &self.checkpoint.manifest;
        let request = |node: usize| {
            Request::PlanRestore(RestoreTask {
                store: text(&self.request.store),
                part: manifest.nodes[node].part.clone(),
                options: RestoreOptions {
                    pids: self.request.pids,
                    stdio: stdio(node),
                    allow: manifest.options.allow.clone(),
                },
            })
        };
        let take = |response| match response {
            Response::RestorePlanned(report) => Some(report),
            _ => None,
        };
        let mut reports = ask_all(links, self.context, request, take)?;
        let mut blockers = Vec::new();
        for (link, report) in links.iter().zip(&mut reports) {
            blockers.extend(report.blockers.drain(..).map(|blocker| (link.node().to_owned(), blocker)));
        }
        blocked(blockers)?;
        Ok(reports)
    }
}

/// What each node must know of the others: the address map, the same for all, and where the other
/// end of each of its connections stands.
fn network_tasks(manifest: &Manifest, reports: &[RestoreReport]) -> Vec<NetworkTask> {
    let pairs =
        |(node, report): (&NodePart, &RestoreReport)| addresses::map(&node.addresses, &report.addresses);
    let addresses: Vec<_> = manifest.nodes.iter().zip(reports).flat_map(pairs).collect();
    let peers = |node: usize| {
        let ends = manifest.channels.iter().flat_map(|channel| {
            let [a, b] = &channel.ends;
            [(a, b), (b, a)]
        });
        ends.filter(|(own, _)| own.node as usize == node).map(|(_, other)| other.position).collect()
    };
    let task = |node| NetworkTask { addresses: addresses.clone(), peers: peers(node) };
    (0..manifest.nodes.len()).map(task).collect()
}
