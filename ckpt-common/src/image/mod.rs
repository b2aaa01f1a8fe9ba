//! What outlives the run: the records of an image.
//!
//! A checkpoint is one manifest and, per node, one *part*: a sequence of records (kind, version,
//! payload) and the page maps that point into packs. A payload is MessagePack with named fields,
//! so a field can be added without breaking older readers.

pub mod digest;
pub mod error;
pub mod file;
pub mod io_uring;
pub mod manifest;
pub mod objects;
pub mod pack;
pub mod pages;
pub mod part;
pub mod process;
pub mod record;
pub mod unix;

pub use digest::Digest;
pub use error::FormatError;
pub mod socket;
pub mod tcp;
pub mod udp;

use serde::{Serialize, de::DeserializeOwned};

/// Size of a page in bytes. Checkpoints are only taken on machines with this page size (x86-64).
pub const PAGE_SIZE: usize = 4096;

/// A type that is stored as a record of its own.
pub trait Kind: Serialize + DeserializeOwned {
    /// Name of the kind in the image, such as `process`.
    const KIND: &'static str;
    /// Version of the payload. A reader refuses versions above its own.
    const VERSION: u16;
    /// Must a reader that does not know the kind refuse the image?
    const REQUIRED: bool = true;
}

/// Identity of a memory object in one part: the address space of a process, a shared memory
/// object, the content of a deleted file. Its pages are numbered from zero (address or offset
/// divided by [`PAGE_SIZE`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct MemoryId(pub u32);
