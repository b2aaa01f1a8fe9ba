//! What holds trackers between two dumps: a small process per job and node, `ckpt keep`.
//!
//! A userfaultfd lives as long as somebody holds it, and neither the job nor ckpt does: the job is not to have
//! descriptors of ours, and ckpt ends. So the first dump starts a keeper and gives it the userfaultfds with what they
//! are relative to; the next dump takes them out of its hands, and gives them back at its end. When it does not, because
//! it was killed, nobody has them: the next dump is a full one, never a wrong one. The same holds where the keeper is
//! killed. It ends when the last process that it has something of has ended.
//!
//! They speak through a Unix socket at a path that follows from store and job. A message is its length (u32), its
//! content (MessagePack), and then its descriptors in groups, each group with one byte.

use super::kept::{Kept, KeptSpace};
use super::page_set::PageSet;
use super::tracker::Tracker;
use crate::sys::pidfd;
use crate::sys::userfaultfd::Userfaultfd;
use crate::tracee::mapping_flags::MappingFlags;
use anyhow::{Context as _, Result, bail, ensure};
use ckpt_common::image::{Digest, MemoryId, manifest::PartRef};
use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};
use std::fs::DirBuilder;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Where the sockets are.
const DIRECTORY: &str = "/run/ckpt";
/// Largest message.
const MOST: u32 = 1 << 30;
/// Descriptors in one group; the kernel's limit is 253 (`SCM_MAX_FD`).
const GROUP: usize = 128;
/// How long the other side may take for a message.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is kept of a job on this node.
#[derive(Debug)]
pub struct State {
    /// The dump that made the base.
    pub dump: String,
    /// This node's part of the base.
    pub part: PartRef,
    /// What was kept.
    pub kept: Kept,
}

/// The keeper of a job on this node.
#[derive(Debug)]
pub struct Keeper {
    path: PathBuf,
    stream: Option<UnixStream>,
}

#[derive(Serialize, Deserialize)]
enum Message {
    Take,
    State(Option<Stored>),
    Done,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    dump: String,
    part: PartRef,
    spaces: Vec<StoredSpace>,
    /// Is there, behind the userfaultfds, the program that reads flags of mappings?
    flags: bool,
}

#[derive(Serialize, Deserialize)]
struct StoredSpace {
    pid: i32,
    started: u64,
    memory: MemoryId,
    modified: Vec<(u64, u64)>,
}

impl Keeper {
    /// The keeper of a job, whether there is one or not.
    pub fn of(store: &Path, job: &str) -> Self {
        let store = store.canonicalize().unwrap_or_else(|_| store.to_owned());
        let name = Digest::of(&[store.as_os_str().as_encoded_bytes(), b"\0", job.as_bytes()]);
        let path = Path::new(DIRECTORY).join(format!("{}.keeper", name.short()));
        let stream = UnixStream::connect(&path).ok();
        Self { path, stream }
    }

    /// Takes what it has. From now on nothing is kept until [`Self::give`].
    pub fn take(&mut self) -> Option<State> {
        let stream = self.stream.as_mut()?;
        let taken = stream.set_read_timeout(Some(PATIENCE)).map_err(anyhow::Error::from).and_then(|()| {
            send(stream, &Message::Take, &[])?;
            match receive(stream)? {
                Some((Message::State(Some(stored)), fds)) => join(stored, fds).map(Some),
                _ => Ok(None),
            }
        });
        match taken {
            Ok(state) => state,
            Err(error) => {
                tracing::warn!("the keeper of this job does not answer, so everything is saved: {error:#}");
                self.stream = None;
                None
            }
        }
    }

    /// Gives it what is to be kept; starts it if there is none.
    ///
    /// # Errors
    /// It cannot be started. Then the next dump is a full one.
    pub fn give(mut self, state: State) -> Result<()> {
        let (stored, fds) = split(state);
        let message = Message::State(Some(stored));
        if let Some(stream) = &mut self.stream
            && hand_over(stream, &message, &fds).is_ok()
        {
            return Ok(());
        }
        hand_over(&mut self.start().context("starting a keeper for the next dump")?, &message, &fds)
    }

    fn start(&self) -> Result<UnixStream> {
        DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY).context(DIRECTORY)?;
        let (ours, its) = UnixStream::pair()?;
        Command::new("/proc/self/exe")
            .arg("keep")
            .arg(&self.path)
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(its)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(ours)
    }
}

fn hand_over(stream: &mut UnixStream, message: &Message, fds: &[OwnedFd]) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    send(stream, message, fds)?;
    match receive(stream)? {
        Some((Message::Done, _)) => Ok(()),
        _ => bail!("the keeper did not take it"),
    }
}

fn split(state: State) -> (Stored, Vec<OwnedFd>) {
    let State { dump, part, kept } = state;
    let mut fds = Vec::with_capacity(kept.spaces.len() + 1);
    let spaces = kept.spaces.into_iter().map(|kept| {
        fds.push(kept.tracker.into_userfaultfd().into());
        let modified = kept.modified.ranges().iter().map(|range| (range.start, range.end)).collect();
        StoredSpace { pid: kept.pid, started: kept.started, memory: kept.memory, modified }
    });
    let spaces = spaces.collect();
    let flags = kept.flags.is_some();
    fds.extend(kept.flags.map(MappingFlags::into_program));
    (Stored { dump, part, spaces, flags }, fds)
}

fn join(stored: Stored, mut fds: Vec<OwnedFd>) -> Result<State> {
    let Stored { dump, part, spaces, flags } = stored;
    let program = if flags { fds.pop() } else { None };
    ensure!(spaces.len() == fds.len(), "{} descriptors for {} processes", fds.len(), spaces.len());
    let spaces = spaces.into_iter().zip(fds).map(|(space, fd)| KeptSpace {
        pid: space.pid,
        started: space.started,
        memory: space.memory,
        modified: space.modified.iter().map(|(start, end)| *start..*end).collect::<PageSet>(),
        tracker: Tracker::new(Userfaultfd::from(fd)),
    });
    let flags = program.and_then(|program| {
        let flags = MappingFlags::new(program);
        flags.inspect_err(|error| tracing::debug!("the kept BPF program is of no use: {error:#}")).ok()
    });
    Ok(State { dump, part, kept: Kept { spaces: spaces.collect(), flags } })
}

fn send(stream: &mut UnixStream, message: &Message, fds: &[OwnedFd]) -> Result<()> {
    let bytes = rmp_serde::to_vec_named(message)?;
    stream.write_all(&u32::try_from(bytes.len())?.to_le_bytes())?;
    stream.write_all(&u32::try_from(fds.len())?.to_le_bytes())?;
    stream.write_all(&bytes)?;
    for group in fds.chunks(GROUP) {
        let raw: Vec<RawFd> = group.iter().map(|fd| fd.as_raw_fd()).collect();
        let control = [ControlMessage::ScmRights(&raw)];
        let sent =
            sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&[0])], &control, MsgFlags::MSG_NOSIGNAL, None);
        sent.context("handing descriptors over")?;
    }
    Ok(())
}

/// A message with its descriptors; nothing at the end.
fn receive(stream: &mut UnixStream) -> Result<Option<(Message, Vec<OwnedFd>)>> {
    let mut head = [0; 8];
    match stream.read_exact(&mut head) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (length, count) = (word(0), word(4) as usize);
    ensure!(length <= MOST, "a message of {length} bytes");
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes)?;
    let mut fds = Vec::new();
    while fds.len() < count {
        let mut byte = [0];
        let mut pieces = [IoSliceMut::new(&mut byte)];
        let mut space = cmsg_space!([RawFd; GROUP]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut pieces, Some(&mut space), flags)?;
        let before = fds.len();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                fds.extend(raw.into_iter().map(pidfd::adopt));
            }
        }
        ensure!(fds.len() > before, "descriptors are missing");
    }
    Ok(Some((rmp_serde::from_slice(&bytes)?, fds)))
}

/// The keeper itself; `client` is who has started it. Returns when there is nothing left to keep.
///
/// # Errors
/// The socket cannot be made.
pub fn run(path: &Path, client: UnixStream) -> Result<()> {
    // One whose process was killed may have left its socket there.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("{}", path.display()))?;
    let mut kept = None;
    let served = serve(&listener, client, &mut kept);
    let _ = std::fs::remove_file(path);
    served
}

type Held = (Stored, Vec<OwnedFd>);

fn serve(listener: &UnixListener, client: UnixStream, kept: &mut Option<Held>) -> Result<()> {
    let mut client = Some(client);
    loop {
        if let Some(client) = client.take()
            && let Err(error) = converse(client, kept)
        {
            tracing::warn!("{error:#}");
        }
        let Some((stored, _)) = kept else { return Ok(()) };
        let mut alive: Vec<OwnedFd> =
            stored.spaces.iter().filter_map(|space| pidfd::open(space.pid).ok()).collect();
        while !alive.is_empty() {
            let mut fds = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            fds.extend(alive.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::Error::EINTR) => continue,
                result => result?,
            };
            let happened: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
            if happened[0] {
                break;
            }
            let mut ended = happened[1..].iter();
            alive.retain(|_| ended.next() == Some(&false));
        }
        if alive.is_empty() {
            return Ok(());
        }
        client = Some(listener.accept()?.0);
    }
}

fn converse(mut client: UnixStream, kept: &mut Option<Held>) -> Result<()> {
    while let Some((message, fds)) = receive(&mut client)? {
        match message {
            Message::Take => {
                let (stored, fds) =
                    kept.take().map_or((None, Vec::new()), |(stored, fds)| (Some(stored), fds));
                send(&mut client, &Message::State(stored), &fds)?;
            }
            Message::State(stored) => {
                *kept = stored.map(|stored| (stored, fds));
                send(&mut client, &Message::Done, &[])?;
            }
            Message::Done => {}
        }
    }
    Ok(())
}

/// The stream that a keeper is started with: its standard input.
///
/// # Errors
/// It is no socket, or there is none.
pub fn first_client() -> Result<UnixStream> {
    Ok(std::io::stdin().as_fd().try_clone_to_owned()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With descriptors of files in the place of userfaultfds: what comes back is what was given.
    #[test]
    fn what_is_kept_comes_back() {
        let directory = tempfile::TempDir::new().unwrap();
        let path = directory.path().join("socket");
        let (ours, its) = UnixStream::pair().unwrap();
        let at = path.clone();
        let keeper = std::thread::spawn(move || run(&at, its));
        let state = |count: i32| {
            let spaces = (0..count).map(|number| KeptSpace {
                pid: std::process::id() as i32,
                started: 7,
                memory: MemoryId(number as u32),
                modified: [3..5, 9..10].into_iter().collect(),
                tracker: Tracker::new(OwnedFd::from(tempfile::tempfile().unwrap()).into()),
            });
            State {
                dump: "d".into(),
                part: PartRef { bytes: 5, ..PartRef::default() },
                kept: Kept { spaces: spaces.collect(), flags: None },
            }
        };
        Keeper { path: path.clone(), stream: Some(ours) }.give(state(300)).unwrap();
        for count in [300, 1] {
            let mut keeper = Keeper { path: path.clone(), stream: UnixStream::connect(&path).ok() };
            let taken = keeper.take().unwrap();
            let spaces = taken.kept.spaces;
            assert_eq!((taken.dump.as_str(), taken.part.bytes, spaces.len()), ("d", 5, count));
            assert_eq!(spaces[0].modified.pages(), 3);
            assert_eq!(spaces[count - 1].memory, MemoryId(count as u32 - 1));
            assert!(keeper.take().is_none());
            if count > 1 {
                keeper.give(state(1)).unwrap();
            }
        }
        // The last one took everything and gave nothing back.
        keeper.join().unwrap().unwrap();
        assert!(!path.exists());
    }
}
