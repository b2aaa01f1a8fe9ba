//! Requests for a checkpoint on one node: a Unix socket where programs of the job ask, and get their answer.
//! `docs/REQUEST.md` has the protocol.

use crate::job::selector;
use anyhow::{Context as _, Result, bail, ensure};
use ckpt_common::wire::{Answer, Awaited, REQUEST_DIRECTORY as DIRECTORY, Selector, WatchTask};
use crossbeam_channel::{Receiver, Sender};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, Permissions},
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    os::unix::{
        fs::{DirBuilderExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// What a program sends.
pub const WORD: &str = "checkpoint";
/// How long a program may take to send it.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest line that is read, in bytes.
const LONGEST: u64 = 256;

/// The socket for requests of a job.
pub fn path(job: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{job}.sock"))
}

/// Listens on one node. Dropped, the socket is gone, and whoever still waits is told so.
pub struct Requests {
    path: PathBuf,
    selector: Selector,
    asked: Receiver<UnixStream>,
    waiting: BTreeMap<u64, UnixStream>,
    next: u64,
    /// Processes of the job when we last looked for them.
    known: Vec<i32>,
}

impl Requests {
    /// Begins to listen.
    ///
    /// # Errors
    /// Somebody else does, or the socket cannot be made.
    pub fn listen(task: &WatchTask) -> Result<Self> {
        DirBuilder::new().recursive(true).mode(0o755).create(DIRECTORY).context(DIRECTORY)?;
        fs::set_permissions(DIRECTORY, Permissions::from_mode(0o755)).context(DIRECTORY)?;
        Self::listen_at(path(&task.job), task)
    }

    fn listen_at(path: PathBuf, task: &WatchTask) -> Result<Self> {
        let shown = || format!("{}", path.display());
        match UnixStream::connect(&path) {
            Ok(_) => bail!("job {} is watched by another ckpt: it listens at {}", task.job, path.display()),
            // One that was killed has left it there.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                fs::remove_file(&path).with_context(shown)?;
            }
            Err(_) => {}
        }
        let listener = UnixListener::bind(&path).with_context(shown)?;
        // Who may ask is decided by who asks.
        fs::set_permissions(&path, Permissions::from_mode(0o666)).with_context(shown)?;
        let (asks, asked) = crossbeam_channel::unbounded();
        let selector = task.selector.clone();
        thread::spawn(move || accept(&listener, &selector, &asks));
        let selector = task.selector.clone();
        Ok(Self { path, selector, asked, waiting: BTreeMap::new(), next: 1, known: Vec::new() })
    }

    /// Gives answers, then waits for requests, for this long at most.
    pub fn wait(&mut self, answers: &[Answer], most: Duration) -> Awaited {
        for answer in answers {
            if let Some(stream) = self.waiting.remove(&answer.request) {
                say(&stream, &answer.line);
            }
        }
        let mut requests = Vec::new();
        for stream in self.asked.recv_timeout(most).into_iter().chain(self.asked.try_iter()) {
            self.waiting.insert(self.next, stream);
            requests.push(self.next);
            self.next += 1;
        }
        Awaited { requests, running: self.is_running() }
    }

    fn is_running(&mut self) -> bool {
        let alive = |pid: &i32| selector::is_alive(*pid);
        if !self.known.iter().any(alive) {
            self.known = selector::find(&self.selector).unwrap_or_default();
            self.known.retain(alive);
        }
        !self.known.is_empty()
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        for stream in std::mem::take(&mut self.waiting).into_values().chain(self.asked.try_iter()) {
            say(&stream, "failed the watch has ended");
        }
    }
}

/// Sends a line. Whoever has asked may be gone.
fn say(mut stream: &UnixStream, line: &str) {
    if let Err(error) = stream.write_all(format!("{line}\n").as_bytes()) {
        tracing::debug!(%error, "a program does not wait for its answer");
    }
}

/// Takes connections at once: one that waits to be accepted has no other end yet.
fn accept(listener: &UnixListener, selector: &Selector, asks: &Sender<UnixStream>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { return };
        let (selector, asks) = (selector.clone(), asks.clone());
        thread::spawn(move || match listen_to(&stream, &selector) {
            Ok(()) => drop(asks.send(stream)),
            Err(error) => say(&stream, &format!("failed {error:#}")),
        });
    }
}

/// Reads the request and makes sure that who sends it may do so.
fn listen_to(stream: &UnixStream, selector: &Selector) -> Result<()> {
    let peer = getsockopt(stream, PeerCredentials).context("asking who it is that asks")?;
    ensure!(
        peer.uid() == 0 || selector::find(selector)?.contains(&peer.pid()),
        "process {} is not in the job",
        peer.pid()
    );
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(stream.take(LONGEST)).read_line(&mut line).context("reading the request")?;
    ensure!(line.trim_end() == WORD, "the request is not `{WORD}`");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(path: &Path, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream
    }

    fn answer(mut stream: UnixStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    fn requests(path: &Path) -> Requests {
        let selector = Selector::Pids(vec![std::process::id() as i32]);
        Requests::listen_at(path.to_owned(), &WatchTask { job: "j".into(), selector }).unwrap()
    }

    #[test]
    fn who_asks_is_answered() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let mut requests = requests(&path);
        let (first, second) = (ask(&path, "checkpoint\n"), ask(&path, "checkpoint\n"));
        let mut numbers = Vec::new();
        while numbers.len() < 2 {
            let awaited = requests.wait(&[], Duration::from_millis(10));
            assert!(awaited.running);
            numbers.extend(awaited.requests);
        }
        assert_eq!(numbers, [1, 2]);
        let answers = numbers.iter().map(|&request| Answer { request, line: "saved j@1 abc".into() });
        assert_eq!(requests.wait(&answers.collect::<Vec<_>>(), Duration::ZERO).requests, [0; 0]);
        assert_eq!([answer(first), answer(second)], ["saved j@1 abc\n"; 2]);
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let mut requests = requests(&path);
        for line in ["hello\n", "", "checkpoint now\n", &"x".repeat(5000)] {
            let stream = ask(&path, line);
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut first = String::new();
            BufReader::new(&stream).read_line(&mut first).unwrap();
            assert_eq!(first, "failed the request is not `checkpoint`\n");
        }
        assert_eq!(requests.wait(&[], Duration::ZERO).requests, [0; 0]);
    }

    #[test]
    fn one_listens_and_the_end_is_told() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let mut first = requests(&path);
        let task = WatchTask { job: "j".into(), selector: Selector::Pids(vec![1]) };
        assert!(Requests::listen_at(path.clone(), &task).is_err());
        let stream = ask(&path, "checkpoint\n");
        while first.wait(&[], Duration::from_millis(10)).requests.is_empty() {}
        drop(first);
        assert_eq!(answer(stream), "failed the watch has ended\n");
        assert!(!path.exists());
    }
}
