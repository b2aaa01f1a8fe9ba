//! io_uring(7).

use super::Kind;
use serde::{Deserialize, Serialize};

/// One ring without requests under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IoUring {
    /// Length of the submission queue.
    pub sq_entries: u32,
    /// Length of the completion queue.
    pub cq_entries: u32,
    /// Flags of io_uring_setup(2) to be given again.
    pub flags: u32,
    /// Where the program looks: the words of `struct io_sqring_offsets` and `struct io_cqring_offsets`.
    pub offsets: Vec<u32>,
    /// Requests that were submitted since the ring was made, modulo 2^32; as many were completed.
    pub requests: u32,
    /// Both queues: counters, indexes, and the completions that the program has not taken yet.
    #[serde(with = "serde_bytes")]
    pub rings: Vec<u8>,
    /// The entries of the submission queue.
    #[serde(with = "serde_bytes")]
    pub entries: Vec<u8>,
    /// Registered buffers: address and length in bytes, zeros for an empty place.
    pub buffers: Vec<(u64, u64)>,
}

impl Kind for IoUring {
    const KIND: &'static str = "io-uring";
    const VERSION: u16 = 1;
}
