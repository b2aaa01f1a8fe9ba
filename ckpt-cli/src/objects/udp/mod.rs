//! UDP sockets: addresses, options, and the datagrams that were received and not read.
//!
//! Datagrams on the wire at the cut may be lost, as UDP allows. What lies in a receive queue is kept
//! with its sender's address. Not kept: what `IP_PKTINFO` would tell of it, and memberships in
//! multicast groups, which the kernel does not tell.

mod packet;

use super::inet::{self, Protocol};
use crate::network::addresses::AddressMap;
use crate::sys::socket;
use anyhow::{Context, Result, bail};
use ckpt_common::image::socket::{Address, SocketSettings};
use ckpt_common::image::udp::{Datagram, UdpSocket};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, recvmsg, sendto,
};
use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Largest datagram, with room to spare.
const MAX_DATAGRAM: usize = 1 << 16;
/// Most datagrams that are read from one queue. The kernel's limit on memory is reached earlier.
const MAX_DATAGRAMS: usize = 1 << 20;
/// How long this node may take to deliver a datagram to itself.
const PATIENCE: Duration = Duration::from_secs(5);

/// Captures a UDP socket of a frozen process. It is left as it was.
///
/// # Errors
/// Not a UDP socket, or one with a BPF filter.
pub fn capture(fd: BorrowedFd<'_>) -> Result<UdpSocket> {
    let protocol: i32 = socket::get(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL).context("SO_PROTOCOL")?;
    if protocol != libc::IPPROTO_UDP {
        bail!("a datagram socket of protocol {protocol} is not UDP");
    }
    if inet::has_filter(fd) {
        bail!("a UDP socket with a BPF filter cannot be saved");
    }
    let ipv6 = inet::is_ipv6(fd).context("SO_DOMAIN")?.context("not an Internet socket")?;
    Ok(UdpSocket {
        ipv6,
        local: inet::local(fd).context("getsockname")?,
        peer: inet::peer(fd).context("getpeername")?,
        settings: inet::capture(fd, Protocol::Udp, ipv6)?,
        received: peek_all(fd)?,
    })
}

/// Reads all datagrams of a queue and leaves them in it: each peek starts where the one before ended
/// (`SO_PEEK_OFF`, socket(7)). The kernel shows an empty datagram in this way only once: a second
/// capture does not find it if it is still there.
fn peek_all(fd: BorrowedFd<'_>) -> Result<Vec<Datagram>> {
    if socket::events(fd, libc::POLLIN).context("poll a socket")? & libc::POLLIN == 0 {
        return Ok(Vec::new());
    }
    let before: i32 = socket::get(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF).context("SO_PEEK_OFF")?;
    socket::set(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &0).context("set SO_PEEK_OFF")?;
    let datagrams = peek_each(fd);
    socket::set(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &before).context("restore SO_PEEK_OFF")?;
    datagrams
}

fn peek_each(fd: BorrowedFd<'_>) -> Result<Vec<Datagram>> {
    let mut datagrams = Vec::new();
    let mut buffer = vec![0; MAX_DATAGRAM];
    while datagrams.len() < MAX_DATAGRAMS {
        let mut pieces = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let (length, source) = match recvmsg::<SockaddrStorage>(fd.as_raw_fd(), &mut pieces, None, flags) {
            Ok(message) => (message.bytes, message.address),
            Err(Errno::EAGAIN) => return Ok(datagrams),
            // What an earlier datagram met on its way comes first, once, and is not of the queue.
            Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EMSGSIZE) => continue,
            Err(error) => return Err(error).context("read a UDP queue"),
        };
        let source = inet::convert(source.context("a datagram without a sender")?).context("sender")?;
        datagrams.push(Datagram { source, data: buffer[..length].to_vec() });
    }
    bail!("a UDP queue does not end after {MAX_DATAGRAMS} datagrams")
}

/// Makes the socket of a record, with new addresses, its queue included. It speaks from then on.
///
/// # Errors
/// An address or port that cannot be had here, an option that cannot be set, or a datagram that does
/// not arrive in the queue.
pub fn rebuild(record: &UdpSocket, map: &AddressMap) -> Result<OwnedFd> {
    let fd = Protocol::Udp.socket(record.ipv6)?;
    // An interface would keep out what comes from this node itself, and GRO would merge it.
    let (late, early) = record.settings.options.iter().cloned().partition(|option| {
        matches!(
            (option.level, option.name),
            (libc::SOL_SOCKET, libc::SO_BINDTODEVICE) | (libc::IPPROTO_UDP, _)
        )
    });
    let with = |options| SocketSettings { options, ..record.settings.clone() };
    inet::apply(fd.as_fd(), Protocol::Udp, record.ipv6, &with(early))?;
    if let Some(local) = record.local {
        inet::bind(fd.as_fd(), local, map)?;
        requeue(fd.as_fd(), local, &record.received, map).with_context(|| {
            format!("put {} datagrams back into the queue of {local}", record.received.len())
        })?;
    }
    if let Some(peer) = record.peer {
        let peer = map.address(peer);
        connect(fd.as_raw_fd(), &inet::storage(peer))
            .with_context(|| format!("connect a UDP socket to {peer}"))?;
    }
    inet::apply(fd.as_fd(), Protocol::Udp, record.ipv6, &with(late))?;
    inet::apply_buffers(fd.as_fd(), &record.settings)?;
    Ok(fd)
}

/// Sends the datagrams again, under their senders' addresses, from this node to itself.
fn requeue(fd: BorrowedFd<'_>, local: Address, datagrams: &[Datagram], map: &AddressMap) -> Result<()> {
    if datagrams.is_empty() {
        return Ok(());
    }
    let memory: usize = datagrams.iter().map(|datagram| 4 * datagram.data.len() + 4096).sum();
    inet::set_buffers(fd, 0, u32::try_from(memory).unwrap_or(u32::MAX))?;
    let local = map.address(local).canonical();
    let mut sockets = [None, None];
    for datagram in datagrams {
        let source = map.address(datagram.source).canonical();
        let target = Address { ip: own_address(local.ip, source.ip), ..local };
        let packet = packet::build(source, target, &datagram.data).context("a datagram too large for UDP")?;
        let socket = match &mut sockets[usize::from(source.ip.is_ipv6())] {
            Some(socket) => socket,
            none => none.insert(raw_socket(source.ip.is_ipv6())?),
        };
        // The port of a raw socket's address is a protocol; 0 is the socket's own.
        let to = inet::storage(Address { port: 0, ..target });
        let before = queued(fd)?;
        sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty())
            .with_context(|| format!("send a datagram of {source} to {target}"))?;
        // Nothing but waiting keeps them in order where the kernel puts off a delivery.
        let deadline = Instant::now() + PATIENCE;
        while queued(fd)? <= before {
            if Instant::now() > deadline {
                bail!("a datagram of {source} to {target} does not arrive");
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    Ok(())
}

/// Memory that the datagrams in the receive queue take, in bytes: more with each of them.
fn queued(fd: BorrowedFd<'_>) -> Result<u32> {
    let numbers: [u32; 9] = socket::get(fd, libc::SOL_SOCKET, libc::SO_MEMINFO).context("SO_MEMINFO")?;
    Ok(numbers[0])
}

/// An address of this node under which a socket bound to `local` hears from `source`.
fn own_address(local: IpAddr, source: IpAddr) -> IpAddr {
    match (local.is_unspecified() || local.is_ipv4() != source.is_ipv4(), source) {
        (false, _) => local,
        (true, IpAddr::V4(_)) => Ipv4Addr::LOCALHOST.into(),
        (true, IpAddr::V6(_)) => Ipv6Addr::LOCALHOST.into(),
    }
}

/// A socket that sends packets as they are, headers included (raw(7)).
fn raw_socket(ipv6: bool) -> Result<OwnedFd> {
    let family = if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    nix::sys::socket::socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)
        .context("create a raw socket\nhint: CAP_NET_RAW is needed")
}
