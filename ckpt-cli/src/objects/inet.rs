//! What TCP and UDP sockets have in common: addresses, options and buffers, both directions.
//!
//! The options are a table. What a socket has in it that a fresh one of its kind has not is
//! recorded; only what is in the table is set again, whatever an image says. Not in it: options
//! that show the state of a connection (`TCP_QUICKACK`, `TCP_WINDOW_CLAMP`), and what the kernel
//! does not give back (multicast memberships).

use crate::network::addresses::AddressMap;
use crate::sys::socket;
use anyhow::{Context, Result};
use ckpt_common::image::socket::{Address, SocketOption, SocketSettings};
use libc::{IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, IPPROTO_UDP, SOL_SOCKET};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, getpeername, getsockname,
};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

/// Options of every Internet socket.
const COMMON: &[(i32, i32)] = &[
    (SOL_SOCKET, libc::SO_REUSEPORT),
    (SOL_SOCKET, libc::SO_BINDTODEVICE),
    (SOL_SOCKET, libc::SO_MARK),
    (SOL_SOCKET, libc::SO_PRIORITY),
    (SOL_SOCKET, libc::SO_KEEPALIVE),
    (SOL_SOCKET, libc::SO_OOBINLINE),
    (SOL_SOCKET, libc::SO_BROADCAST),
    (SOL_SOCKET, libc::SO_DONTROUTE),
    (SOL_SOCKET, libc::SO_LINGER),
    (SOL_SOCKET, libc::SO_RCVLOWAT),
    (SOL_SOCKET, libc::SO_RCVTIMEO),
    (SOL_SOCKET, libc::SO_SNDTIMEO),
    (SOL_SOCKET, libc::SO_TIMESTAMP),
    (SOL_SOCKET, libc::SO_TIMESTAMPNS),
    (SOL_SOCKET, libc::SO_TIMESTAMPING),
    (SOL_SOCKET, libc::SO_NO_CHECK),
    (SOL_SOCKET, libc::SO_RXQ_OVFL),
    (SOL_SOCKET, libc::SO_BUSY_POLL),
    (SOL_SOCKET, libc::SO_MAX_PACING_RATE),
    (SOL_SOCKET, libc::SO_ZEROCOPY),
    (SOL_SOCKET, libc::SO_PEEK_OFF),
    (IPPROTO_IP, libc::IP_TOS),
    (IPPROTO_IP, libc::IP_TTL),
    (IPPROTO_IP, libc::IP_MINTTL),
    (IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (IPPROTO_IP, libc::IP_RECVERR),
    (IPPROTO_IP, libc::IP_PKTINFO),
    (IPPROTO_IP, libc::IP_RECVTTL),
    (IPPROTO_IP, libc::IP_RECVTOS),
    (IPPROTO_IP, libc::IP_RECVORIGDSTADDR),
    (IPPROTO_IP, libc::IP_FREEBIND),
    (IPPROTO_IP, libc::IP_TRANSPARENT),
    (IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
];

/// Options of IPv6 sockets.
const IPV6: &[(i32, i32)] = &[
    (IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (IPPROTO_IPV6, libc::IPV6_TCLASS),
    (IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (IPPROTO_IPV6, libc::IPV6_DONTFRAG),
    (IPPROTO_IPV6, libc::IPV6_RECVERR),
    (IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (IPPROTO_IPV6, libc::IPV6_RECVORIGDSTADDR),
    (IPPROTO_IPV6, libc::IPV6_FREEBIND),
    (IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
];

/// Options of TCP sockets.
const TCP: &[(i32, i32)] = &[
    (IPPROTO_TCP, libc::TCP_NODELAY),
    (IPPROTO_TCP, libc::TCP_CORK),
    (IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (IPPROTO_TCP, libc::TCP_KEEPCNT),
    (IPPROTO_TCP, libc::TCP_SYNCNT),
    (IPPROTO_TCP, libc::TCP_LINGER2),
    (IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    (IPPROTO_TCP, libc::TCP_CONGESTION),
    (IPPROTO_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS),
    (IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    (IPPROTO_TCP, libc::TCP_FASTOPEN),
    (IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT),
    (IPPROTO_TCP, TCP_INQ),
];
/// linux/tcp.h; not in the libc crate.
const TCP_INQ: i32 = 36;

/// Options of UDP sockets. (TCP keeps in the first what it saw in the other end's SYN.)
const UDP: &[(i32, i32)] = &[
    (IPPROTO_IP, libc::IP_MULTICAST_TTL),
    (IPPROTO_IP, libc::IP_MULTICAST_LOOP),
    (IPPROTO_IP, libc::IP_MULTICAST_ALL),
    (IPPROTO_UDP, libc::UDP_CORK),
    (IPPROTO_UDP, UDP_SEGMENT),
    (IPPROTO_UDP, UDP_GRO),
];
/// Options of UDP sockets for IPv6.
const UDP6: &[(i32, i32)] = &[
    (IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
    (IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP),
    (IPPROTO_IPV6, libc::IPV6_MULTICAST_ALL),
];
/// linux/udp.h.
const UDP_SEGMENT: i32 = 103;
const UDP_GRO: i32 = 104;
/// asm-generic/socket.h, since Linux 5.14.
const SO_BUF_LOCK: i32 = 72;
/// What `SO_BUF_LOCK` means: the sizes are the program's own and not tuned by the kernel.
const BUFFER_LOCKS: u32 = 3;
/// Largest buffer that is asked for, in bytes.
const MAX_BUFFER: u32 = 1 << 30;

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// A fresh socket, close-on-exec.
    ///
    /// # Errors
    /// No IPv6 here, or no descriptors left.
    pub fn socket(self, ipv6: bool) -> Result<OwnedFd> {
        let family = if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let (kind, protocol) = match self {
            Self::Tcp => (SockType::Stream, SockProtocol::Tcp),
            Self::Udp => (SockType::Datagram, SockProtocol::Udp),
        };
        nix::sys::socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol)
            .with_context(|| format!("create a {self:?} socket for {}", if ipv6 { "IPv6" } else { "IPv4" }))
    }

    fn table(self, ipv6: bool) -> impl Iterator<Item = (i32, i32)> {
        let six: &[_] = if ipv6 { IPV6 } else { &[] };
        let (own, own_six): (&[_], &[_]) = match self {
            Self::Tcp => (TCP, &[]),
            Self::Udp => (UDP, if ipv6 { UDP6 } else { &[] }),
        };
        COMMON.iter().chain(six).chain(own).chain(own_six).copied()
    }
}

/// Is it an IPv6 socket? `None`: it is of no Internet family.
///
/// # Errors
/// Not a socket.
pub fn is_ipv6(fd: BorrowedFd<'_>) -> io::Result<Option<bool>> {
    match socket::get::<i32>(fd, SOL_SOCKET, libc::SO_DOMAIN)? {
        libc::AF_INET => Ok(Some(false)),
        libc::AF_INET6 => Ok(Some(true)),
        _ => Ok(None),
    }
}

/// Has the socket a filter program (`SO_ATTACH_FILTER`)? It could not be put back.
pub fn has_filter(fd: BorrowedFd<'_>) -> bool {
    // For an empty buffer the kernel tells the number of instructions; for an eBPF program, EACCES.
    socket::get_into(fd, SOL_SOCKET, libc::SO_ATTACH_FILTER, &mut []).map_or(true, |length| length > 0)
}

/// The address the socket is bound to.
///
/// # Errors
/// Not a socket of an Internet family.
pub fn local(fd: BorrowedFd<'_>) -> io::Result<Option<Address>> {
    let address = convert(getsockname(fd.as_raw_fd())?)?;
    Ok(Some(address).filter(|address| address.port != 0))
}

/// The address the socket is connected with.
///
/// # Errors
/// Not a socket of an Internet family.
pub fn peer(fd: BorrowedFd<'_>) -> io::Result<Option<Address>> {
    match getpeername(fd.as_raw_fd()) {
        Ok(address) => convert(address).map(Some),
        Err(Errno::ENOTCONN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// An address as the kernel gives it.
///
/// # Errors
/// It is of another family.
pub fn convert(address: SockaddrStorage) -> io::Result<Address> {
    let four = address.as_sockaddr_in().map(|four| SocketAddr::from(std::net::SocketAddrV4::from(*four)));
    let six = address.as_sockaddr_in6().map(|six| SocketAddr::from(std::net::SocketAddrV6::from(*six)));
    let address = four.or(six).ok_or_else(|| io::Error::other("not an Internet address"))?;
    Ok(address.into())
}

/// An address as bind(2) and connect(2) want it.
pub fn storage(address: Address) -> SockaddrStorage {
    SockaddrStorage::from(SocketAddr::from(address))
}

/// Reads all settings of a socket.
///
/// # Errors
/// The kernel's; an option that this kernel does not have is none.
pub fn capture(fd: BorrowedFd<'_>, protocol: Protocol, ipv6: bool) -> Result<SocketSettings> {
    let mut options = Vec::new();
    for ((level, name), fresh) in protocol.table(ipv6).zip(fresh(protocol, ipv6)?) {
        let value = read(fd, level, name).with_context(|| format!("socket option {level}/{name}"))?;
        if value != *fresh {
            options.extend(value.map(|value| SocketOption { level, name, value }));
        }
    }
    let number = |name| socket::get::<i32>(fd, SOL_SOCKET, name).map(i32::cast_unsigned);
    Ok(SocketSettings {
        options,
        reuse_address: number(libc::SO_REUSEADDR)? == 1,
        send_buffer: number(libc::SO_SNDBUF)?,
        receive_buffer: number(libc::SO_RCVBUF)?,
        buffer_locks: number(SO_BUF_LOCK)? & BUFFER_LOCKS,
    })
}

/// Values of all options in the table of a fresh socket, read once per kind of socket.
fn fresh(protocol: Protocol, ipv6: bool) -> Result<&'static [Option<Vec<u8>>]> {
    static FRESH: [OnceLock<Vec<Option<Vec<u8>>>>; 4] = [const { OnceLock::new() }; 4];
    let cell = &FRESH[usize::from(protocol == Protocol::Udp) * 2 + usize::from(ipv6)];
    if let Some(values) = cell.get() {
        return Ok(values);
    }
    let socket = protocol.socket(ipv6)?;
    let values: io::Result<Vec<_>> =
        protocol.table(ipv6).map(|(level, name)| read(socket.as_fd(), level, name)).collect();
    let values = values.with_context(|| format!("options of a fresh {protocol:?} socket"))?;
    Ok(cell.get_or_init(|| values))
}

/// Value of an option; `None` where the kernel or this kind of socket has none.
fn read(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = [0; 64];
    match socket::get_into(fd, level, name, &mut buffer) {
        // The buffer for a name may be longer than the name.
        Ok(length) if name == libc::TCP_CONGESTION && level == IPPROTO_TCP => {
            Ok(buffer[..length].split(|byte| *byte == 0).next().map(<[u8]>::to_vec))
        }
        Ok(length) => Ok(Some(buffer[..length].to_vec())),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP | libc::EINVAL) => Ok(None),
            _ => Err(error),
        },
    }
}

/// Sets the options of a fresh socket, before it is bound. Buffers come with [`apply_buffers`].
///
/// # Errors
/// An option that is not in the table, or one that cannot be set here, such as a network interface
/// that this node does not have.
pub fn apply(fd: BorrowedFd<'_>, protocol: Protocol, ipv6: bool, settings: &SocketSettings) -> Result<()> {
    set_reuse(fd, settings.reuse_address)?;
    for option in &settings.options {
        let SocketOption { level, name, value } = option;
        if !protocol.table(ipv6).any(|known| known == (*level, *name)) {
            anyhow::bail!("the image has a socket option {level}/{name} that this version does not know");
        }
        match socket::set(fd, *level, *name, value.as_slice()) {
            Ok(()) => {}
            Err(error) if (*level, *name) == (IPPROTO_TCP, libc::TCP_CONGESTION) => {
                // How fast, not what: the node's own choice is as good.
                let wanted = String::from_utf8_lossy(value);
                tracing::warn!(
                    "congestion control {wanted} is not available here ({error}): using the default"
                );
            }
            Err(error) => {
                let text = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned();
                let what = if (*level, *name) == (SOL_SOCKET, libc::SO_BINDTODEVICE) {
                    format!("bind a socket to network interface {text}")
                } else {
                    format!("set socket option {level}/{name} to {value:?}")
                };
                return Err(error).context(what);
            }
        }
    }
    Ok(())
}

/// Sets `SO_REUSEADDR`.
///
/// # Errors
/// The kernel's.
pub fn set_reuse(fd: BorrowedFd<'_>, reuse: bool) -> Result<()> {
    socket::set(fd, SOL_SOCKET, libc::SO_REUSEADDR, &i32::from(reuse)).context("set SO_REUSEADDR")
}

/// Sets the buffer sizes, above the system's limits too, and whether the kernel may tune them.
///
/// # Errors
/// No CAP_NET_ADMIN.
pub fn apply_buffers(fd: BorrowedFd<'_>, settings: &SocketSettings) -> Result<()> {
    set_buffers(fd, settings.send_buffer, settings.receive_buffer)?;
    socket::set(fd, SOL_SOCKET, SO_BUF_LOCK, &(settings.buffer_locks & BUFFER_LOCKS))
        .context("set SO_BUF_LOCK")
}

/// Sets buffers of at least this size, in bytes as the kernel counts them (overhead included).
///
/// # Errors
/// No CAP_NET_ADMIN.
pub fn set_buffers(fd: BorrowedFd<'_>, send: u32, receive: u32) -> Result<()> {
    for (name, size) in [(libc::SO_SNDBUFFORCE, send), (libc::SO_RCVBUFFORCE, receive)] {
        // The kernel doubles what it is given.
        let half = i32::try_from(size.min(MAX_BUFFER) / 2)?;
        socket::set(fd, SOL_SOCKET, name, &half)
            .with_context(|| format!("set a socket buffer of {size} bytes"))?;
    }
    Ok(())
}

/// Binds to where an address is now.
///
/// # Errors
/// The port is taken, or the address is not one of this node; the message says which.
pub fn bind(fd: BorrowedFd<'_>, address: Address, map: &AddressMap) -> Result<()> {
    let new = map.address(address);
    nix::sys::socket::bind(fd.as_raw_fd(), &storage(new)).with_context(|| {
        if new == address {
            format!("bind a socket to {new}")
        } else {
            format!("bind a socket of {address} to {new}")
        }
    })
}
