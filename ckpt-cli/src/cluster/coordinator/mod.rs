//! The phases of a dump and of a restore, over all nodes at once.

mod dump;
mod restore;
mod watch;

pub use dump::{DumpOutcome, DumpRequest, OnNodes, Waited, WhenBelow, dump};
pub use restore::{RestoreOutcome, RestoreRequest, StdioChoice, restore};
pub use watch::{Reasons, Watcher, watch};

use super::{
    ClusterError, Result,
    fault::{self, COORDINATOR, Faults},
    link::{Link, Timing},
    transport::Launcher,
};
use ckpt_common::{
    image::manifest::PhaseTime,
    wire::{Blocker, Hello, Phase, Probe, Request, Response},
};
use std::{
    cell::RefCell,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

/// Somebody who likes to know how it goes on.
pub trait Observer: Sync {
    /// A phase begins.
    fn phase(&self, phase: Phase);
    /// So many bytes of memory have been written on all nodes, of so many.
    fn saved(&self, bytes: u64, of: u64);
    /// Something that does not stop us, but that a person should know.
    fn warn(&self, text: &str);
}

/// Nobody.
impl Observer for () {
    fn phase(&self, _: Phase) {}
    fn saved(&self, _: u64, _: u64) {}
    fn warn(&self, _: &str) {}
}

/// What every request of a coordinator needs.
pub struct Context<'a> {
    /// Starts agents.
    pub launcher: &'a Launcher,
    /// How long to wait.
    pub timing: Timing,
    /// Log filter for the agents.
    pub log: String,
    /// Set when the operator wants us to stop.
    pub interrupted: &'a AtomicBool,
    /// Is told how it goes on.
    pub observer: &'a dyn Observer,
}

impl Context<'_> {
    fn faults(&self) -> Result<Faults> {
        let faults = Faults::of(COORDINATOR, fault::from_environment().as_deref());
        faults.map_err(|message| ClusterError::Other { phase: Phase::Plan, message })
    }

    /// Starts the agents, all at once.
    fn open(&self, nodes: &[String]) -> Result<Vec<Link>> {
        let open = |node: &String| {
            let hello = Hello {
                ckpt: env!("CARGO_PKG_VERSION").to_owned(),
                node: node.clone(),
                patience: self.timing.patience.as_secs().max(1),
                log: self.log.clone(),
                fault: fault::from_environment(),
            };
            Link::open(self.launcher, node, hello, self.timing, self.interrupted)
        };
        all(nodes, open)
    }

    fn check_interrupted(&self) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(ClusterError::Interrupted);
        }
        Ok(())
    }
}

/// Does the same for all, at once. Gives all results, or the error that explains most.
fn all<T: Sync, R: Send>(items: &[T], act: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let results: Vec<Result<R>> = thread::scope(|scope| {
        let threads: Vec<_> = items.iter().map(|item| scope.spawn(|| act(item))).collect();
        let died = || ClusterError::Other { phase: Phase::Plan, message: "a thread died".into() };
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(died()))).collect()
    });
    let mut worst = None;
    let mut good = Vec::new();
    for result in results {
        match (result, &worst) {
            (Ok(result), _) => good.push(result),
            (Err(error), None) => worst = Some(error),
            // A node that says what is wrong explains more than one that is gone or was stopped.
            (Err(error @ ClusterError::Agent { .. }), Some(ClusterError::Lost { .. })) => worst = Some(error),
            (Err(_), Some(_)) => {}
        }
    }
    worst.map_or(Ok(good), Err)
}

/// Asks all agents the same at once; `take` picks the expected answer.
fn ask_all<R: Send>(
    links: &[Link],
    context: &Context<'_>,
    request: impl Fn(usize) -> Request + Sync,
    take: impl Fn(Response) -> Option<R> + Sync,
) -> Result<Vec<R>> {
    let numbered: Vec<_> = links.iter().enumerate().collect();
    all(&numbered, |(number, link)| {
        let request = request(*number);
        let response = link.ask(&request, context.interrupted)?;
        let unexpected = || ClusterError::Lost {
            node: link.node().to_owned(),
            what: "the agent".into(),
            why: "gave an answer to something else".into(),
        };
        take(response).ok_or_else(unexpected)
    })
}

/// Takes [`Response::Done`].
fn done(response: Response) -> Option<()> {
    (response == Response::Done).then_some(())
}

/// Undoes everything on all nodes, at once.
fn abort(links: &[Link], context: &Context<'_>) {
    context.observer.phase(Phase::Abort);
    thread::scope(|scope| {
        for link in links {
            scope.spawn(|| link.abort());
        }
    });
}

/// Runs a phase between its two points for injected faults, and takes its time.
fn phase<R>(
    phase: Phase,
    context: &Context<'_>,
    faults: &Faults,
    times: &RefCell<Vec<PhaseTime>>,
    act: impl FnOnce() -> Result<R>,
) -> Result<R> {
    let fault = |error: anyhow::Error| ClusterError::Other { phase, message: error.to_string() };
    context.check_interrupted()?;
    context.observer.phase(phase);
    let start = Instant::now();
    faults.begin(phase).map_err(fault)?;
    let result = act()?;
    faults.end(phase).map_err(fault)?;
    let us = start.elapsed().as_micros() as u64;
    times.borrow_mut().push(PhaseTime { phase: phase.to_string(), us });
    Ok(result)
}

fn blocked(blockers: Vec<(String, Blocker)>) -> Result<()> {
    if blockers.is_empty() { Ok(()) } else { Err(ClusterError::Blocked { blockers }) }
}

/// What the kernel of each node offers; a node that cannot be reached is an error of its own.
pub fn doctor(nodes: &[String], store: &str, context: &Context<'_>) -> Vec<(String, Result<Vec<Probe>>)> {
    let probe = |node: &String| {
        let links = context.open(std::slice::from_ref(node))?;
        let request = |_| Request::Doctor { store: store.to_owned() };
        let take = |response| match response {
            Response::Doctor(probes) => Some(probes),
            _ => None,
        };
        Ok(ask_all(&links, context, request, take)?.concat())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = nodes.iter().map(|node| scope.spawn(|| (node.clone(), probe(node)))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    })
}
