//! What a job is: which processes on which nodes, and where they go at a restart.

pub mod nodes;
pub mod placement;
pub mod scheduler;
pub mod selector;

/// The environment variable that marks the processes of a job.
pub const MARK: &str = "CKPT_JOB";

/// Why a job cannot be made out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// A node list that is none.
    #[error("`{list}` is not a list of nodes: {why}")]
    BadList {
        /// As given.
        list: String,
        /// The rule it breaks.
        why: String,
    },
    /// A placement that cannot be.
    #[error("cannot place the job: {0}")]
    BadPlacement(String),
    /// No process was found.
    #[error("{0}")]
    NoProcess(String),
}
