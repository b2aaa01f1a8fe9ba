//! One file per kind of kernel object behind a descriptor, both directions side by side.
//!
//! Capturing looks at a duplicate of the target's descriptor in our own table; rebuilding makes the object in our
//! own table, from where the restored process takes it. What only the process itself can do (registrations that
//! depend on its descriptor numbers) is returned as calls for its remote batch.

pub mod anonymous;
pub mod epoll;
pub mod inet;
pub mod io_uring;
pub mod memory_file;
pub mod path_file;
pub mod pipe;
pub mod sysv;
pub mod tcp;
pub mod udp;
pub mod unix;

use anyhow::{Context as _, Result};
use ckpt_common::image::{Kind, MemoryId, file::FileId};
use nix::sys::stat::{FileStat, SFlag};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Stands in the way of a checkpoint at this moment, and may not at the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Passing {
    /// Of a Unix socket.
    #[error("it sent data to a listener that has not accepted it yet")]
    Unaccepted,
    /// It is shared with, or connected to, a process outside. If it stays so, the next plan says it.
    #[error("it leads out of the job since ckpt looked at it first")]
    Outside,
    /// It cannot be saved, or the plan would have let it pass. If it stays, the next plan says so.
    #[error("it cannot be saved, and was not there when ckpt looked first")]
    Unsupported,
}

/// A descriptor of the target under examination.
#[derive(Debug)]
pub struct Probe {
    /// Process it was found in.
    pub pid: i32,
    /// Its number there.
    pub fd: i32,
    /// Our duplicate.
    pub file: OwnedFd,
    /// fstat(2).
    pub stat: FileStat,
    /// Text of /proc/PID/fd/N.
    pub link: String,
    /// /proc/PID/fdinfo/N.
    pub info: FdInfo,
}

impl Probe {
    /// Looks at descriptor `fd` of `pid`.
    pub fn new(pid: i32, pidfd: BorrowedFd<'_>, fd: i32) -> Result<Self> {
        let file = crate::sys::pidfd::getfd(pidfd, fd)
            .with_context(|| format!("taking fd {fd} of process {pid}"))?;
        Self::of(pid, fd, file)
    }

    /// Looks at a descriptor that we hold ourselves: mapped files, descriptors in flight.
    pub fn own(file: OwnedFd) -> Result<Self> {
        use std::os::fd::AsRawFd;
        let fd = file.as_raw_fd();
        Self::of(std::process::id() as i32, fd, file)
    }

    fn of(pid: i32, fd: i32, file: OwnedFd) -> Result<Self> {
        let stat =
            nix::sys::stat::fstat(&file).with_context(|| format!("fstat of fd {fd} of process {pid}"))?;
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{fd}"))
            .with_context(|| format!("reading what fd {fd} of process {pid} is"))?
            .to_string_lossy()
            .into_owned();
        let text = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))
            .with_context(|| format!("reading fdinfo of fd {fd} of process {pid}"))?;
        Ok(Self { pid, fd, file, stat, link, info: FdInfo::parse(&text) })
    }

    /// File type bits of the mode.
    pub fn file_type(&self) -> SFlag {
        SFlag::from_bits_truncate(self.stat.st_mode & SFlag::S_IFMT.bits())
    }

    /// What kind of object it is.
    pub fn class(&self) -> Class {
        match self.file_type() {
            SFlag::S_IFREG if self.link.starts_with("/memfd:") || self.link == "/dev/zero (deleted)" => {
                Class::MemoryFile
            }
            SFlag::S_IFREG if self.link.starts_with("/SYSV") => Class::SysvMemory,
            _ if self.link.starts_with("anon_inode:") => match &self.link["anon_inode:".len()..] {
                "[eventfd]" => Class::EventFd,
                "[eventpoll]" => Class::Epoll,
                "[timerfd]" => Class::TimerFd,
                "[signalfd]" => Class::SignalFd,
                "[io_uring]" => Class::IoUring,
                _ => Class::Unknown,
            },
            SFlag::S_IFREG | SFlag::S_IFDIR | SFlag::S_IFLNK => Class::PathFile,
            SFlag::S_IFBLK => Class::PathFile,
            SFlag::S_IFCHR => match nix::sys::stat::major(self.stat.st_rdev) {
                1 => Class::PathFile,
                4 | 5 | 136..=143 => Class::Terminal,
                _ if self.info.flags & libc::O_PATH != 0 => Class::PathFile,
                _ => Class::Unknown,
            },
            SFlag::S_IFIFO => Class::Pipe,
            SFlag::S_IFSOCK => Class::Socket,
            _ => Class::Unknown,
        }
    }
}

/// Kinds of objects as told from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Anything with a path.
    PathFile,
    /// memfd or shared anonymous memory.
    MemoryFile,
    /// System V shared memory: has no descriptors, but mappings.
    SysvMemory,
    /// Pipe or FIFO.
    Pipe,
    /// Terminal.
    Terminal,
    /// Socket of any family.
    Socket,
    /// eventfd.
    EventFd,
    /// timerfd.
    TimerFd,
    /// signalfd.
    SignalFd,
    /// epoll.
    Epoll,
    /// io_uring.
    IoUring,
    /// Not supported.
    Unknown,
}

/// Parsed /proc/PID/fdinfo/N.
#[derive(Clone, Debug, Default)]
pub struct FdInfo {
    /// File position.
    pub pos: u64,
    /// Flags of open(2), `O_CLOEXEC` included.
    pub flags: i32,
    /// The other lines.
    pub lines: Vec<(String, String)>,
}

impl FdInfo {
    /// Parses the text.
    pub fn parse(text: &str) -> Self {
        let mut info = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            let (key, value) = (key.trim(), value.trim());
            match key {
                "pos" => info.pos = value.parse().unwrap_or(0),
                "flags" => info.flags = i32::from_str_radix(value, 8).unwrap_or(0),
                _ => info.lines.push((key.into(), value.into())),
            }
        }
        info
    }

    /// Value of a line.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.lines.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }
}

/// What the capture of an object may ask for.
pub trait CaptureContext {
    /// Stages the bytes of a file or memory object and gives its identity; the same key gives the same identity
    /// without copying again.
    fn stage(&mut self, key: (u64, u64), file: &File) -> Result<MemoryId>;
    /// Finds the description that `epfd` of `pid` watches under the number `tfd`.
    fn epoll_target(&self, pid: i32, epfd: i32, tfd: i32, nth: u32) -> Option<FileId>;
    /// Registers a descriptor that was found in flight in a socket.
    fn in_flight(&mut self, file: OwnedFd) -> Result<FileId>;
    /// Should files open for writing come back with content, length, or as they are found?
    fn file_policy(&self) -> FilePolicy;
}

/// `--files`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum FilePolicy {
    /// Content as at the checkpoint.
    #[default]
    Content,
    /// Length as at the checkpoint.
    Length,
    /// Left alone.
    None,
}

/// A captured object.
#[derive(Debug)]
pub struct Captured {
    /// Name of the kind.
    pub kind: &'static str,
    /// Version of the payload.
    pub version: u16,
    /// MessagePack with named fields.
    pub payload: Vec<u8>,
}

impl Captured {
    /// Encodes a payload.
    pub fn new<K: Kind>(value: &K) -> Result<Self> {
        let payload = rmp_serde::to_vec_named(value).with_context(|| format!("encoding a {}", K::KIND))?;
        Ok(Self { kind: K::KIND, version: K::VERSION, payload })
    }
}

/// What rebuilding of an object may ask for.
pub struct RebuildContext<'a> {
    /// Already rebuilt memory and deleted files by their key, to be opened again.
    pub by_inode: HashMap<u64, OwnedFd>,
    /// Fills a new file with the bytes of a memory object.
    pub fill: &'a mut dyn FnMut(MemoryId, &File) -> Result<()>,
}

impl RebuildContext<'_> {
    /// Opens the object behind `file` once more, as a description of its own.
    pub fn reopen(file: impl AsFd, flags: i32) -> Result<OwnedFd> {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        Ok(nix::fcntl::open(path.as_str(), open_flags(flags), nix::sys::stat::Mode::empty())?)
    }
}

/// Flags of a description as open(2) takes them: without those that create or truncate.
pub fn open_flags(flags: i32) -> nix::fcntl::OFlag {
    use nix::fcntl::OFlag;
    let drop = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_TRUNC | OFlag::O_TMPFILE | OFlag::O_NOCTTY;
    let keep_directory = OFlag::from_bits_retain(flags) & OFlag::O_DIRECTORY;
    (OFlag::from_bits_retain(flags) - drop) | keep_directory | OFlag::O_CLOEXEC | OFlag::O_NOCTTY
}

/// Decodes a payload, refusing newer versions.
pub fn decode<K: Kind>(version: u16, payload: &[u8]) -> Result<K> {
    anyhow::ensure!(
        version <= K::VERSION,
        "this image has {} records of version {version}, this ckpt knows up to {}: use a newer ckpt",
        K::KIND,
        K::VERSION
    );
    rmp_serde::from_slice(payload).with_context(|| format!("decoding a {} record", K::KIND))
}

/// Families and types of sockets that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    /// TCP over IPv4 or IPv6.
    Tcp,
    /// UDP over IPv4 or IPv6.
    Udp,
    /// Unix socket of any type.
    Unix,
    /// Anything else.
    Other,
}

/// What kind of socket it is.
pub fn socket_kind(probe: &Probe) -> Result<SocketKind> {
    let option = |name| crate::sys::ioctl::sockopt_int(probe.file.as_fd(), libc::SOL_SOCKET, name);
    let read = || -> std::io::Result<_> {
        Ok((option(libc::SO_DOMAIN)?, option(libc::SO_TYPE)?, option(libc::SO_PROTOCOL)?))
    };
    Ok(match read().context("asking for a socket's kind")? {
        (libc::AF_UNIX, ..) => SocketKind::Unix,
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => SocketKind::Tcp,
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP) => SocketKind::Udp,
        _ => SocketKind::Other,
    })
}

/// Who gets `SIGIO` for a description: (type, pid, signal), zeros where nobody does.
pub fn owner(probe: &Probe) -> Result<(i32, i32, i32)> {
    if probe.info.flags & libc::O_PATH != 0 {
        return Ok((0, 0, 0));
    }
    crate::sys::ioctl::owner(probe.file.as_fd()).context("asking for the owner of a descriptor (F_GETOWN_EX)")
}
