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
    net::IpAddr,
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
    /// Do the processes run before their memory is complete?
    pub lazy: bool,
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
    // Nothing of the checkpoint is pruned before the job runs.
    let _hold = store.hold()?;
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
                    lazy: self.request.lazy,
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
    let task = |node| NetworkTask { addresses: addresses.clone(), peers: peers(node), stand_ins: Vec::new() };
    let mut tasks: Vec<_> = (0..manifest.nodes.len()).map(task).collect();
    for (node, report) in reports.iter().enumerate() {
        for stand_in in &report.finished {
            let (own, Some(position)) = (stand_in.peer, stand_in.socket.position()) else { continue };
            if tasks[node].peers.iter().any(|peer| own.matches(peer)) {
                continue;
            }
            // Where nobody has the address, the connection led out of the job: it comes back broken.
            if let Some(place) = home(manifest, node, own.peer.ip) {
                tasks[node].peers.push(position);
                tasks[place].stand_ins.push(stand_in.clone());
            }
        }
    }
    tasks
}

/// The node that had an address at the dump, as seen from `node`.
fn home(manifest: &Manifest, node: usize, ip: IpAddr) -> Option<usize> {
    let ip = ip.to_canonical();
    let has = |at: &usize| manifest.nodes[*at].addresses.iter().any(|own| own.address.to_canonical() == ip);
    if ip.is_loopback() || has(&node) {
        return Some(node);
    }
    (0..manifest.nodes.len()).find(has)
}

#[cfg(test)]
mod tests {
    use super::*;

    use ckpt_common::image::manifest::{Channel, ChannelEnd, NodeAddress};
    use ckpt_common::image::socket::{Address, SocketSettings};
    use ckpt_common::image::tcp::{Receiving, Sending, Stream, TcpSocket, TcpState, Window};
    use ckpt_common::wire::StandIn;

    fn address(ip: &str, port: u16) -> Address {
        Address { ip: ip.parse().unwrap(), port, scope: 0 }
    }

    /// A connection of which the other end has sent its FIN.
    fn finished(local: Address, peer: Address) -> StandIn {
        let stream = Stream {
            peer,
            kernel_state: 8,
            sending: Sending { end: 7, queue: Vec::new(), unsent: 0, finished: false },
            receiving: Receiving { next: 70, queue: b"rest".into(), finished: true, shut: false },
            max_segment: 1460,
            window_scales: None,
            sack: true,
            timestamp: None,
            window: Window { update: 70, send: 100, max: 100, receive: 100, announced_at: 70 },
        };
        let socket = TcpSocket {
            ipv6: false,
            local: Some(local),
            settings: SocketSettings::default(),
            state: TcpState::Connected(Box::new(stream)),
        };
        StandIn { peer: socket.position().unwrap(), socket: socket.closed_peer().unwrap() }
    }

    #[test]
    fn closed_ends_are_built_where_their_address_was() {
        let node = |ip: &str| NodePart {
            name: ip.to_owned(),
            addresses: vec![NodeAddress { interface: "eth0".into(), address: ip.parse().unwrap() }],
            ..Default::default()
        };
        let both = [
            finished(address("10.0.0.1", 1), address("10.0.0.2", 2)),
            finished(address("10.0.0.1", 3), address("10.0.0.2", 4)),
        ];
        // Of the second, the other end is in the job and captured.
        let other = both[1].socket.position().unwrap();
        let ends = [ChannelEnd { node: 0, position: both[1].peer }, ChannelEnd { node: 1, position: other }];
        let manifest = Manifest {
            nodes: vec![node("10.0.0.1"), node("10.0.0.2")],
            channels: vec![Channel { ends }],
            ..Manifest::default()
        };
        let near = finished(address("127.0.0.1", 1), address("127.0.0.1", 2));
        let far = finished(address("10.0.0.1", 1), address("10.9.9.9", 2));
        let [first, second] = both;
        let one = RestoreReport {
            finished: vec![first.clone(), second, near.clone(), far],
            ..RestoreReport::default()
        };
        let tasks = network_tasks(&manifest, &[one, RestoreReport::default()]);
        assert_eq!(tasks[0].stand_ins, std::slice::from_ref(&near));
        assert_eq!(tasks[1].stand_ins, std::slice::from_ref(&first));
        let peers = [Some(other), first.socket.position(), near.socket.position()];
        assert_eq!(tasks[0].peers.iter().copied().map(Some).collect::<Vec<_>>(), peers);
    }
}
