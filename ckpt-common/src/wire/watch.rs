//! Messages of a watch over a job.

use super::Selector;
use serde::{Deserialize, Serialize};

/// Where programs ask for a checkpoint, on each node: a socket `JOB.sock`. Only root makes sockets there.
pub const REQUEST_DIRECTORY: &str = "/run/ckpt-request";

/// What to watch on one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchTask {
    /// Name of the job in the store, after which the socket for requests is called.
    pub job: String,
    /// Its processes: they may ask for checkpoints.
    pub selector: Selector,
}

/// The answer to somebody who has asked for a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Number of the request, as in [`Awaited`].
    pub request: u64,
    /// One line, without its end.
    pub line: String,
}

/// What has happened on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awaited {
    /// Requests for a checkpoint since the last answer.
    pub requests: Vec<u64>,
    /// Does any process of the job run here?
    pub running: bool,
}
