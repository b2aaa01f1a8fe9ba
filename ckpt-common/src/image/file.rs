//! Open file descriptions: what descriptors of one or more processes point to.

use super::Kind;
use serde::{Deserialize, Serialize};

/// Identity of an open file description in one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FileId(pub u32);

/// One open file description. What it is lies in the payload of its kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpenFile {
    /// Identity, referred to by descriptor tables, mappings and queues.
    pub id: FileId,
    /// Status flags of open(2), access mode included (`O_CLOEXEC` is in the descriptor).
    pub flags: i32,
    /// Owner and signal of F_SETOWN / F_SETSIG: (type, pid, signal); zeros where unset.
    pub owner: (i32, i32, i32),
    /// Text of /proc/PID/fd/N, for people.
    pub label: String,
    /// Kind of object: the name of a file in `objects/`.
    pub kind: String,
    /// Version of `payload`.
    pub version: u16,
    /// The object's own state, MessagePack with named fields.
    #[serde(with = "serde_bytes")]
    pub payload: Vec<u8>,
}

impl Kind for OpenFile {
    const KIND: &'static str = "file";
    const VERSION: u16 = 1;
}
