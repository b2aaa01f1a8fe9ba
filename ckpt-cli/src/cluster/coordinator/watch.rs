//! A watch over a job: checkpoints at intervals and on request, until the job ends.
//!
//! An agent on each node listens for requests and says whether the job still runs there. A checkpoint is taken by
//! agents of its own, as any other.

use super::{Context, DumpOutcome, DumpRequest, ask_all};
use crate::cluster::{ClusterError, Result, link::Link};
use ckpt_common::wire::{Answer, Request, Response, WatchTask};
use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

/// First pause after a failure; it doubles with each one that follows.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause after a failure.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How often we look around where no agent does it for us.
const TICK: Duration = Duration::from_millis(200);

/// What a checkpoint is taken for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reasons {
    /// It was time.
    pub time: bool,
    /// A signal to us.
    pub signal: bool,
    /// How many programs have asked.
    pub requests: usize,
}

impl Reasons {
    fn any(self) -> bool {
        self.time || self.signal || self.requests > 0
    }
}

impl fmt::Display for Reasons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [(self.time, "time"), (self.signal, "signal"), (self.requests > 0, "request")];
        let words: Vec<_> = words.iter().filter(|(holds, _)| *holds).map(|(_, word)| *word).collect();
        f.write_str(&words.join(", "))
    }
}

/// Is told what happens in a watch.
pub trait Watcher {
    /// Takes a checkpoint.
    fn take(&mut self, reasons: Reasons) -> Result<DumpOutcome>;
    /// It could not be taken; with `again`, it is tried again after so long.
    fn failed(&mut self, error: &ClusterError, again: Option<Duration>);
    /// Requests are not heard for the moment.
    fn deaf(&mut self, error: &ClusterError);
}

/// When the next checkpoint is due.
#[derive(Debug)]
struct Schedule {
    every: Option<Duration>,
    due: Option<Instant>,
    /// Failures since the last success.
    failures: u32,
}

impl Schedule {
    fn new(every: Option<Duration>, now: Instant) -> Self {
        Self { every, due: every.map(|every| now + every), failures: 0 }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now)
    }

    /// A checkpoint was taken, which began at `began`.
    fn done(&mut self, began: Instant) {
        self.failures = 0;
        self.due = self.every.map(|every| began + every);
    }

    /// One has failed: gives the pause until the next attempt. Without an interval there is none: whoever has asked
    /// for it knows.
    fn failed(&mut self, now: Instant) -> Option<Duration> {
        let every = self.every?;
        let pause = FIRST_PAUSE * 2_u32.saturating_pow(self.failures.min(10));
        let pause = pause.min(LONGEST_PAUSE).min(every);
        self.failures += 1;
        self.due = Some(now + pause);
        Some(pause)
    }
}

/// Agents that listen.
struct Ears {
    links: Vec<Link>,
    answers: Vec<Vec<Answer>>,
}

impl Ears {
    fn open(request: &DumpRequest, context: &Context<'_>) -> Result<Self> {
        let links = context.open(&request.nodes)?;
        let task = WatchTask { job: request.job.to_string(), selector: request.selector.clone() };
        ask_all(&links, context, |_| Request::Watch(task.clone()), super::done)?;
        let answers = links.iter().map(|_| Vec::new()).collect();
        Ok(Self { links, answers })
    }

    /// Hands over what is to be answered, and waits a moment. Gives requests by node, and whether the job runs.
    fn wait(&mut self, context: &Context<'_>) -> Result<(Vec<Vec<u64>>, bool)> {
        let answers = std::mem::replace(&mut self.answers, self.links.iter().map(|_| Vec::new()).collect());
        let take = |response| match response {
            Response::Awaited(awaited) => Some(awaited),
            _ => None,
        };
        let all = ask_all(&self.links, context, |node| Request::Await(answers[node].clone()), take)?;
        let running = all.iter().any(|awaited| awaited.running);
        Ok((all.into_iter().map(|awaited| awaited.requests).collect(), running))
    }

    fn answer(&mut self, requests: &[Vec<u64>], line: &str) {
        for (answers, requests) in self.answers.iter_mut().zip(requests) {
            answers.extend(requests.iter().map(|&request| Answer { request, line: line.to_owned() }));
        }
    }
}

/// Watches a job until it ends.
///
/// # Errors
/// The job is not there to begin with, its nodes cannot be reached, somebody else watches it;
/// [`ClusterError::Interrupted`]. Checkpoints that fail are none: the watch goes on.
pub fn watch(
    request: &DumpRequest,
    every: Option<Duration>,
    signalled: &AtomicBool,
    context: &Context<'_>,
    watcher: &mut dyn Watcher,
) -> Result<()> {
    let mut ears = Some(Ears::open(request, context)?);
    let mut schedule = Schedule::new(every, Instant::now());
    let mut found = false;
    let mut listen_again = Instant::now();
    loop {
        context.check_interrupted()?;
        let (requests, running) = match ears.as_mut().map(|ears| ears.wait(context)) {
            Some(Ok(heard)) => heard,
            Some(Err(ClusterError::Interrupted)) => return Err(ClusterError::Interrupted),
            Some(Err(error)) => {
                watcher.deaf(&error);
                ears = None;
                listen_again = Instant::now() + FIRST_PAUSE;
                continue;
            }
            None => {
                thread::sleep(TICK);
                if listen_again <= Instant::now() {
                    ears = Ears::open(request, context).ok();
                    listen_again = Instant::now() + LONGEST_PAUSE;
                }
                // Nobody has looked: a checkpoint would find out.
                (Vec::new(), true)
            }
        };
        if !running {
            let nothing = format!("there is no process of job {} to watch", request.job);
            return if found { Ok(()) } else { Err(ClusterError::NothingFound(nothing)) };
        }
        found = true;
        let began = Instant::now();
        let reasons = Reasons {
            time: schedule.is_due(began),
            signal: signalled.swap(false, Ordering::Relaxed),
            requests: requests.iter().map(Vec::len).sum(),
        };
        if !reasons.any() {
            continue;
        }
        let line = match watcher.take(reasons) {
            Ok(outcome) => {
                schedule.done(began);
                format!("saved {} {}", outcome.checkpoint.name(), outcome.checkpoint.id)
            }
            Err(ClusterError::Interrupted) => return Err(ClusterError::Interrupted),
            // It has ended: seen above in a moment.
            Err(ClusterError::NothingFound(why)) if ears.is_some() => format!("failed {why}"),
            Err(ClusterError::NothingFound(_)) => return Ok(()),
            Err(error) => {
                watcher.failed(&error, schedule.failed(Instant::now()));
                format!("failed {error}").replace('\n', " ")
            }
        };
        if let Some(ears) = &mut ears {
            ears.answer(&requests, &line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn checkpoints_are_due_at_intervals_from_the_last_ones_beginning() {
        let start = Instant::now();
        let mut schedule = Schedule::new(Some(MINUTE), start);
        assert!(!schedule.is_due(start + MINUTE / 2) && schedule.is_due(start + MINUTE));
        schedule.done(start + MINUTE);
        assert!(!schedule.is_due(start + MINUTE + MINUTE / 2) && schedule.is_due(start + 2 * MINUTE));
        let mut never = Schedule::new(None, start);
        never.done(start);
        assert!(!never.is_due(start + 1000 * MINUTE));
        assert_eq!(never.failed(start), None);
    }

    #[test]
    fn failures_are_tried_again_later_and_later() {
        let start = Instant::now();
        let mut schedule = Schedule::new(Some(10 * MINUTE), start);
        let seconds: Vec<_> =
            (0..9).filter_map(|_| schedule.failed(start)).map(|pause| pause.as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert!(!schedule.is_due(start + MINUTE / 2) && schedule.is_due(start + MINUTE));
        schedule.done(start);
        assert_eq!(schedule.failed(start), Some(FIRST_PAUSE));
        // Not later than without the failure.
        let mut often = Schedule::new(Some(3 * FIRST_PAUSE), start);
        let pauses: Vec<_> =
            (0..4).filter_map(|_| often.failed(start)).map(|pause| pause.as_secs()).collect();
        assert_eq!(pauses, [1, 2, 3, 3]);
    }
}
