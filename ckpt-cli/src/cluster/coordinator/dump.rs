//! A dump, from the coordinator's side.

use super::{Context, abort, ask_all, blocked, done, phase};
use crate::{
    cluster::{
        ClusterError, Result,
        channels::{self, NodeView},
        fault::Faults,
        link::Link,
    },
    store::{Dump, JobName, Store},
};
use ckpt_common::{
    image::manifest::{Channel, Checkpoint, DumpRecord, Manifest, NodePart, PhaseTime},
    wire::{
        Blocker, Connection, CopyBeforeWrite, CutReport, DumpOptions, DumpTask, Phase, PlanReport, Request,
        Response, SaveReport, Selector,
    },
};
use crossbeam_channel::RecvTimeoutError;
use std::{
    cell::{Cell, RefCell},
    path::PathBuf,
    sync::atomic::AtomicBool,
    thread,
    time::{Duration, Instant, SystemTime},
};

/// Word of `--allow` for TCP connections that lead out of the job.
const OUTSIDE_TCP: &str = "outside-tcp";

/// Most attempts, and the time between two: more before later ones, up to so many times as much.
const ATTEMPTS: u32 = 8;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(100);
const MORE: u32 = 3;

/// Attempts that lose memory, before all of it is copied in the freeze.
const LOSSES: u32 = 2;
/// Most looks for the other end of a connection. It may wait for long to be accepted, on a busy machine.
const LOOKS: u32 = 8;

/// Between two samples: so many times as long as one takes, within these bounds.
const SAMPLE_REST: u32 = 20;
const SHORTEST_REST: Duration = Duration::from_millis(20);
const LONGEST_REST: Duration = Duration::from_secs(1);

/// Blockers with the names of their nodes.
pub type OnNodes = Vec<(String, Blocker)>;

/// What to dump.
pub struct DumpRequest {
    /// Path of the store, the same on every node.
    pub store: PathBuf,
    /// Name of the job in the store.
    pub job: JobName,
    /// Which processes.
    pub selector: Selector,
    /// Nodes to look on.
    pub nodes: Vec<String>,
    /// How.
    pub options: DumpOptions,
    /// The options as the manifest keeps them.
    pub record: DumpRecord,
    /// Wait until little memory is modified.
    pub when_below: Option<WhenBelow>,
}

/// When to cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WhenBelow {
    /// So many bytes, on all nodes together, are little.
    pub bytes: u64,
    /// Cut anyway after so long.
    pub deadline: Duration,
}

/// How long it was waited for little modified memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waited {
    /// Time.
    pub waited: Duration,
    /// Bytes that were modified at the end.
    pub modified: u64,
    /// Was that little? If not, the deadline has come.
    pub below: bool,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct DumpOutcome {
    /// The committed checkpoint.
    pub checkpoint: Checkpoint,
    /// Time from the beginning to the commit.
    pub took: Duration,
    /// What comes back closed or disconnected, because that was allowed by name.
    pub left_out: OnNodes,
    /// What came of [`DumpRequest::when_below`].
    pub waited: Option<Waited>,
}

/// Takes a checkpoint of a job.
///
/// # Errors
/// Anything before the commit leaves the job running and the store as it was. After the commit only
/// [`ClusterError::AfterCommit`] is possible.
pub fn dump(request: &DumpRequest, context: &Context<'_>) -> Result<DumpOutcome> {
    let start = Instant::now();
    let store = Store::create(&request.store)?;
    let dump = store.begin_dump(&request.job)?;
    let mut links = context.open(&request.nodes)?;
    let run = Run {
        request,
        context,
        faults: context.faults()?,
        times: RefCell::default(),
        left_out: RefCell::default(),
        waited: Cell::new(None),
    };
    let result = run.attempts(&mut links, &dump).and_then(|manifest| run.commit(dump, manifest));
    match result {
        Ok(checkpoint) => {
            let took = start.elapsed();
            run.end(&links, &checkpoint)?;
            Ok(DumpOutcome {
                checkpoint,
                took,
                left_out: run.left_out.into_inner(),
                waited: run.waited.get(),
            })
        }
        Err(error) => {
            abort(&links, context);
            Err(error)
        }
    }
}

struct Run<'a> {
    request: &'a DumpRequest,
    context: &'a Context<'a>,
    faults: Faults,
    times: RefCell<Vec<PhaseTime>>,
    left_out: RefCell<OnNodes>,
    waited: Cell<Option<Waited>>,
}

impl Run<'_> {
    fn phase<R>(&self, which: Phase, act: impl FnOnce() -> Result<R>) -> Result<R> {
        phase(which, self.context, &self.faults, &self.times, act)
    }

    /// Some states pass by themselves, such as a connection that is not accepted yet: then the job
    /// runs on for a moment before the next attempt. What was overwritten while it was saved is copied
    /// in the freeze the next time, and everything else, too, if that is not enough.
    fn attempts(&self, links: &mut Vec<Link>, dump: &Dump) -> Result<Manifest> {
        let mut options = self.request.options.clone();
        let mut lost = 0;
        for attempt in 1.. {
            let error = match self.until_saved(links, dump, &options) {
                Err(error) if error.is_transient() && attempt < ATTEMPTS => error,
                result => return result,
            };
            let loses = fails_to_save(&error);
            lost += u32::from(loses);
            let how = match loses && options.cow != CopyBeforeWrite::Stop {
                true if lost < LOSSES => "trying again, with a longer freeze",
                true => {
                    options.cow = CopyBeforeWrite::Stop;
                    "trying again, with a freeze until all memory is copied"
                }
                false => "trying again",
            };
            self.context.observer.warn(&format!("{error}; {how}"));
            abort(links, self.context);
            self.times.borrow_mut().clear();
            thread::sleep(BETWEEN_ATTEMPTS * attempt.min(MORE));
        }
        Err(ClusterError::Interrupted)
    }

    /// Everything before the commit. Links to nodes without processes of the job are dropped.
    fn until_saved(&self, links: &mut Vec<Link>, dump: &Dump, options: &DumpOptions) -> Result<Manifest> {
        let plans = self.phase(Phase::Plan, || self.plan(links, dump, options))?;
        self.left_out.borrow_mut().clear();
        self.note_left_out(links, plans.iter().map(|plan| &plan.left_out));
        let (links, stop) = (&*links, self.request.options.stop);
        // A second attempt does not wait again.
        if let Some(when) = self.request.when_below.filter(|_| self.waited.get().is_none()) {
            self.waited.set(Some(self.wait_until_below(links, when)?));
        }
        self.phase(Phase::Arm, || ask_all(links, self.context, |_| Request::Arm, done))?;
        let (frozen, created) = (Instant::now(), SystemTime::now());
        let take = |response| match response {
            Response::Cut(report) => Some(report),
            _ => None,
        };
        let cuts = self.phase(Phase::Cut, || ask_all(links, self.context, |_| Request::Cut, take))?;
        // The same, and what has come since the plan.
        self.note_left_out(links, cuts.iter().map(|cut| &cut.left_out));
        let take = |response| match response {
            Response::Settled(connections) => Some(connections),
            _ => None,
        };
        let settle = || ask_all(links, self.context, |_| Request::Settle, take);
        let connections = self.phase(Phase::Settle, settle)?;
        let channels = self.channels(links, &plans, connections)?;
        if !stop {
            self.phase(Phase::Run, || ask_all(links, self.context, |_| Request::Run, done))?;
        }
        let paused = frozen.elapsed();
        let parts = self.phase(Phase::Save, || self.save(links, &cuts))?;
        let nodes = links.iter().zip(plans).zip(cuts).zip(parts);
        let nodes = nodes.map(|(((link, plan), cut), saved)| NodePart {
            name: link.node().to_owned(),
            kernel: link.kernel().to_owned(),
            part: saved.part,
            addresses: plan.addresses,
            processes: cut.processes,
            base: saved.memory.base,
            times: saved.memory.times,
            memory: saved.memory.processes,
        });
        Ok(Manifest {
            created: created.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            ckpt_version: env!("CARGO_PKG_VERSION").to_owned(),
            options: self.request.record.clone(),
            nodes: nodes.collect(),
            channels,
            phases: self.times.borrow().clone(),
            paused_us: if stop { 0 } else { paused.as_micros() as u64 },
            ..Default::default()
        })
    }

    /// Looks at how much is modified until it is little, or the deadline comes. A look takes longer for more memory:
    /// so the time between two does, too.
    fn wait_until_below(&self, links: &[Link], when: WhenBelow) -> Result<Waited> {
        let start = Instant::now();
        loop {
            let look = Instant::now();
            let take = |response| match response {
                Response::Sampled(bytes) => Some(bytes),
                _ => None,
            };
            let modified = ask_all(links, self.context, |_| Request::Sample, take)?.iter().sum();
            let waited = start.elapsed();
            let below = modified <= when.bytes;
            if below || waited >= when.deadline {
                return Ok(Waited { waited, modified, below });
            }
            let pause = (look.elapsed() * SAMPLE_REST).clamp(SHORTEST_REST, LONGEST_REST);
            let end = Instant::now() + pause.min(when.deadline.saturating_sub(waited));
            while Instant::now() < end {
                self.context.check_interrupted()?;
                thread::sleep(SHORTEST_REST.min(end.saturating_duration_since(Instant::now())));
            }
        }
    }

    /// Asks for plans until every connection's other end is found, or is missing for good:
    /// connections come and go while the nodes look.
    fn plan(&self, links: &mut Vec<Link>, dump: &Dump, options: &DumpOptions) -> Result<Vec<PlanReport>> {
        let task = DumpTask {
            store: self.request.store.to_string_lossy().into_owned(),
            job: self.request.job.to_string(),
            dump: dump.id().as_str().to_owned(),
            selector: self.request.selector.clone(),
            options: options.clone(),
        };
        let take = |response| match response {
            Response::Planned(report) => Some(report),
            _ => None,
        };
        let mut lonely: Option<OnNodes> = None;
        for look in 1.. {
            let request = |_| Request::PlanDump(task.clone());
            let mut plans = ask_all(links, self.context, request, take)?;
            if plans.iter().all(|plan| plan.processes.is_empty()) {
                return Err(ClusterError::NothingFound(self.nothing_found()));
            }
            let mut found = plans.iter().map(|plan| !plan.processes.is_empty());
            links.retain(|_| found.next().unwrap_or(false));
            plans.retain(|plan| !plan.processes.is_empty());
            let mut blockers = Vec::new();
            for (link, plan) in links.iter().zip(&mut plans) {
                blockers.extend(plan.blockers.drain(..).map(|blocker| (link.node().to_owned(), blocker)));
            }
            let (far, mut near) = match self.allows_outside_tcp() {
                true => Default::default(),
                false => outside(links, &plans),
            };
            if let Some(before) = &lonely {
                near.retain(|blocker| before.contains(blocker));
            }
            blockers.extend(far);
            if near.is_empty() || look == LOOKS {
                blockers.extend(near);
                blocked(blockers)?;
                return Ok(plans);
            }
            lonely = Some(near);
            thread::sleep(BETWEEN_ATTEMPTS);
        }
        Err(ClusterError::Interrupted)
    }

    fn nothing_found(&self) -> String {
        let place = match &self.request.nodes[..] {
            [node] => node.clone(),
            nodes => format!("{} nodes", nodes.len()),
        };
        match &self.request.selector {
            Selector::Job(id) => format!("no process of job {id} was found on {place}"),
            Selector::Pids(_) => format!("the process ended before it could be looked at on {place}"),
            Selector::Cgroup(path) => format!("there is no process in control group {path} on {place}"),
        }
    }

    fn allows_outside_tcp(&self) -> bool {
        self.request.options.allow.iter().any(|kind| kind == OUTSIDE_TCP)
    }

    /// What is left out, but for connections: they come and go until the cut.
    fn note_left_out<'a>(&self, links: &[Link], lists: impl Iterator<Item = &'a Vec<Blocker>>) {
        let mut all = self.left_out.borrow_mut();
        for (link, items) in links.iter().zip(lists) {
            for item in items {
                let known = |(node, one): &(String, Blocker)| {
                    node == link.node() && (one.pid, &one.item) == (item.pid, &item.item)
                };
                if !all.iter().any(known) {
                    all.push((link.node().to_owned(), item.clone()));
                }
            }
        }
    }

    /// The channel table, if no byte was lost and no connection out of the job has appeared since the plan. Where
    /// these are allowed, they are left out.
    fn channels(
        &self,
        links: &[Link],
        plans: &[PlanReport],
        connections: Vec<Vec<Connection>>,
    ) -> Result<Vec<Channel>> {
        let report = |(plan, connections): (&PlanReport, _)| PlanReport {
            processes: plan.processes.clone(),
            addresses: plan.addresses.clone(),
            connections,
            ..Default::default()
        };
        let reports: Vec<_> = plans.iter().zip(connections).map(report).collect();
        let (far, near) = outside(links, &reports);
        let outside: OnNodes = far.into_iter().chain(near).collect();
        if let Some((node, Blocker { pid, reason, .. })) = outside.first()
            && !self.allows_outside_tcp()
        {
            return Err(ClusterError::Changed(format!("{node}: process {pid} has a {reason}")));
        }
        self.left_out.borrow_mut().extend(outside);
        let views = views(&reports);
        channels::table(&views, &channels::sort(&views).inside).map_err(ClusterError::Changed)
    }

    fn save(&self, links: &[Link], cuts: &[CutReport]) -> Result<Vec<SaveReport>> {
        let of = cuts.iter().map(|cut| cut.bytes).sum();
        let before: u64 = links.iter().map(Link::progress).sum();
        let take = |response| match response {
            Response::Saved(report) => Some(report),
            _ => None,
        };
        let observer = self.context.observer;
        let (end, ended) = crossbeam_channel::bounded::<()>(0);
        thread::scope(|scope| {
            scope.spawn(move || {
                let look = Duration::from_millis(50);
                while ended.recv_timeout(look) == Err(RecvTimeoutError::Timeout) {
                    let now: u64 = links.iter().map(Link::progress).sum();
                    observer.saved(now.saturating_sub(before).min(of), of);
                }
            });
            let parts = ask_all(links, self.context, |_| Request::Save, take);
            drop(end);
            parts
        })
    }

    /// From here on the checkpoint exists, or an error says that it does not.
    fn commit(&self, dump: Dump, manifest: Manifest) -> Result<Checkpoint> {
        let fault = |error: anyhow::Error| {
            let message = error.to_string();
            ClusterError::Other { phase: Phase::Commit, message }
        };
        self.context.check_interrupted()?;
        self.context.observer.phase(Phase::Commit);
        self.faults.begin(Phase::Commit).map_err(fault)?;
        let checkpoint = dump.commit(manifest)?;
        if let Err(error) = self.faults.end(Phase::Commit) {
            let (name, what) = (checkpoint.name(), error.to_string());
            return Err(ClusterError::AfterCommit { name, what });
        }
        Ok(checkpoint)
    }

    /// Tells the agents. A node that is gone by now does not undo the checkpoint.
    fn end(&self, links: &[Link], checkpoint: &Checkpoint) -> Result<()> {
        let never = AtomicBool::new(false);
        let context = Context { interrupted: &never, log: String::new(), ..*self.context };
        let Err(error) = ask_all(links, &context, |_| Request::Commit, done) else { return Ok(()) };
        if self.request.options.stop {
            let what = format!("the job may still run: {error}");
            return Err(ClusterError::AfterCommit { name: checkpoint.name(), what });
        }
        self.context.observer.warn(&format!("after the commit: {error}"));
        Ok(())
    }
}

/// Could what was taken in the cut not be saved?
fn fails_to_save(error: &ClusterError) -> bool {
    matches!(error, ClusterError::Agent { phase, .. } if *phase == Phase::Save.to_string())
}

/// Connections whose other end is not in the job: on other machines, and on the job's own nodes.
fn outside(links: &[Link], plans: &[PlanReport]) -> (OnNodes, OnNodes) {
    let blocker = |&(node, index): &(usize, usize)| {
        let (plan, connection) = (&plans[node], &plans[node].connections[index]);
        let process = plan.processes.iter().find(|process| process.pid == connection.pid);
        let remote = channels::canonical(connection.remote);
        let local = channels::canonical(connection.local);
        let blocker = Blocker {
            pid: connection.pid,
            process: process.map(|process| process.name.clone()).unwrap_or_default(),
            item: format!("fd {}", connection.fd),
            reason: format!("TCP connection {local} to {remote}, which is not in the job"),
            allow: Some(OUTSIDE_TCP.to_owned()),
        };
        (links[node].node().to_owned(), blocker)
    };
    let own = |remote: std::net::IpAddr| {
        let mut all = plans.iter().flat_map(|plan| &plan.addresses);
        remote.is_loopback() || all.any(|own| own.address.to_canonical() == remote)
    };
    let (near, far): (Vec<_>, Vec<_>) = channels::sort(&views(plans))
        .outside
        .into_iter()
        .partition(|end| own(channels::canonical(plans[end.0].connections[end.1].remote).ip()));
    (far.iter().map(blocker).collect(), near.iter().map(blocker).collect())
}

fn views(plans: &[PlanReport]) -> Vec<NodeView<'_>> {
    plans.iter().map(|plan| NodeView { connections: &plan.connections, addresses: &plan.addresses }).collect()
}
