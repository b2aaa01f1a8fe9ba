//! Messages of a restore.

use super::Blocker;
use crate::image::{
    manifest::{NodeAddress, PartRef},
    tcp::{Position, TcpSocket},
};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// What a restore is to do on one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RestoreTask {
    /// Path of the store on the node.
    pub store: String,
    /// The part to bring back.
    pub part: PartRef,
    /// How.
    pub options: RestoreOptions,
}

/// Options of a restore that an agent must know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreOptions {
    /// Which PIDs the processes get.
    pub pids: PidPolicy,
    /// Do the processes run before their memory is complete?
    pub lazy: bool,
    /// Where standard streams go that led out of the job.
    pub stdio: Stdio,
    /// Kinds of things outside the job that may come back closed or disconnected: as at the dump.
    pub allow: Vec<String>,
}

/// Which PIDs restored processes get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PidPolicy {
    /// The same as before; where they are taken, the restore fails.
    Same,
    /// The same as before, in a PID namespace of their own.
    Namespace,
    /// The same as before; in a PID namespace where they are taken.
    #[default]
    Auto,
}

/// Where standard streams go that led out of the job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stdio {
    /// Input from /dev/null, output appended to files in this directory.
    Log(String),
    /// To those of this process (the coordinator, on the same machine).
    Inherit {
        /// Its PID.
        pid: u32,
    },
    /// To /dev/null.
    Null,
}

/// What an agent found out before anything was built.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// Everything that stands in the way.
    pub blockers: Vec<Blocker>,
    /// The node's addresses, without those of loopback interfaces.
    pub addresses: Vec<NodeAddress>,
    /// Connections whose other end has said that it is finished: it may have been closed, and then a
    /// stand-in must say so again, on the node that has its address.
    pub finished: Vec<StandIn>,
}

/// The other end of a connection, which no process has any more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StandIn {
    /// What is to be rebuilt in its place.
    pub socket: TcpSocket,
    /// Where the end that lives on stands.
    pub peer: Position,
}

/// How the job's connections find each other again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NetworkTask {
    /// For each address of a node at the dump, the address of the node that takes its place.
    pub addresses: Vec<(IpAddr, IpAddr)>,
    /// For each end, on this node, of a connection inside the job: where the other end stands, in
    /// addresses of the dump.
    pub peers: Vec<Position>,
    /// Ends of connections that this node builds for others, and closes.
    pub stand_ins: Vec<StandIn>,
}
