//! Unix sockets.

use super::{Kind, file::FileId};
use serde::{Deserialize, Serialize};

/// A Unix socket with its queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub socket_type: i32,
    /// Inode at the checkpoint: how peers refer to each other.
    pub inode: u64,
    /// The bytes of `sun_path`: a path, or an abstract name with its leading NUL.
    #[serde(with = "serde_bytes")]
    pub address: Option<Vec<u8>>,
    /// Permission bits, owner and group of the path.
    pub path_mode: Option<(u32, u32, u32)>,
    /// What it is connected to.
    pub peer: Peer,
    /// `RCV_SHUTDOWN` (1) and `SEND_SHUTDOWN` (2).
    pub shutdown: u8,
    /// Received and not read yet, oldest first.
    pub messages: Vec<Message>,
    /// The other end was closed with something unread in it: the next read behind the messages gives `ECONNRESET`, once.
    #[serde(default)]
    pub reset: bool,
    /// Socket options: (level, name, value).
    pub options: Vec<(i32, i32, Vec<u8>)>,
}

impl Kind for UnixSocket {
    const KIND: &'static str = "unix";
    const VERSION: u16 = 1;
}

/// State of a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Peer {
    /// Not connected.
    None,
    /// Listening, with this backlog.
    Listening {
        /// Length of the queue of connections.
        backlog: u32,
    },
    /// Connected to the socket with this inode.
    Inode(u64),
    /// Connected; the listening socket with this inode has not accepted yet.
    Waiting(u64),
    /// The other end was closed.
    Gone,
    /// Its other end is outside the job; it comes back disconnected.
    Outside,
}

/// A message in a queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Bytes.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
    /// Address of the sender (datagrams).
    #[serde(with = "serde_bytes")]
    pub from: Option<Vec<u8>>,
    /// Descriptors in flight (`SCM_RIGHTS`).
    pub files: Vec<FileId>,
}
