//! One dump or restore on many nodes: the coordinator, its agents, and how they talk.
//!
//! The sequence of messages is in [`ckpt_common::wire`]. Where a thing is:
//!
//! * [`coordinator`]: the phases of a dump and of a restore, over all nodes
//! * [`agent`]: one node's side, around an [`engine::Engine`]
//! * [`transport`], [`link`]: how an agent is started and asked
//! * [`channels`], [`addresses`]: which connections are inside the job, and where they lead later
//! * [`requests`]: programs that ask for a checkpoint
//! * [`fault`]: faults on purpose, for tests

pub mod addresses;
pub mod agent;
mod awake;
pub mod channels;
pub mod coordinator;
pub mod engine;
pub mod error;
pub mod fault;
pub mod frames;
mod keeping;
pub mod link;
pub mod live;
pub mod requests;
pub mod transport;

pub use error::{ClusterError, Result};
