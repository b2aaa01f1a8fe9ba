//! Payloads of the small kinds of open files. Larger kinds (sockets) have files of their own.

use super::{Kind, MemoryId};
use serde::{Deserialize, Serialize};

/// A file that has, or had, a path: regular file, directory, device node, `O_PATH` handle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PathFile {
    /// Path as seen from the process's root, without the kernel's ` (deleted)`.
    pub path: String,
    /// Was it unlinked while open? Then `content` holds it.
    pub deleted: bool,
    /// Inode key in this part, to bring back several descriptions of one deleted file as one file.
    pub inode: u64,
    /// `st_mode`.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Device number of a device node.
    pub rdev: u64,
    /// Size in bytes at the checkpoint (regular files).
    pub size: u64,
    /// Modification time: seconds and nanoseconds (regular files).
    pub mtime: (i64, i64),
    /// File position in bytes.
    pub position: u64,
    /// How the file's bytes come back.
    pub restore: FileRestore,
    /// `LOCK_SH` / `LOCK_EX` of flock(2) held by this description.
    pub flock: Option<i32>,
    /// POSIX record locks held through it.
    pub locks: Vec<RecordLock>,
}

/// A POSIX record lock (fcntl(2), F_SETLK).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordLock {
    /// The process that holds it.
    pub pid: i32,
    /// `F_RDLCK` or `F_WRLCK`.
    pub kind: i32,
    /// First byte.
    pub start: i64,
    /// Length in bytes; 0 is up to the end of the file.
    pub length: i64,
}

/// How a regular file's bytes come back at restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileRestore {
    /// Only read by the job: it must be there, unchanged.
    Unchanged,
    /// Left as it is found.
    Leave,
    /// Cut back to the length it had.
    Length,
    /// Rewritten from this memory object.
    Content(MemoryId),
}

impl Kind for PathFile {
    const KIND: &'static str = "path-file";
    const VERSION: u16 = 1;
}

/// memfd_create(2), or memory mapped shared and anonymous.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryFile {
    /// Name given to memfd_create(2); `None` for shared anonymous memory.
    pub name: Option<String>,
    /// Key of the object: descriptions with the same key share the memory.
    pub inode: u64,
    /// Size in bytes.
    pub size: u64,
    /// `F_SEAL_*`.
    pub seals: i32,
    /// Permission bits.
    pub mode: u32,
    /// File position in bytes.
    pub position: u64,
    /// Where the content is.
    pub content: MemoryId,
}

impl Kind for MemoryFile {
    const KIND: &'static str = "memory-file";
    const VERSION: u16 = 1;
}

/// A segment of System V shared memory (shmget(2)). The mappings of a description are attaches; a description that is
/// open for reading only stands for `SHM_RDONLY`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SysvMemory {
    /// Identifier that shmget(2) gave: programs keep it, so the segment has the same one again.
    pub id: i32,
    /// Key; `IPC_PRIVATE` (0) where nobody can find it.
    pub key: i32,
    /// Size in bytes as given to shmget(2).
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Is it destroyed with its last attach (`SHM_DEST`, after `IPC_RMID`)?
    pub doomed: bool,
    /// Is it kept out of swap (`SHM_LOCK`)?
    pub locked: bool,
    /// User and group that own it.
    pub owner: (u32, u32),
    /// User and group that made it.
    pub creator: (u32, u32),
    /// Process that made it, as the job sees it if it is in the job.
    pub creator_pid: i32,
    /// What was written behind `size` in the last page, without the zeros at its end.
    #[serde(with = "serde_bytes")]
    pub tail: Vec<u8>,
    /// Where the content is.
    pub content: MemoryId,
}

impl Kind for SysvMemory {
    const KIND: &'static str = "sysv-memory";
    const VERSION: u16 = 1;
}

/// One end of a pipe or FIFO.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pipe {
    /// Key of the pipe: descriptions with the same key are ends of one pipe.
    pub inode: u64,
    /// Path of a FIFO.
    pub path: Option<String>,
    /// Capacity in bytes (F_GETPIPE_SZ).
    pub capacity: u32,
    /// Content, with the first of its ends only.
    #[serde(with = "serde_bytes")]
    pub data: Option<Vec<u8>>,
}

impl Kind for Pipe {
    const KIND: &'static str = "pipe";
    const VERSION: u16 = 1;
}

/// eventfd(2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventFd {
    /// Counter.
    pub count: u64,
    /// `EFD_SEMAPHORE`?
    pub semaphore: bool,
}

impl Kind for EventFd {
    const KIND: &'static str = "eventfd";
    const VERSION: u16 = 1;
}

/// timerfd_create(2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimerFd {
    /// Clock id.
    pub clock: i32,
    /// Expirations not read yet.
    pub ticks: u64,
    /// `TFD_TIMER_ABSTIME`, `TFD_TIMER_CANCEL_ON_SET`.
    pub settime_flags: i32,
    /// Time to the next expiry in ns; 0 is disarmed.
    pub value: u64,
    /// Reload value in ns.
    pub interval: u64,
}

impl Kind for TimerFd {
    const KIND: &'static str = "timerfd";
    const VERSION: u16 = 1;
}

/// signalfd(2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SignalFd {
    /// Signals it takes, bit n-1 for signal n.
    pub mask: u64,
}

impl Kind for SignalFd {
    const KIND: &'static str = "signalfd";
    const VERSION: u16 = 1;
}

/// epoll(7).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Epoll {
    /// What it watches.
    pub targets: Vec<EpollTarget>,
}

impl Kind for Epoll {
    const KIND: &'static str = "epoll";
    const VERSION: u16 = 1;
}

/// One registration of an epoll.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollTarget {
    /// Descriptor number at registration: with the description, the key of the registration.
    pub fd: i32,
    /// The watched description.
    pub file: super::file::FileId,
    /// `EPOLL*` events.
    pub events: u32,
    /// User data.
    pub data: u64,
}

/// A description that leads out of the job and is brought back as something harmless.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outside {
    /// What it was.
    pub what: OutsideKind,
}

impl Kind for Outside {
    const KIND: &'static str = "outside";
    const VERSION: u16 = 1;
}

/// Kinds of things outside the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OutsideKind {
    /// Standard input, output or error.
    Stdio,
    /// Another terminal.
    Terminal,
    /// A pipe whose other end is outside.
    Pipe,
    /// A Unix socket whose peer is outside.
    Unix,
}
