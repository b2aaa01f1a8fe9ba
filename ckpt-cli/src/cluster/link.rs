//! The coordinator's end of the connection to one agent.

use super::{
    ClusterError, Result,
    awake::Awake,
    frames::{FrameError, FrameReader, FrameWriter},
    transport::Launcher,
};
use ckpt_common::wire::{Hello, Request, Response};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::{
    io::{BufRead, BufReader},
    process::{Child, ChildStdin, ExitStatus},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// How long the coordinator waits.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Longest time until a new agent gives its first sign of life (ssh has a limit of its own).
    pub start: Duration,
    /// Silence after which the other side is given up.
    pub patience: Duration,
    /// Longest time for an answer, counted from the last progress that the agent reports.
    pub answer: Duration,
    /// Longest time for an agent to clean up and end.
    pub end: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { start: seconds(30), patience: seconds(10), answer: seconds(120), end: seconds(10) }
    }
}

/// How often we look whether we are to stop.
const TICK: Duration = Duration::from_millis(50);
/// Lines of an agent's standard error that are kept to explain its end.
const LAST_LINES: usize = 5;

type Writer = Arc<Mutex<FrameWriter<ChildStdin>>>;

#[derive(Default)]
struct Signs {
    /// When the agent was last heard.
    heard: Mutex<Option<Instant>>,
    /// What it last reported as its progress.
    progress: AtomicU64,
    /// Its last words.
    stderr: Mutex<Vec<String>>,
    /// Why nothing more can be read.
    broken: Mutex<Option<String>>,
}

/// A running agent. Dropped, its standard input is closed, upon which it undoes what was not
/// committed, and ends.
pub struct Link {
    node: String,
    kernel: String,
    child: Child,
    writer: Option<Writer>,
    responses: Receiver<Response>,
    signs: Arc<Signs>,
    timing: Timing,
    /// Dropped, it ends the pinging.
    pinging: Option<Sender<()>>,
}

impl Link {
    /// Starts an agent and greets it.
    pub fn open(
        launcher: &Launcher,
        node: &str,
        hello: Hello,
        timing: Timing,
        interrupted: &AtomicBool,
    ) -> Result<Self> {
        let lost = |why: String| ClusterError::Lost { node: node.to_owned(), what: "the agent".into(), why };
        let mut child =
            launcher.command(node).spawn().map_err(|error| lost(format!("could not be started: {error}")))?;
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(lost("has no standard streams".into()));
        };
        let signs = Arc::new(Signs::default());
        let writer = Arc::new(Mutex::new(FrameWriter::new(stdin)));
        let (responses_in, responses) = crossbeam_channel::bounded(4);
        thread::spawn({
            let signs = signs.clone();
            move || listen(stdout, &signs, &responses_in)
        });
        thread::spawn({
            let (signs, node) = (signs.clone(), node.to_owned());
            move || keep_words(stderr, &signs, &node)
        });
        let mut link = Self {
            node: node.to_owned(),
            kernel: String::new(),
            child,
            writer: Some(writer.clone()),
            responses,
            signs,
            timing,
            pinging: None,
        };
        let ours = hello.ckpt.clone();
        *lock(&link.signs.heard) = Some(Instant::now() + timing.start.saturating_sub(timing.patience));
        match link.ask(&Request::Hello(hello), interrupted)? {
            Response::Hello { ckpt, kernel } if ckpt == ours => link.kernel = kernel,
            Response::Hello { ckpt, .. } => {
                return Err(ClusterError::Version { node: node.to_owned(), theirs: ckpt, ours });
            }
            other => return Err(lost(format!("answered the greeting with {other:?}"))),
        }
        let pause = timing.patience / 5;
        let (pinging, goes_on) = crossbeam_channel::bounded(0);
        link.pinging = Some(pinging);
        thread::spawn(move || ping(&writer, &goes_on, pause));
        Ok(link)
    }

    /// Name of the node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Its kernel's release.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// What the agent last reported as its progress.
    pub fn progress(&self) -> u64 {
        self.signs.progress.load(Ordering::Relaxed)
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// [`ClusterError::Agent`] if the agent could not do it, [`ClusterError::Lost`] if it is gone,
    /// silent or stuck, [`ClusterError::Interrupted`] as soon as `interrupted` is set.
    pub fn ask(&self, request: &Request, interrupted: &AtomicBool) -> Result<Response> {
        self.ask_within(request, interrupted, Some(self.timing.answer))
    }

    /// As [`Self::ask`], with another limit for the answer, or none.
    pub fn ask_within(
        &self,
        request: &Request,
        interrupted: &AtomicBool,
        limit: Option<Duration>,
    ) -> Result<Response> {
        let lost = |why: String| ClusterError::Lost { node: self.node.clone(), what: name(request), why };
        let writer =
            self.writer.as_ref().ok_or_else(|| lost("cannot be asked: the link is closed".into()))?;
        if let Err(error) = lock(writer).write(request) {
            // What it sent before it ended says more than that it ended.
            let _ = self.responses.recv_timeout(Duration::from_secs(1));
            let why = lock(&self.signs.broken).clone().unwrap_or(error.to_string());
            return Err(lost(format!("could not be sent: {}", self.last_words(&why))));
        }
        let (mut since, mut progress) = (Instant::now(), self.progress());
        let mut awake = Awake::new();
        loop {
            let held_up = awake.held_up();
            since += held_up;
            if let Some(heard) = lock(&self.signs.heard).as_mut() {
                *heard += held_up;
            }
            match self.responses.recv_timeout(TICK) {
                Ok(Response::Failed(failure)) => {
                    let (node, phase) = (self.node.clone(), name(request));
                    return Err(ClusterError::Agent { node, phase, failure });
                }
                Ok(response) => return Ok(response),
                Err(RecvTimeoutError::Disconnected) => {
                    let why = lock(&self.signs.broken).clone().unwrap_or("the connection ended".into());
                    return Err(lost(format!("was not answered: {}", self.last_words(&why))));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if interrupted.load(Ordering::Relaxed) {
                return Err(ClusterError::Interrupted);
            }
            let silence = lock(&self.signs.heard)
                .map_or(Duration::ZERO, |heard| Instant::now().saturating_duration_since(heard));
            if silence > self.timing.patience {
                return Err(lost(format!("was not answered: silent for {} s", silence.as_secs().max(1))));
            }
            if std::mem::replace(&mut progress, self.progress()) != progress {
                since = Instant::now();
            }
            if limit.is_some_and(|limit| since.elapsed() > limit) {
                let seconds = since.elapsed().as_secs().max(1);
                return Err(lost(format!("was not answered: no progress for {seconds} s")));
            }
        }
    }

    /// What the agent's end has to do with, as far as is known.
    fn last_words(&self, why: &str) -> String {
        // The words come by another pipe and may be a moment later.
        thread::sleep(TICK);
        let words = lock(&self.signs.stderr).join("; ");
        if words.is_empty() { why.to_owned() } else { format!("{why} ({words})") }
    }

    /// Undoes everything on the node, as well as that can be known.
    pub fn abort(&self) {
        let never = AtomicBool::new(false);
        if let Err(error) = self.ask_within(&Request::Abort, &never, Some(self.timing.end)) {
            tracing::debug!(node = self.node, %error, "no answer to the abort");
        }
    }

    fn close(&mut self) -> Option<ExitStatus> {
        // The pinging thread has the pipe, too.
        self.pinging = None;
        self.writer = None;
        let start = Instant::now();
        while start.elapsed() < self.timing.end {
            match self.child.try_wait() {
                Ok(None) => thread::sleep(Duration::from_millis(1)),
                Ok(status) => return status,
                Err(_) => return None,
            }
        }
        // The child of ours, or ssh: a remote agent then sees the end of its input.
        let _ = self.child.kill();
        self.child.wait().ok()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let status = self.close();
        tracing::debug!(node = self.node, ?status, "agent ended");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Name of a request in messages.
fn name(request: &Request) -> String {
    let name = match request {
        Request::Hello(_) => "greeting",
        Request::Doctor { .. } => "doctor",
        Request::PlanDump(_) | Request::PlanRestore(_) => "plan",
        Request::Sample => "sample",
        Request::Arm => "arm",
        Request::Cut => "cut",
        Request::Settle => "settle",
        Request::Run => "run",
        Request::Save => "save",
        Request::Commit => "commit",
        Request::Build(_) => "build",
        Request::Connect => "connect",
        Request::Release => "release",
        Request::Wait => "wait",
        Request::Watch(_) | Request::Await(_) => "watch",
        Request::Abort => "abort",
        Request::Ping => "ping",
    };
    name.to_owned()
}

fn listen(stdout: impl std::io::Read, signs: &Signs, responses: &Sender<Response>) {
    let mut reader = FrameReader::new(stdout);
    let why = loop {
        match reader.read::<Response>() {
            Ok(Some(Response::Alive(progress))) => {
                *lock(&signs.heard) = Some(Instant::now());
                signs.progress.store(progress, Ordering::Relaxed);
            }
            Ok(Some(response)) => {
                *lock(&signs.heard) = Some(Instant::now());
                if responses.send(response).is_err() {
                    return;
                }
            }
            Ok(None) => break "the agent has ended".to_owned(),
            Err(error @ (FrameError::Foreign(_) | FrameError::Format(_) | FrameError::Cut)) => {
                break error.to_string();
            }
            Err(FrameError::Io(error)) => break format!("reading failed: {error}"),
        }
    };
    *lock(&signs.broken) = Some(why);
}

fn keep_words(stderr: impl std::io::Read, signs: &Signs, node: &str) {
    for line in BufReader::new(stderr).lines().map_while(|line| line.ok()) {
        tracing::debug!(node, "{line}");
        let mut words = lock(&signs.stderr);
        if words.len() == LAST_LINES {
            words.remove(0);
        }
        words.push(line);
    }
}

/// Pings until there is nobody any more at the other end of `goes_on`.
fn ping(writer: &Mutex<FrameWriter<ChildStdin>>, goes_on: &Receiver<()>, pause: Duration) {
    while goes_on.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
        if lock(writer).write(&Request::Ping).is_err() {
            return;
        }
    }
}
