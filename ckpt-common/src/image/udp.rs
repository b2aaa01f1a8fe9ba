//! UDP sockets.

use super::Kind;
use super::socket::{Address, SocketSettings};
use serde::{Deserialize, Serialize};

/// One UDP socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UdpSocket {
    /// `AF_INET6`, which may speak IPv4 as well.
    pub ipv6: bool,
    /// Address it is bound to, itself or by sending.
    pub local: Option<Address>,
    /// The only address it speaks with.
    pub peer: Option<Address>,
    /// Options and buffers.
    pub settings: SocketSettings,
    /// Received and not read, the oldest first.
    pub received: Vec<Datagram>,
}

impl Kind for UdpSocket {
    const KIND: &'static str = "udp";
    const VERSION: u16 = 1;
}

/// A datagram in a queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Who sent it.
    pub source: Address,
    /// Content.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
}
