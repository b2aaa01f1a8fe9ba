//! Messages of a dump.

use crate::image::{
    manifest::{BaseRef, NodeAddress, PartRef, PhaseTime, ProcessMemory, ProcessSummary},
    tcp::Position,
};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// What a dump is to do on one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DumpTask {
    /// Path of the store on the node.
    pub store: String,
    /// Name of the job in the store.
    pub job: String,
    /// The dump's identity: its directory in the store, which the agent must see.
    pub dump: String,
    /// Which processes.
    pub selector: Selector,
    /// How.
    pub options: DumpOptions,
}

/// Which processes of a node belong to the job; their descendants always do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Selector {
    /// Those marked `CKPT_JOB=ID` in their environment, or of this job in a known batch scheduler.
    Job(String),
    /// These.
    Pids(Vec<i32>),
    /// Everything in this control group and below.
    Cgroup(String),
}

/// Options of a dump that an agent must know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpOptions {
    /// The job is ended after the commit, and stays frozen until then.
    pub stop: bool,
    /// zstd level, or nothing for no compression.
    pub compress: Option<i32>,
    /// What is kept of files that are open for writing.
    pub files: FilePolicy,
    /// Kinds of things outside the job that may come back closed or disconnected.
    pub allow: Vec<String>,
    /// All memory is saved, as if there had been no checkpoint before.
    pub full: bool,
    /// How long copying memory may prolong the freeze, in us.
    pub max_pause: u64,
    /// What happens to memory that does not fit.
    pub cow: CopyBeforeWrite,
}

/// How memory that is not copied in the freeze is kept from being overwritten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CopyBeforeWrite {
    /// By what costs the program least, of what the kernel offers.
    #[default]
    Auto,
    /// A BPF program on page faults copies old content.
    Bpf,
    /// Write faults wait until old content is copied.
    Uffd,
    /// The freeze lasts until everything is copied.
    Stop,
}

/// What is kept of files that are open for writing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FilePolicy {
    /// Their content.
    #[default]
    Content,
    /// Their length: they are cut back to it.
    Length,
    /// Nothing.
    None,
}

/// What an agent found out before anything was touched.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanReport {
    /// The job's processes here; none where the job is not on this node.
    pub processes: Vec<ProcessSummary>,
    /// Everything that stands in the way.
    pub blockers: Vec<Blocker>,
    /// What would stand in the way, had it not been allowed by name: it comes back closed or
    /// disconnected.
    pub left_out: Vec<Blocker>,
    /// TCP connections.
    pub connections: Vec<Connection>,
    /// The node's addresses, without those of loopback interfaces.
    pub addresses: Vec<NodeAddress>,
}

/// Something that stands in the way of a dump or a restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// Process, or 0 where it is not about one.
    pub pid: i32,
    /// Name of the process.
    pub process: String,
    /// Which of its things: `fd 17`, `mapping 7f00deadb000`, or nothing.
    pub item: String,
    /// What it is and why that is in the way.
    pub reason: String,
    /// Kind to give to `--allow` that would let it pass, if there is one.
    pub allow: Option<String>,
}

/// One end of a TCP connection, as its owner knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Process that has it.
    pub pid: i32,
    /// Descriptor.
    pub fd: i32,
    /// Own address.
    pub local: SocketAddr,
    /// The other end's.
    pub remote: SocketAddr,
    /// Has the other end sent its FIN? Then it may be gone, and this end still has a meaning.
    pub peer_closed: bool,
    /// Where it stands, once both halves of the cut are done.
    pub position: Option<Position>,
}

/// What is known after the cut.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CutReport {
    /// Time from the first stopped thread to the end of the cut on this node, in us.
    pub us: u64,
    /// The job's processes at the cut.
    pub processes: Vec<ProcessSummary>,
    /// Bytes of memory taken.
    pub bytes: u64,
    /// What comes back closed or disconnected, as allowed.
    pub left_out: Vec<Blocker>,
}

/// What a node has saved.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SaveReport {
    /// Its part, durable.
    pub part: PartRef,
    /// How the memory was saved.
    pub memory: MemoryReport,
}

/// How the memory of a node's processes was saved.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// The checkpoint since which only what was modified is saved; none if all is.
    pub base: Option<BaseRef>,
    /// What took how long on the node.
    pub times: Vec<PhaseTime>,
    /// By process.
    pub processes: Vec<ProcessMemory>,
}
