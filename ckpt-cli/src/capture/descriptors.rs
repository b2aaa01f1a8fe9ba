//! Descriptor tables of the job: which descriptors share an open file description, and what the descriptions are.

use super::{Blocker, Connection, Options, plan, segments};
use crate::memory::dump::MemoryDump;
use crate::network::hold::SocketCookie;
use crate::objects::sysv::{self, Listed};
use crate::objects::{
    self, CaptureContext, Captured, Class, FilePolicy, Passing, Probe, SocketKind, tcp, udp, unix,
};
use crate::sys::{kcmp, pidfd};
use crate::tracee::freeze::Frozen;
use crate::tracee::proc::{self, Map};
use anyhow::{Context as _, Error, Result, bail};
use ckpt_common::image::file::{FileId, OpenFile};
use ckpt_common::image::objects::{Outside, OutsideKind};
use ckpt_common::image::process::Descriptor;
use ckpt_common::image::tcp::TcpSocket;
use ckpt_common::image::{Kind, MemoryId, PAGE_SIZE};
use procfs::process::VmFlags;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

/// TCP sockets of which one half is captured: the receiving half follows when the sending halves of all nodes are.
#[derive(Debug, Default)]
pub(super) struct Halves(Vec<(OpenFile, Found, tcp::Half)>);

impl Halves {
    /// Captures what the sockets have received.
    pub(super) fn receiving(self) -> Result<TcpSockets> {
        let receive = |(file, found, half): (OpenFile, Found, tcp::Half)| {
            let socket = half.receiving(found.probe.file.as_fd()).with_context(|| file.label.clone())?;
            Ok((file, found.probe, socket))
        };
        Ok(TcpSockets(self.0.into_iter().map(receive).collect::<Result<_>>()?))
    }
}

/// Captured TCP sockets, kept until it is decided whether the job lives or dies.
#[derive(Debug, Default)]
pub(super) struct TcpSockets(Vec<(OpenFile, Probe, TcpSocket)>);

impl TcpSockets {
    /// Their records: encoded only here, when the job runs on.
    pub(super) fn records(&self) -> impl Iterator<Item = Result<OpenFile>> {
        self.0
            .iter()
            .map(|(file, _, socket)| Ok(OpenFile { payload: Captured::new(socket)?.payload, ..file.clone() }))
    }

    /// Where the connections stand.
    pub(super) fn connections(&self) -> Vec<Connection> {
        let connection = |(_, probe, socket): &(OpenFile, Probe, TcpSocket)| {
            let position = socket.position()?;
            let (local, peer, peer_closed) = (position.local, position.peer, position.peer_finished);
            let position = Some(position);
            Some(Connection { pid: probe.pid, fd: probe.fd, local, peer, peer_closed, position })
        };
        self.0.iter().filter_map(connection).collect()
    }

    /// Makes all sockets silent: when the job is killed, their peers do not notice.
    pub(super) fn silence(&self) -> Result<()> {
        self.0.iter().try_for_each(|(_, probe, _)| tcp::silence(probe.file.as_fd()))
    }

    /// Names of the sockets, for the traffic hold.
    pub(super) fn cookies(&self) -> Result<Vec<SocketCookie>> {
        self.0.iter().map(|(_, probe, _)| Ok(SocketCookie::of(&probe.file)?)).collect()
    }
}

/// A description and one of its descriptors: (PID, number, identity).
type Known = (i32, i32, FileId);

/// A description found in a descriptor table.
#[derive(Debug)]
struct Found {
    id: FileId,
    probe: Probe,
}

/// A Unix socket: where it is in the list of files, and where it was found.
#[derive(Debug)]
struct End {
    at: usize,
    pid: i32,
    fd: i32,
    device: u64,
    inode: u64,
}

/// Everything that descriptors, mappings and queues of the job refer to.
pub(super) struct Table<'a> {
    options: &'a Options,
    /// Sockets and pipes that processes outside the job have open.
    foreign: &'a HashSet<u64>,
    memory: &'a mut MemoryDump,
    guard: &'a mut Option<tcp::Guard>,
    /// Descriptors of ours that stand for descriptions: kept open, because others are compared with them.
    own: Vec<OwnedFd>,
    descriptors: BTreeMap<i32, Vec<Descriptor>>,
    /// Descriptions by device and inode, each with a descriptor of its own, ordered as kcmp(2) orders them.
    groups: HashMap<(u64, u64), Vec<Known>>,
    pending: Vec<Found>,
    files: Vec<OpenFile>,
    mapped: HashMap<(u64, u64, bool), FileId>,
    /// All processes of the job.
    job: HashSet<i32>,
    /// Segments of System V shared memory on this node, as they were when the job stood still.
    listed: Vec<Listed>,
    /// How often the job has each attached.
    attaches: BTreeMap<i32, u64>,
    /// Descriptions that stand for segments.
    segments: HashSet<FileId>,
    staged: HashMap<(u64, u64), MemoryId>,
    next: u32,
    pipes: HashSet<u64>,
    unix: unix::Peers,
    /// Unix sockets whose other end is to be looked for.
    ends: Vec<End>,
    /// What comes back closed or disconnected, as allowed.
    left_out: Vec<Blocker>,
    halves: Halves,
}

impl<'a> Table<'a> {
    /// Goes through all descriptor tables and finds which descriptors share a description.
    pub(super) fn new(
        frozen: &Frozen,
        options: &'a Options,
        foreign: &'a HashSet<u64>,
        memory: &'a mut MemoryDump,
        guard: &'a mut Option<tcp::Guard>,
    ) -> Result<Self> {
        let mut table = Self {
            options,
            foreign,
            memory,
            guard,
            own: Vec::new(),
            descriptors: BTreeMap::new(),
            groups: HashMap::new(),
            pending: Vec::new(),
            files: Vec::new(),
            mapped: HashMap::new(),
            job: frozen.processes.keys().copied().collect(),
            listed: sysv::list()?,
            attaches: BTreeMap::new(),
            segments: HashSet::new(),
            staged: HashMap::new(),
            next: 0,
            pipes: HashSet::new(),
            unix: unix::Peers::default(),
            ends: Vec::new(),
            left_out: Vec::new(),
            halves: Halves::default(),
        };
        for process in frozen.processes.values().filter(|p| !p.threads.is_empty()) {
            table
                .scan(process.pid)
                .with_context(|| format!("reading the descriptors of process {}", process.pid))?;
        }
        Ok(table)
    }

    fn scan(&mut self, pid: i32) -> Result<()> {
        let process = pidfd::open(pid).context("opening a pidfd")?;
        let mut numbers: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/fd"))?
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        numbers.sort_unstable();
        for fd in numbers {
            let probe = Probe::new(pid, process.as_fd(), fd)?;
            let cloexec = probe.info.flags & libc::O_CLOEXEC != 0;
            let id = self.identify(probe)?;
            self.descriptors.entry(pid).or_default().push(Descriptor { fd, cloexec, file: id });
        }
        Ok(())
    }

    /// The description's identity: a known one (kcmp(2) gives an order, so the search is logarithmic), or a new one.
    fn identify(&mut self, probe: Probe) -> Result<FileId> {
        let group = self.groups.entry((probe.stat.st_dev, probe.stat.st_ino)).or_default();
        let mut failed = None;
        let place = group.binary_search_by(|(pid, fd, _)| {
            kcmp::files(*pid, *fd, probe.pid, probe.fd).unwrap_or_else(|e| {
                failed = Some(e);
                std::cmp::Ordering::Less
            })
        });
        if let Some(e) = failed {
            return Err(e).context("comparing descriptors (kcmp)");
        }
        match place {
            Ok(at) => Ok(group[at].2),
            Err(at) => {
                let id = FileId(self.next);
                self.next += 1;
                group.insert(at, (probe.pid, probe.fd, id));
                self.pending.push(Found { id, probe });
                Ok(id)
            }
        }
    }

    /// Captures every description found so far, those in flight in sockets included.
    pub(super) fn capture(&mut self) -> Result<()> {
        let tables = self.descriptors.values().flatten();
        let stdio: HashSet<FileId> = tables.filter(|d| (0..=2).contains(&d.fd)).map(|d| d.file).collect();
        self.unix = unix::Peers::read(self.pending.iter().map(|f| &f.probe))?;
        while !self.pending.is_empty() {
            for found in std::mem::take(&mut self.pending) {
                let probe = &found.probe;
                if probe.class() == Class::Socket && objects::socket_kind(probe)? == SocketKind::Tcp {
                    self.half(found)?;
                    continue;
                }
                let captured = self
                    .capture_one(found.id, probe, stdio.contains(&found.id))
                    .with_context(|| format!("fd {} of process {} ({})", probe.fd, probe.pid, probe.link))?;
                self.files.push(open_file(&found, captured)?);
                if probe.pid == std::process::id() as i32 {
                    self.own.push(found.probe.file);
                }
            }
        }
        self.other_ends()
    }

    /// Of each Unix socket, the other end must be the job's. One that has come about since the plan may lead out.
    fn other_ends(&mut self) -> Result<()> {
        for End { at, pid, fd, device, inode } in std::mem::take(&mut self.ends) {
            let other = self.unix.other_end(inode);
            if other.is_none_or(|other| self.groups.contains_key(&(device, other))) {
                continue;
            }
            let link = self.files[at].label.clone();
            let Captured { kind, version, payload } = self
                .leave_out(pid, fd, &link, OutsideKind::Unix)
                .with_context(|| format!("fd {fd} of process {pid} ({link})"))?;
            let file = &mut self.files[at];
            (file.kind, file.version, file.payload) = (kind.into(), version, payload);
        }
        Ok(())
    }

    /// Leaves something out that leads out of the job, if that is allowed.
    fn leave_out(&mut self, pid: i32, fd: i32, link: &str, what: OutsideKind) -> Result<Captured> {
        if !self.options.allow.contains(plan::word(what)) {
            return Err(Passing::Outside.into());
        }
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        self.left_out.push(plan::leads_out(pid, name.trim_end().into(), format!("fd {fd}  {link}"), what));
        Captured::new(&Outside { what })
    }

    fn capture_one(&mut self, id: FileId, probe: &Probe, stdio: bool) -> Result<Captured> {
        if let Some(what) = plan::outside(probe, self.foreign) {
            if stdio || plan::is_request(probe) {
                return Captured::new(&Outside { what: if stdio { OutsideKind::Stdio } else { what } });
            }
            return self.leave_out(probe.pid, probe.fd, &probe.link, what);
        }
        match probe.class() {
            Class::PathFile => objects::path_file::capture(probe, self),
            Class::MemoryFile => objects::memory_file::capture(probe, self),
            Class::SysvMemory if self.segments.contains(&id) => {
                let listed = std::mem::take(&mut self.listed);
                let captured = sysv::capture(probe, &listed, |pid| proc::inner(pid).unwrap_or(pid), self);
                self.listed = listed;
                captured
            }
            Class::Pipe => objects::pipe::capture(probe, &mut self.pipes),
            Class::EventFd => objects::anonymous::capture_eventfd(probe),
            Class::TimerFd => objects::anonymous::capture_timerfd(probe),
            Class::SignalFd => objects::anonymous::capture_signalfd(probe),
            Class::Epoll => objects::epoll::capture(probe, self),
            Class::IoUring => objects::io_uring::capture(probe),
            Class::Socket => match objects::socket_kind(probe)? {
                SocketKind::Unix => {
                    let peers = std::mem::take(&mut self.unix);
                    let captured = unix::capture(probe, &peers, self);
                    self.unix = peers;
                    let (device, inode) = (probe.stat.st_dev, probe.stat.st_ino);
                    let (pid, fd, at) = (probe.pid, probe.fd, self.files.len());
                    self.ends.push(End { at, pid, fd, device, inode });
                    captured
                }
                SocketKind::Udp => Captured::new(&udp::capture(probe.file.as_fd())?),
                SocketKind::Tcp | SocketKind::Other => Err(Passing::Unsupported.into()),
            },
            Class::SysvMemory | Class::Terminal | Class::Unknown => Err(Passing::Unsupported.into()),
        }
    }

    /// Captures the sending half of a TCP socket.
    fn half(&mut self, found: Found) -> Result<()> {
        let probe = &found.probe;
        let guard = match &mut self.guard {
            Some(guard) => guard,
            // The first TCP socket of the job was made after the plan.
            none => none.insert(tcp::Guard::start()?),
        };
        guard.watch(probe.file.as_fd())?;
        let half = tcp::capture_sending(probe.file.as_fd())
            .with_context(|| format!("fd {} of process {} ({})", probe.fd, probe.pid, probe.link))?;
        let empty = Captured { kind: TcpSocket::KIND, version: TcpSocket::VERSION, payload: Vec::new() };
        let file = open_file(&found, empty)?;
        self.halves.0.push((file, found, half));
        Ok(())
    }

    /// The descriptor table of a process.
    pub(super) fn descriptors(&self, pid: i32) -> Vec<Descriptor> {
        self.descriptors.get(&pid).cloned().unwrap_or_default()
    }

    /// What a descriptor of some process refers to that is on this device (major << 32 | minor), with this inode.
    pub(super) fn by_inode(&self, device: u64, inode: u64) -> Option<FileId> {
        let device = nix::sys::stat::makedev(device >> 32, device & u64::from(u32::MAX));
        self.groups.get(&(device, inode))?.first().map(|(_, _, id)| *id)
    }

    /// Processes that have an io_uring.
    pub(super) fn with_rings(&self) -> BTreeSet<i32> {
        let rings = self.pending.iter().filter(|found| found.probe.class() == Class::IoUring);
        let rings: HashSet<FileId> = rings.map(|found| found.id).collect();
        let has = |table: &Vec<Descriptor>| table.iter().any(|d| rings.contains(&d.file));
        self.descriptors.iter().filter(|(_, table)| has(table)).map(|(pid, _)| *pid).collect()
    }

    /// The memory of the job.
    pub(super) fn memory(&mut self) -> &mut MemoryDump {
        self.memory
    }

    /// A description for a mapped file or the executable; `name` is a link below /proc/PID.
    pub(super) fn mapped_file(
        &mut self,
        pid: i32,
        key: Option<(u64, u64)>,
        name: &str,
        write: bool,
    ) -> Result<FileId> {
        if let Some(id) = key.and_then(|(device, inode)| self.mapped.get(&(device, inode, write))) {
            return Ok(*id);
        }
        let file = File::options().read(true).write(write).open(format!("/proc/{pid}/{name}"))?;
        let probe = Probe::own(file.into())?;
        let id = FileId(self.next);
        self.next += 1;
        if let Some((device, inode)) = key {
            self.mapped.insert((device, inode, write), id);
        }
        self.pending.push(Found { id, probe });
        Ok(id)
    }

    /// A description for what is mapped there, known by `key`.
    pub(super) fn mapping(&mut self, pid: i32, map: &Map, key: (u64, u64)) -> Result<FileId> {
        // A shared mapping that may become writable needs a description that is open for writing.
        let write = map.shared && map.flags.contains(VmFlags::MW);
        self.mapped_file(pid, Some(key), &map.link(), write)
    }

    /// A description for a System V segment that is attached there.
    pub(super) fn segment(&mut self, pid: i32, map: &Map, id: i32) -> Result<FileId> {
        let listed = self.listed.iter().find(|s| s.id == id).context("no segment has this id")?;
        if map.offset + map.size() > listed.size.next_multiple_of(PAGE_SIZE as u64) {
            bail!("the mapping reaches behind the segment's end");
        }
        let file = self.mapping(pid, map, (sysv::DEVICE, id as u64))?;
        self.segments.insert(file);
        *self.attaches.entry(id).or_default() += 1;
        Ok(file)
    }

    /// Segments that nobody has attached at the moment, if processes of the job have made them; and none may lead out.
    fn other_segments(&mut self) -> Result<()> {
        let made = segments::made_by(&self.listed, &self.job)?;
        for segment in &self.listed {
            let ours = self.attaches.get(&segment.id).copied();
            if segment.attaches > ours.unwrap_or(0) && (ours.is_some() || made.contains(&segment.id)) {
                return Err(Error::from(Passing::Outside).context(segment.name()));
            }
            if ours.is_none() && made.contains(&segment.id) {
                let probe = Probe::own(sysv::open(segment)?.into())?;
                let id = FileId(self.next);
                self.next += 1;
                self.segments.insert(id);
                self.pending.push(Found { id, probe });
            }
        }
        Ok(())
    }

    /// The records of all descriptions, but for TCP sockets; and what is left out.
    pub(super) fn finish(mut self) -> Result<(Vec<OpenFile>, Halves, Vec<Blocker>)> {
        self.other_segments()?;
        self.capture()?;
        Ok((self.files, self.halves, self.left_out))
    }
}

fn open_file(found: &Found, captured: Captured) -> Result<OpenFile> {
    let probe = &found.probe;
    Ok(OpenFile {
        id: found.id,
        flags: probe.info.flags & !libc::O_CLOEXEC,
        owner: objects::owner(probe)?,
        label: probe.link.clone(),
        kind: captured.kind.into(),
        version: captured.version,
        payload: captured.payload,
    })
}

impl CaptureContext for Table<'_> {
    fn stage(&mut self, key: (u64, u64), file: &File) -> Result<MemoryId> {
        if let Some(id) = self.staged.get(&key) {
            return Ok(*id);
        }
        let id = self.memory.copy_file(file)?;
        self.staged.insert(key, id);
        Ok(id)
    }

    fn epoll_target(&self, pid: i32, epfd: i32, tfd: i32, nth: u32) -> Option<FileId> {
        let is =
            |owner: i32, fd: i32| kcmp::epoll_target(owner, fd, pid, epfd, tfd as u32, nth).unwrap_or(false);
        if is(pid, tfd) {
            return self.descriptors.get(&pid)?.iter().find(|d| d.fd == tfd).map(|d| d.file);
        }
        let all = self.descriptors.iter().flat_map(|(pid, table)| table.iter().map(move |d| (*pid, d)));
        all.into_iter().find(|(owner, d)| is(*owner, d.fd)).map(|(_, d)| d.file)
    }

    fn in_flight(&mut self, file: OwnedFd) -> Result<FileId> {
        self.identify(Probe::own(file)?)
    }

    fn file_policy(&self) -> FilePolicy {
        self.options.files
    }
}
