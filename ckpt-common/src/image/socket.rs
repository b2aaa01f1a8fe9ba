//! What sockets of the Internet families have in common.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

/// Address and port of one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Address {
    /// Address as the socket has it: an IPv6 socket that speaks IPv4 has a mapped one.
    pub ip: IpAddr,
    /// Port.
    pub port: u16,
    /// Interface number of a link-local IPv6 address, else 0.
    pub scope: u32,
}

impl Address {
    /// The same, with an IPv4-mapped address as plain IPv4: what is on the wire.
    #[must_use]
    pub fn canonical(self) -> Self {
        Self { ip: self.ip.to_canonical(), ..self }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        let scope = match address {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(six) => six.scope_id(),
        };
        Self { ip: address.ip(), port: address.port(), scope }
    }
}

impl From<Address> for SocketAddr {
    fn from(address: Address) -> Self {
        match address.ip {
            IpAddr::V4(ip) => Self::from((ip, address.port)),
            IpAddr::V6(ip) => SocketAddrV6::new(ip, address.port, 0, address.scope).into(),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::from(self.canonical()).fmt(f)
    }
}

/// A socket option with a value other than a fresh socket's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// Level of setsockopt(2).
    pub level: i32,
    /// Number of the option.
    pub name: i32,
    /// Value as the kernel gives it.
    #[serde(with = "serde_bytes")]
    pub value: Vec<u8>,
}

/// Everything set on a socket that is not its connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketSettings {
    /// Options other than those below.
    pub options: Vec<SocketOption>,
    /// `SO_REUSEADDR`.
    pub reuse_address: bool,
    /// `SO_SNDBUF` as the kernel gives it (twice what was asked for), in bytes.
    pub send_buffer: u32,
    /// `SO_RCVBUF`, likewise.
    pub receive_buffer: u32,
    /// `SO_BUF_LOCK`: which of the two were set by the program and are not tuned by the kernel.
    pub buffer_locks: u32,
}
