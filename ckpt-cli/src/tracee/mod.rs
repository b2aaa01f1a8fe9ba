//! ptrace as types.
//!
//! [`freeze::Frozen`] is a tree of processes whose threads are all [`Stopped`]. Memory and registers can be
//! touched only through a stopped thread; dropping one gives it its own registers and signal mask back and lets
//! it run on. A tracee that dies in the middle is an error value ([`TraceeError::Died`]), not a surprise.

pub mod batch;
pub mod freeze;
pub mod healing;
pub mod mapping_flags;
pub mod proc;
pub mod registers;
pub mod rings;
mod stopped;

pub use batch::{Arena, Batch, Done};
pub use stopped::Stopped;

use std::io;

/// Why something could not be done to a tracee.
#[derive(Debug, thiserror::Error)]
pub enum TraceeError {
    /// A ptrace request or memory access was refused.
    #[error("{what} failed for thread {tid}: {source}")]
    Request {
        /// What was tried.
        what: &'static str,
        /// On which thread.
        tid: i32,
        /// The system's reason.
        source: io::Error,
    },
    /// The thread ended while it was traced.
    #[error("thread {tid} ended while it was traced (wait status {status:#x})")]
    Died {
        /// Which thread.
        tid: i32,
        /// Status as wait(2) gives it.
        status: i32,
    },
    /// The thread did not stop in time.
    #[error("thread {tid} did not stop within {seconds} s: it waits uninterruptibly in {place}")]
    Stuck {
        /// Which thread.
        tid: i32,
        /// How long was waited.
        seconds: u64,
        /// Kernel function or system call, as far as known.
        place: String,
    },
    /// A batch hit a fault.
    #[error("remote batch in thread {tid} was ended by signal {signal} at call {call}")]
    Fault {
        /// Which thread.
        tid: i32,
        /// The signal.
        signal: i32,
        /// Index of the call under way.
        call: usize,
    },
    /// A call of a batch failed.
    #[error("{what} failed in thread {tid}: {source}")]
    Call {
        /// What was tried.
        what: String,
        /// Where.
        tid: i32,
        /// Its error.
        source: io::Error,
    },
    /// What is needed to run a call in the target was not found.
    #[error("process {pid}: {reason}")]
    Unfit {
        /// Which process.
        pid: i32,
        /// What is missing.
        reason: &'static str,
    },
}

impl TraceeError {
    /// Adapter for `map_err`: names the operation and the thread.
    pub fn request(what: &'static str, tid: i32) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Request { what, tid, source }
    }
}

/// Result of an operation on a tracee.
pub type Result<T, E = TraceeError> = std::result::Result<T, E>;
