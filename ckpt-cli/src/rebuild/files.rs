//! All open file descriptions of a part, made in our own table.

use super::{Network, Options, Stdio};
use crate::objects::{
    self, RebuildContext, anonymous, epoll, io_uring, memory_file, path_file, pipe, tcp, udp, unix,
};
use crate::store::PartReader;
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::file::{FileId, OpenFile};
use ckpt_common::image::io_uring::IoUring;
use ckpt_common::image::objects::{
    Epoll, EpollTarget, EventFd, MemoryFile, Outside, OutsideKind, PathFile, Pipe, RecordLock, SignalFd,
    TimerFd,
};
use ckpt_common::image::process::{Backing, Process};
use ckpt_common::image::tcp::{TcpSocket, TcpState};
use ckpt_common::image::udp::UdpSocket;
use ckpt_common::image::unix::UnixSocket;
use ckpt_common::image::{Kind, MemoryId, PAGE_SIZE};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// The rebuilt descriptions.
pub(super) struct Files {
    files: HashMap<FileId, OwnedFd>,
    epolls: BTreeMap<FileId, (Vec<EpollTarget>, Cell<bool>)>,
    /// Buffers registered with each io_uring.
    rings: BTreeMap<FileId, Vec<(u64, u64)>>,
    locks: Vec<(FileId, RecordLock)>,
    seals: Vec<(OwnedFd, i32)>,
    connections: Vec<tcp::Rebuilt>,
    owners: RefCell<HashMap<FileId, (i32, i32, i32)>>,
    pids: BTreeSet<i32>,
    /// For what is mapped shared, the first process that has it mapped.
    first_with: HashMap<FileId, i32>,
}

impl Files {
    /// Makes every description.
    pub(super) fn rebuild(
        part: &PartReader,
        records: &[OpenFile],
        processes: &[Process],
        options: &Options,
        network: &Network,
    ) -> Result<Self> {
        let mut all = Self {
            files: HashMap::new(),
            epolls: BTreeMap::new(),
            rings: BTreeMap::new(),
            locks: Vec::new(),
            seals: Vec::new(),
            connections: Vec::new(),
            owners: records
                .iter()
                .filter(|r| r.owner != (0, 0, 0))
                .map(|r| (r.id, r.owner))
                .collect::<HashMap<_, _>>()
                .into(),
            first_with: first_with(processes),
            pids: processes.iter().flat_map(|p| p.threads.iter().map(|t| t.tid)).collect(),
        };
        let mut fill = |memory: MemoryId, file: &File| fill(part, memory, file);
        let mut context = RebuildContext { by_inode: HashMap::new(), fill: &mut fill };
        let sockets = unix::Rebuilder::new(of_kind::<UnixSocket>(records)?)?;
        // Listening sockets before the connections that use their ports.
        let (listening, others): (Vec<_>, Vec<_>) = records.iter().partition(|r| is_listening(r));
        for record in listening.into_iter().chain(others) {
            let fd = all
                .one(record, processes, options, network, &mut context, &sockets)
                .with_context(|| format!("rebuilding {} ({})", record.label, record.kind))?;
            status_flags(&fd, record).with_context(|| format!("setting the flags of {}", record.label))?;
            all.files.insert(record.id, fd);
        }
        sockets.fill(&all.files)?;
        for end in &network.stand_ins {
            let rebuilt = tcp::rebuild(&end.socket, &network.addresses, Some(&end.peer))
                .context("rebuilding the closed end of a connection")?;
            all.connections.push(rebuilt);
        }
        Ok(all)
    }

    fn one(
        &mut self,
        record: &OpenFile,
        processes: &[Process],
        options: &Options,
        network: &Network,
        context: &mut RebuildContext<'_>,
        sockets: &unix::Rebuilder,
    ) -> Result<OwnedFd> {
        let (version, payload, flags) = (record.version, &record.payload[..], record.flags);
        match record.kind.as_str() {
            PathFile::KIND => {
                let file: PathFile = objects::decode(version, payload)?;
                self.locks.extend(file.locks.iter().map(|lock| (record.id, *lock)));
                path_file::rebuild(&file, flags, context)
            }
            MemoryFile::KIND => {
                let file: MemoryFile = objects::decode(version, payload)?;
                let fd = memory_file::rebuild(&file, flags, context)?;
                if file.seals != 0 && file.name.is_some() {
                    self.seals.push((RebuildContext::reopen(&fd, libc::O_RDWR)?, file.seals));
                }
                Ok(fd)
            }
            Pipe::KIND => pipe::rebuild(&objects::decode::<Pipe>(version, payload)?, flags, context),
            EventFd::KIND => anonymous::rebuild_eventfd(&objects::decode(version, payload)?),
            TimerFd::KIND => anonymous::rebuild_timerfd(&objects::decode(version, payload)?),
            SignalFd::KIND => anonymous::rebuild_signalfd(&objects::decode(version, payload)?),
            Epoll::KIND => {
                let targets = objects::decode::<Epoll>(version, payload)?.targets;
                self.epolls.insert(record.id, (targets, Cell::new(false)));
                epoll::rebuild()
            }
            IoUring::KIND => {
                let ring: IoUring = objects::decode(version, payload)?;
                let fd = io_uring::rebuild(&ring)?;
                self.rings.insert(record.id, ring.buffers);
                Ok(fd)
            }
            UnixSocket::KIND => sockets.get(objects::decode::<UnixSocket>(version, payload)?.inode),
            UdpSocket::KIND => udp::rebuild(&objects::decode(version, payload)?, &network.addresses),
            TcpSocket::KIND => self.connection(objects::decode(version, payload)?, network),
            Outside::KIND => {
                outside(record, objects::decode::<Outside>(version, payload)?.what, processes, options)
            }
            other => bail!(
                "this image has an open file of kind {other}, which this ckpt does not know: use a newer ckpt"
            ),
        }
    }

    fn connection(&mut self, socket: TcpSocket, network: &Network) -> Result<OwnedFd> {
        let own = socket.position();
        let peer = own.and_then(|own| network.peer(&own));
        let rebuilt = match (&own, peer) {
            (Some(_), None) => tcp::rebuild(&socket.broken(), &network.addresses, None)?,
            (_, peer) => tcp::rebuild(&socket, &network.addresses, peer)?,
        };
        let fd = rebuilt.fd().try_clone_to_owned()?;
        self.connections.push(rebuilt);
        Ok(fd)
    }

    /// Lets the connections speak: every end exists, on all nodes.
    pub(super) fn connect(&mut self) -> Result<()> {
        std::mem::take(&mut self.connections).into_iter().try_for_each(tcp::Rebuilt::connect)
    }

    /// The number of a description in our table.
    pub(super) fn number(&self, id: FileId) -> Result<i32> {
        Ok(self
            .files
            .get(&id)
            .with_context(|| format!("the image refers to file {} and does not have it", id.0))?
            .as_raw_fd())
    }

    /// The registrations of an epoll, for the first process that has every descriptor it watches.
    pub(super) fn epoll(&self, id: FileId, process: &Process) -> Result<Vec<EpollTarget>> {
        let Some((targets, done)) = self.epolls.get(&id) else { return Ok(Vec::new()) };
        let has = |t: &EpollTarget| process.fds.iter().any(|d| d.fd == t.fd && d.file == t.file);
        if done.get() || !targets.iter().all(has) {
            return Ok(Vec::new());
        }
        done.set(true);
        Ok(targets.clone())
    }

    /// Is it an io_uring?
    pub(super) fn is_ring(&self, id: FileId) -> bool {
        self.rings.contains_key(&id)
    }

    /// Buffers to be registered with an io_uring by this process: of those that have the ring mapped, which are several after
    /// a fork, the first.
    pub(super) fn buffers(&self, id: FileId, process: &Process) -> &[(u64, u64)] {
        let Some(buffers) = self.rings.get(&id) else { return &[] };
        if self.first_with.get(&id) == Some(&process.pid) { buffers } else { &[] }
    }

    /// Ranges of addresses that this process registers as buffers: they cannot come later.
    pub(super) fn pinned(&self, process: &Process) -> Vec<(u64, u64)> {
        let all = self.rings.keys().flat_map(|id| self.buffers(*id, process));
        all.map(|(start, len)| (*start, start.saturating_add(*len))).collect()
    }

    /// Who gets `SIGIO` for a description: (type, pid, signal). The first process that asks is told, to set it.
    pub(super) fn owner(&self, id: FileId) -> Option<(i32, i32, i32)> {
        self.owners.borrow_mut().remove(&id)
    }

    /// Is this a process of the job? Process groups are not told apart: their leader's PID names them.
    pub(super) fn is_process(&self, pid: i32) -> bool {
        self.pids.contains(&pid)
    }

    /// Record locks of a process, with the descriptors they are taken through.
    pub(super) fn locks(&self, process: &Process) -> Vec<(i32, RecordLock)> {
        let own = self.locks.iter().filter(|(_, lock)| lock.pid == process.pid);
        own.filter_map(|(id, lock)| Some((process.fds.iter().find(|d| d.file == *id)?.fd, *lock))).collect()
    }

    /// What can be done only when everything else is done.
    pub(super) fn seal(&self) -> Result<()> {
        if let Some((id, _)) =
            self.epolls.iter().find(|(_, (targets, done))| !done.get() && !targets.is_empty())
        {
            bail!("epoll {} watches descriptors that no single process has under their numbers", id.0);
        }
        for (fd, seals) in &self.seals {
            let seals = nix::fcntl::SealFlag::from_bits_retain(*seals);
            fcntl(fd, FcntlArg::F_ADD_SEALS(seals)).context("sealing a memfd")?;
        }
        Ok(())
    }
}

fn first_with(processes: &[Process]) -> HashMap<FileId, i32> {
    let mut first = HashMap::new();
    for process in processes {
        for mapping in &process.mm.mappings {
            if let Backing::SharedFile { file, .. } = mapping.backing {
                first.entry(file).or_insert(process.pid);
            }
        }
    }
    first
}

fn is_listening(record: &OpenFile) -> bool {
    record.kind == TcpSocket::KIND
        && objects::decode::<TcpSocket>(record.version, &record.payload)
            .is_ok_and(|s| matches!(s.state, TcpState::Listening { .. }))
}

fn of_kind<K: Kind>(records: &[OpenFile]) -> Result<Vec<K>> {
    records.iter().filter(|r| r.kind == K::KIND).map(|r| objects::decode(r.version, &r.payload)).collect()
}

/// `O_NONBLOCK`, `O_APPEND`, `O_ASYNC` and their like.
fn status_flags(fd: &OwnedFd, record: &OpenFile) -> Result<()> {
    if record.flags & libc::O_PATH != 0 {
        return Ok(());
    }
    let changeable =
        OFlag::O_APPEND | OFlag::O_NONBLOCK | OFlag::O_ASYNC | OFlag::O_DIRECT | OFlag::O_NOATIME;
    let wanted = OFlag::from_bits_retain(record.flags) & changeable;
    if wanted != OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?) & changeable {
        fcntl(fd, FcntlArg::F_SETFL(wanted))?;
    }
    Ok(())
}

/// Writes a memory object into a file.
fn fill(part: &PartReader, memory: MemoryId, file: &File) -> Result<()> {
    let size = file.metadata()?.len();
    // A file that is new or was emptied is zero already: only content is written.
    part.scatter::<anyhow::Error>(&[part.page_map(memory)?], |pieces| {
        for piece in pieces {
            let at = piece.page * PAGE_SIZE as u64;
            let len = size.saturating_sub(at).min(piece.data.len() as u64) as usize;
            file.write_all_at(&piece.data[..len], at).context("writing a file's content")?;
        }
        Ok(())
    })
}

/// Something harmless in the place of what led out of the job.
fn outside(
    record: &OpenFile,
    what: OutsideKind,
    processes: &[Process],
    options: &Options,
) -> Result<OwnedFd> {
    let null = || Ok(nix::fcntl::open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?);
    let number = || {
        let tables = processes.iter().flat_map(|p| &p.fds);
        tables.filter(|d| d.file == record.id && d.fd <= 2).map(|d| d.fd).max().unwrap_or(0)
    };
    match (what, options.stdio) {
        (OutsideKind::Stdio, Stdio::Inherit) => match number() {
            0 => Ok(std::io::stdin().as_fd().try_clone_to_owned()?),
            1 => Ok(std::io::stdout().as_fd().try_clone_to_owned()?),
            _ => Ok(std::io::stderr().as_fd().try_clone_to_owned()?),
        },
        (OutsideKind::Stdio, Stdio::Log) if number() > 0 => {
            let pid =
                processes.iter().find(|p| p.fds.iter().any(|d| d.file == record.id)).map_or(0, |p| p.pid);
            let path = options
                .log_directory
                .join(format!("{pid}.{}.log", if number() == 1 { "out" } else { "err" }));
            std::fs::create_dir_all(&options.log_directory)
                .with_context(|| format!("creating {}", options.log_directory.display()))?;
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND | OFlag::O_CLOEXEC;
            nix::fcntl::open(&path, flags, Mode::from_bits_truncate(0o600))
                .with_context(|| format!("opening {}", path.display()))
        }
        (OutsideKind::Stdio | OutsideKind::Terminal, _) => null(),
        // One end of a pipe or socket pair whose other end is closed: end of file, or EPIPE.
        (OutsideKind::Pipe, _) => {
            let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
            Ok(if record.flags & libc::O_ACCMODE == libc::O_RDONLY { read } else { write })
        }
        (OutsideKind::Unix, _) => {
            use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
            Ok(socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?.0)
        }
    }
}
