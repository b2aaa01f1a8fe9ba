//! Before anything is touched: who belongs to the job, and what stands in the way.

use super::{Options, address_space, segments};
use crate::objects::{self, Class, Probe, SocketKind, tcp, unix};
use crate::sys::{kcmp, pidfd};
use crate::tracee::proc::{self, Map};
use crate::tracee::rings;
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::manifest::ProcessSummary;
use ckpt_common::image::objects::OutsideKind;
use ckpt_common::image::socket::Address;
use ckpt_common::image::tcp::Position;
use ckpt_common::wire::REQUEST_DIRECTORY;
use nix::sys::socket::{UnixAddr, getpeername};
use procfs::process::Process as Proc;
use std::collections::{BTreeMap, HashSet};
use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Looks at what stands in the way, and the time between two.
const LOOKS: usize = 10;
const BETWEEN_LOOKS: Duration = Duration::from_millis(15);

/// Something that cannot be saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// PID and name of the process.
    pub pid: i32,
    /// See `pid`.
    pub process: String,
    /// What it is: a descriptor, a mapping, an attribute.
    pub what: String,
    /// Why it cannot be saved.
    pub reason: String,
    /// Word for `--allow` that lets the dump go on without it.
    pub allow: Option<&'static str>,
}

/// What is known before the freeze.
#[derive(Debug, Default)]
pub struct Plan {
    /// The processes, parents before children.
    pub processes: Vec<ProcessSummary>,
    /// Everything that stands in the way.
    pub blockers: Vec<Blocker>,
    /// Sockets and pipes (inodes) that processes outside the job have open, too.
    pub(super) foreign: HashSet<u64>,
    /// What is left out because that was allowed by name.
    pub left_out: Vec<Blocker>,
    /// Ends of TCP connections.
    pub connections: Vec<Connection>,
    /// Is there any TCP socket?
    pub(super) has_tcp: bool,
    /// System V segments that the job has attached, by id, with the first process that has it.
    segments: BTreeMap<i32, i32>,
    /// Sockets seen so far, by inode.
    sockets: HashSet<u64>,
}

/// One end of a TCP connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Process that has it.
    pub pid: i32,
    /// Descriptor.
    pub fd: i32,
    /// This end.
    pub local: Address,
    /// The other end.
    pub peer: Address,
    /// Has the other end sent its FIN?
    pub peer_closed: bool,
    /// Where it stands, after the cut.
    pub position: Option<Position>,
}

/// The word of `--allow` for a kind of thing outside.
pub(super) fn word(what: OutsideKind) -> &'static str {
    match what {
        OutsideKind::Stdio => "outside-stdio",
        OutsideKind::Terminal => "outside-tty",
        OutsideKind::Pipe => "outside-pipe",
        OutsideKind::Unix => "outside-unix",
    }
}

/// What stands in the way because it leads out of the job.
pub(super) fn leads_out(pid: i32, process: String, what: String, kind: OutsideKind) -> Blocker {
    Blocker { pid, process, what, reason: "it leads out of the job".into(), allow: Some(word(kind)) }
}

/// Is it a program's own request for a checkpoint, which waits for its answer? It may always lead out of the job:
/// the end of the connection tells the restored program what it is.
pub(super) fn is_request(probe: &Probe) -> bool {
    // Also while it waits to be accepted: it has the listener's name by then.
    let peer = getpeername::<UnixAddr>(probe.file.as_raw_fd());
    peer.is_ok_and(|peer| peer.path().and_then(Path::parent) == Some(Path::new(REQUEST_DIRECTORY)))
}

/// Does the description lead out of the job, and as what?
pub(super) fn outside(probe: &Probe, foreign: &HashSet<u64>) -> Option<OutsideKind> {
    let shared = foreign.contains(&probe.stat.st_ino) || is_request(probe);
    match probe.class() {
        Class::Terminal => Some(OutsideKind::Terminal),
        Class::Pipe if shared && probe.link.starts_with("pipe:") => Some(OutsideKind::Pipe),
        Class::Socket if shared && objects::socket_kind(probe).ok()? == SocketKind::Unix => {
            Some(OutsideKind::Unix)
        }
        _ => None,
    }
}

/// Inodes of pipes and sockets that processes outside the job have open.
fn foreign(job: &HashSet<i32>) -> HashSet<u64> {
    let mut inodes = HashSet::new();
    for process in procfs::process::all_processes().into_iter().flatten().flatten() {
        if job.contains(&process.pid) || process.pid == std::process::id() as i32 {
            continue;
        }
        let mut found = HashSet::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fd", process.pid)).into_iter().flatten().flatten() {
            let Ok(link) = std::fs::read_link(entry.path()) else { continue };
            let link = link.to_string_lossy();
            let inode = link.strip_prefix("pipe:[").or_else(|| link.strip_prefix("socket:["));
            found.extend(inode.and_then(|i| i.trim_end_matches(']').parse::<u64>().ok()));
        }
        // A child that the job has forked meanwhile is no outsider.
        if !found.is_empty() && !descends(process.pid, job) {
            inodes.extend(found);
        }
    }
    inodes
}

/// Is the process a descendant of the job, or gone?
pub(super) fn descends(pid: i32, job: &HashSet<i32>) -> bool {
    let mut at = pid;
    while at > 1 {
        if job.contains(&at) {
            return true;
        }
        match Proc::new(at).and_then(|p| p.stat()) {
            Ok(stat) => at = stat.ppid,
            Err(_) => return at == pid,
        }
    }
    false
}

/// Lists the processes and everything that stands in the way at several looks: what a program opens and closes again
/// is no obstacle.
pub(super) fn plan(pids: &[i32], options: &Options) -> Result<Plan> {
    let mut plan = look(pids, options)?;
    for _ in 1..LOOKS {
        if plan.blockers.is_empty() {
            break;
        }
        std::thread::sleep(BETWEEN_LOOKS);
        let before = std::mem::replace(&mut plan, look(pids, options)?).blockers;
        plan.blockers.retain(|blocker| before.contains(blocker));
    }
    Ok(plan)
}

fn look(pids: &[i32], options: &Options) -> Result<Plan> {
    let mut all: Vec<i32> = Vec::new();
    for pid in pids.iter().flat_map(|pid| proc::tree(*pid)) {
        if !all.contains(&pid) {
            all.push(pid);
        }
    }
    if all.is_empty() {
        bail!("no process to checkpoint");
    }
    let job: HashSet<i32> = all.iter().copied().collect();
    // First who is connected to whom, then who is outside: what the job accepts or passes on meanwhile stays inside.
    let peers = unix::Peers::dump()?;
    let mut plan = Plan { foreign: foreign(&job), ..Plan::default() };
    let connected = peers.connected_to(&plan.foreign);
    plan.foreign.extend(connected);
    let ours = ancestors();
    for pid in &all {
        let Ok(proc) = Proc::new(*pid) else { continue };
        let Ok(stat) = proc.stat() else { continue };
        plan.processes.push(ProcessSummary {
            pid: *pid,
            ppid: if job.contains(&stat.ppid) { stat.ppid } else { 0 },
            name: stat.comm.clone(),
            cmdline: proc.cmdline().unwrap_or_default(),
            threads: stat.num_threads as u32,
            rss: stat.rss * 4096,
        });
        if stat.state == 'Z' {
            continue;
        }
        let mut check = Check { pid: *pid, name: stat.comm, plan: &mut plan, options };
        if ours.contains(pid) {
            check.block(
                "the process",
                "it is ckpt itself or one of its parents; start ckpt from outside the job",
            );
            continue;
        }
        // A process that ends while we look is no obstacle: it gives up its memory first of all.
        if let Err(error) = check.all(&proc, stat.ppid, &job)
            && proc.statm().is_ok_and(|m| m.size != 0)
        {
            check.block("the process", &format!("it could not be examined: {error:#}"));
        }
    }
    if plan.processes.is_empty() {
        bail!("no process to checkpoint: {all:?} ended");
    }
    let mut attached = std::mem::take(&mut plan.segments);
    for (pid, what, reason) in segments::leading_out(&mut attached, &job)? {
        let process =
            plan.processes.iter().find(|p| p.pid == pid).map(|p| p.name.clone()).unwrap_or_default();
        plan.blockers.push(Blocker { pid, process, what, reason, allow: None });
    }
    Ok(plan)
}

fn ancestors() -> HashSet<i32> {
    let mut all = HashSet::new();
    let mut pid = std::process::id() as i32;
    while pid > 0 && all.insert(pid) {
        pid = Proc::new(pid).and_then(|p| p.stat()).map_or(0, |s| s.ppid);
    }
    // Where PID 1 is an ancestor, as it always is, it is no part of a job either.
    all
}

struct Check<'a> {
    pid: i32,
    name: String,
    plan: &'a mut Plan,
    options: &'a Options,
}

impl Check<'_> {
    /// Notes something that can be left out where that is allowed by name.
    fn leave_out(&mut self, what: &str, kind: OutsideKind) {
        let item = leads_out(self.pid, self.name.clone(), what.into(), kind);
        let allowed = self.options.allow.contains(word(kind));
        let list = if allowed { &mut self.plan.left_out } else { &mut self.plan.blockers };
        list.push(item);
    }

    fn block(&mut self, what: &str, reason: &str) {
        let (process, what) = (self.name.clone(), what.into());
        self.plan.blockers.push(Blocker { pid: self.pid, process, what, reason: reason.into(), allow: None });
    }

    fn all(&mut self, proc: &Proc, parent: i32, job: &HashSet<i32>) -> Result<()> {
        self.attributes(proc, parent, job)?;
        self.namespaces()?;
        let maps = proc::maps(self.pid).context("reading the mappings")?;
        for id in maps.iter().filter_map(Map::segment) {
            self.plan.segments.entry(id).or_insert(self.pid);
        }
        let rings =
            maps.iter().filter(|map| map.path.starts_with(rings::PATH)).map(|map| map.inode).collect();
        if let Err(error) = rings::of(self.pid, &maps) {
            self.block("io_uring", &error.to_string());
        }
        for (map, reason) in address_space::obstacles(self.pid, &maps) {
            self.block(&format!("mapping {:x}-{:x} {}", map.start, map.end, map.path), reason);
        }
        self.descriptors(&rings)
    }

    fn attributes(&mut self, proc: &Proc, parent: i32, job: &HashSet<i32>) -> Result<()> {
        let status = proc.status()?;
        if status.tracerpid != 0 {
            self.block("ptrace", &format!("process {} traces it already", status.tracerpid));
        }
        if status.seccomp.unwrap_or(0) != 0 {
            self.block("seccomp", "its system call filter cannot be saved from outside");
        }
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        if text.lines().any(|l| l.starts_with("x86_Thread_features:") && l.contains("shstk")) {
            self.block("shadow stack", "its content cannot be saved from outside");
        }
        let mut ident = [0u8; 5];
        std::fs::File::open(format!("/proc/{}/exe", self.pid))
            .context("opening the executable")?
            .read_exact(&mut ident)?;
        if ident[4] != goblin::elf::header::ELFCLASS64 {
            self.block("the executable", "it is a 32-bit program");
        }
        let leader = self.pid;
        for tid in proc::threads(leader)?.into_iter().filter(|tid| *tid != leader) {
            for (what, resource) in
                [("descriptor table", kcmp::Resource::Files), ("working directory", kcmp::Resource::Fs)]
            {
                if !kcmp::shared(self.pid, tid, resource).unwrap_or(true) {
                    self.block(&format!("thread {tid}"), &format!("it has a {what} of its own (unshare)"));
                }
            }
        }
        if job.contains(&parent) {
            for (what, resource) in
                [("memory", kcmp::Resource::Vm), ("descriptor table", kcmp::Resource::Files)]
            {
                if kcmp::shared(self.pid, parent, resource).unwrap_or(false) && !vfork_window(parent) {
                    self.block(
                        "the process",
                        &format!("it shares its {what} with its parent {parent} (clone)"),
                    );
                }
            }
        }
        Ok(())
    }

    fn connection(&mut self, probe: &Probe) -> Result<()> {
        self.plan.has_tcp = true;
        if self.plan.sockets.insert(probe.stat.st_ino)
            && let Some((local, peer, peer_closed)) = tcp::ends(probe.file.as_fd())?
        {
            let (pid, fd) = (probe.pid, probe.fd);
            self.plan.connections.push(Connection { pid, fd, local, peer, peer_closed, position: None });
        }
        Ok(())
    }

    fn namespaces(&mut self) -> Result<()> {
        for name in ["mnt", "net", "ipc", "uts", "user", "time"] {
            let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}"));
            if of(&self.pid.to_string()).with_context(|| format!("reading the {name} namespace"))?
                != of("self")?
                && !(name == "mnt" && mounts(&Proc::new(self.pid)?)? == mounts(&Proc::myself()?)?)
            {
                let reason = format!("it is in another {name} namespace than ckpt; run ckpt in there");
                self.block(&format!("{name} namespace"), &reason);
            }
        }
        Ok(())
    }

    /// `mapped`: inodes of the io_uring instances that it has mapped.
    fn descriptors(&mut self, mapped: &HashSet<u64>) -> Result<()> {
        let process = pidfd::open(self.pid).context("opening a pidfd")?;
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.pid))?.flatten() {
            let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            // Closed meanwhile.
            let Ok(probe) = Probe::new(self.pid, process.as_fd(), fd) else { continue };
            let what = format!("fd {fd}  {}", probe.link);
            if let Some(kind) = outside(&probe, &self.plan.foreign) {
                if fd > 2 && !is_request(&probe) {
                    self.leave_out(&what, kind);
                }
                continue;
            }
            match probe.class() {
                Class::Unknown | Class::SysvMemory => {
                    self.block(&what, "this kind of object is not supported")
                }
                Class::IoUring if !mapped.contains(&probe.stat.st_ino) => {
                    self.block(&what, "the process has an io_uring that it has not mapped")
                }
                Class::IoUring => {
                    if let Some(reason) = objects::io_uring::obstacle(&probe)? {
                        self.block(&what, &reason);
                    }
                }
                Class::Socket => match objects::socket_kind(&probe)? {
                    SocketKind::Other => {
                        self.block(&what, "sockets of this family or type are not supported")
                    }
                    SocketKind::Tcp => self.connection(&probe)?,
                    SocketKind::Udp | SocketKind::Unix => {}
                },
                _ => {}
            }
        }
        Ok(())
    }
}

/// What a process has mounted where: device, directory in it, mount point. A restore that makes a PID namespace makes a
/// mount namespace with a /proc of its own and nothing else; so /proc does not count.
fn mounts(process: &Proc) -> Result<Vec<(String, String, PathBuf)>> {
    let all = process.mountinfo().context("reading the mounts")?.into_iter();
    let mut mounts: Vec<_> = all
        .filter(|mount| mount.mount_point != Path::new("/proc"))
        .map(|mount| (mount.majmin, mount.root, mount.mount_point))
        .collect();
    mounts.sort_unstable();
    Ok(mounts)
}

/// A parent that waits in vfork(2) shares its memory for a moment only.
fn vfork_window(parent: i32) -> bool {
    let wchan = std::fs::read_to_string(format!("/proc/{parent}/wchan")).unwrap_or_default();
    let call = std::fs::read_to_string(format!("/proc/{parent}/syscall")).unwrap_or_default();
    wchan.contains("vfork") || ["58 ", "56 ", "435 "].iter().any(|n| call.starts_with(n))
}
