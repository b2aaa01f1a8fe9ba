//! Processes and threads: what the kernel keeps per task, per thread group and per address space.

use super::{Kind, MemoryId, file::FileId};
use serde::{Deserialize, Serialize};

/// One process of the job (a thread group), or a zombie.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Process {
    /// PID, PPID, process group and session as the process sees them (in its own PID namespace).
    pub pid: i32,
    /// Parent in the job; 0 where the parent is not part of the job.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// Set for a zombie: its status as wait(2) reports it. Then nothing else below has meaning.
    pub zombie: Option<i32>,
    /// The whole group is stopped by a job control signal.
    pub stopped: bool,
    /// Was the process a child subreaper (`PR_SET_CHILD_SUBREAPER`)?
    pub subreaper: bool,
    /// Signal that the parent gets at the end of this process (0: none).
    pub exit_signal: i32,
    /// Path of the executable.
    pub exe: String,
    /// Command line, for people (`ckpt show --ps`).
    pub cmdline: Vec<String>,
    /// File creation mask.
    pub umask: u32,
    /// Working directory.
    pub cwd: String,
    /// Root directory as seen from the node's root.
    pub root: String,
    /// Resource limits: (resource number, soft, hard).
    pub limits: Vec<(u32, u64, u64)>,
    /// Signal actions, one per changed signal.
    pub actions: Vec<SignalAction>,
    /// Signals pending for the whole process, in queue order.
    pub pending: Vec<SigInfo>,
    /// Interval timers `ITIMER_REAL`, `ITIMER_VIRTUAL`, `ITIMER_PROF`.
    pub itimers: [IntervalTimer; 3],
    /// POSIX timers (timer_create(2)).
    pub timers: Vec<PosixTimer>,
    /// `oom_score_adj`.
    pub oom_score_adj: i32,
    /// `PR_GET_DUMPABLE`.
    pub dumpable: u32,
    /// `PR_GET_THP_DISABLE`.
    pub thp_disable: bool,
    /// The address space.
    pub mm: AddressSpace,
    /// Threads, the leader first.
    pub threads: Vec<Thread>,
    /// Descriptor table.
    pub fds: Vec<Descriptor>,
}

impl Kind for Process {
    const KIND: &'static str = "process";
    const VERSION: u16 = 1;
}

/// One entry of a descriptor table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Number in the process.
    pub fd: i32,
    /// `FD_CLOEXEC`.
    pub cloexec: bool,
    /// The open file description, shared by every descriptor with the same id.
    pub file: FileId,
}

/// One thread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Thread {
    /// TID as the process sees it.
    pub tid: i32,
    /// Thread name.
    pub comm: String,
    /// `struct user_regs_struct` (sys/user.h), rewound so that an interrupted system call is issued again.
    #[serde(with = "serde_bytes")]
    pub regs: Vec<u8>,
    /// XSAVE area as `NT_X86_XSTATE` gives it; word 58 holds the enabled features (XCR0).
    #[serde(with = "serde_bytes")]
    pub xstate: Vec<u8>,
    /// Blocked signals, bit n-1 for signal n.
    pub sigmask: u64,
    /// Signals pending for this thread, in queue order.
    pub pending: Vec<SigInfo>,
    /// `stack_t` of sigaltstack(2): address, flags, size.
    pub altstack: AltStack,
    /// Head of the robust futex list and its length (get_robust_list(2)).
    pub robust_list: (u64, u64),
    /// Restartable sequences area.
    pub rseq: Option<Rseq>,
    /// Address cleared at thread exit (set_tid_address(2)).
    pub clear_child_tid: u64,
    /// Credentials.
    pub creds: Credentials,
    /// Scheduling: `struct sched_attr` as sched_getattr(2) gives it.
    #[serde(with = "serde_bytes")]
    pub sched: Vec<u8>,
    /// CPU affinity mask, as sched_getaffinity(2) gives it; empty where every CPU is allowed.
    #[serde(with = "serde_bytes")]
    pub affinity: Vec<u8>,
    /// I/O priority (ioprio_get(2)).
    pub ioprio: i32,
    /// `PR_GET_PDEATHSIG`.
    pub pdeathsig: i32,
    /// Timer slack in ns.
    pub timer_slack: u64,
}

/// Restartable sequences registration (`PTRACE_GET_RSEQ_CONFIGURATION`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    /// Address of `struct rseq`.
    pub address: u64,
    /// Its registered length in bytes.
    pub length: u32,
    /// Signature before abort handlers.
    pub signature: u32,
    /// The `rseq_cs` word, which registration clears.
    pub critical_section: u64,
}

/// sigaltstack(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AltStack {
    /// Lowest address.
    pub address: u64,
    /// `SS_DISABLE`, `SS_AUTODISARM`.
    pub flags: i32,
    /// Size in bytes.
    pub size: u64,
}

/// A changed signal action, in the kernel's layout (rt_sigaction(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalAction {
    /// Signal number.
    pub signal: i32,
    /// Handler address, `SIG_DFL` (0) or `SIG_IGN` (1).
    pub handler: u64,
    /// `SA_*` flags.
    pub flags: u64,
    /// Restorer address.
    pub restorer: u64,
    /// Signals blocked in the handler.
    pub mask: u64,
}

/// A queued signal: the 128 bytes of `siginfo_t`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigInfo(#[serde(with = "serde_bytes")] pub Vec<u8>);

/// Interval timer: seconds and microseconds folded into microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalTimer {
    /// Reload value in us.
    pub interval: u64,
    /// Time to the next expiry in us; 0 disarms.
    pub value: u64,
}

/// POSIX timer (timer_create(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// Timer id.
    pub id: i32,
    /// Clock id.
    pub clock: i32,
    /// `sigev_notify`.
    pub notify: i32,
    /// `sigev_signo`.
    pub signal: i32,
    /// `sigev_value`.
    pub value: u64,
    /// TID for `SIGEV_THREAD_ID`.
    pub tid: i32,
    /// Reload value in ns.
    pub interval: u64,
    /// Time to the next expiry in ns.
    pub remaining: u64,
    /// Overruns not yet read.
    pub overrun: i32,
}

/// Credentials of a thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved, filesystem user id.
    pub uids: [u32; 4],
    /// Real, effective, saved, filesystem group id.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capability sets: inheritable, permitted, effective, bounding, ambient.
    pub caps: [u64; 5],
    /// `PR_GET_SECUREBITS`.
    pub securebits: u32,
    /// `PR_GET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
}

/// The address space of a process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddressSpace {
    /// Where its private pages are in the page maps.
    pub memory: MemoryId,
    /// `start_code, end_code, start_data, end_data, start_brk, brk, start_stack, arg_start, arg_end,
    /// env_start, env_end`: the order of `struct prctl_mm_map`.
    pub fields: [u64; 11],
    /// Auxiliary vector.
    #[serde(with = "serde_bytes")]
    pub auxv: Vec<u8>,
    /// Executable (`/proc/PID/exe`).
    pub exe: FileId,
    /// Mappings in address order.
    pub mappings: Vec<Mapping>,
    /// Bytes of the vdso, to tell whether the destination has another one.
    #[serde(with = "serde_bytes")]
    pub vdso: Vec<u8>,
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// `PROT_READ | PROT_WRITE | PROT_EXEC`.
    pub prot: i32,
    /// What is mapped.
    pub backing: Backing,
    /// `MAP_GROWSDOWN` and `MAP_NORESERVE` as given to mmap(2).
    pub flags: i32,
    /// Advice to give again (madvise(2) constants).
    pub advice: Vec<i32>,
    /// mlock(2)ed: 0 no, 1 locked, 2 locked on fault.
    pub locked: u8,
    /// Had it transparent huge pages?
    #[serde(default)]
    pub huge: bool,
}

/// What a mapping shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// Private mapping of a file from this offset; changed pages are in the page map.
    PrivateFile {
        /// The file.
        file: FileId,
        /// Offset in bytes.
        offset: u64,
    },
    /// Shared mapping of a file, memfd or shared memory object.
    SharedFile {
        /// The file.
        file: FileId,
        /// Offset in bytes.
        offset: u64,
    },
    /// `[vdso]`, `[vvar]` and its like: provided by the kernel, moved whole.
    Kernel {
        /// Name as in /proc/PID/maps.
        name: String,
    },
}
