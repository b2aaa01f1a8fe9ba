//! From a duplicate of a target's descriptor to a record.

use super::info::{Info, state};
use super::repair::{Queue, Repair};
use crate::objects::inet::{self, Protocol};
use crate::sys::socket;
use anyhow::{Context, Result, anyhow};
use ckpt_common::image::socket::Address;
use ckpt_common::image::tcp::{Receiving, Sending, Stream, TcpSocket, TcpState, distance};
use libc::{POLLERR, POLLPRI, POLLRDHUP};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;

/// `SO_PROTOCOL` of an MPTCP socket.
const IPPROTO_MPTCP: i32 = 262;
/// linux/tcp.h.
const TCP_ULP: i32 = 31;
/// How often a receive queue is read until nothing arrives in between.
const ATTEMPTS: usize = 100;

/// Why a TCP socket is not captured.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// Multipath TCP keeps its state where nobody can read it.
    #[error("a multipath TCP socket cannot be saved from outside")]
    Multipath,
    /// Urgent data hides what comes after it.
    #[error("a TCP socket with unread urgent data cannot be saved")]
    Urgent,
    /// Another protocol sits on the socket, such as kernel TLS.
    #[error("a TCP socket with the upper protocol {0} cannot be saved")]
    UpperProtocol(String),
    /// A socket filter; its program cannot be put back.
    #[error("a TCP socket with a BPF filter cannot be saved")]
    Filter,
    /// Connections that the program has not accepted yet. Passes as soon as it has.
    #[error("{0} connections wait to be accepted by the program")]
    Backlog(u32),
    /// In the middle of a handshake. Passes by itself.
    #[error("a TCP connection is being made at this moment")]
    Handshake,
    /// Data keeps arriving: the other end is not frozen and not held.
    #[error("a TCP connection does not stand still: its other end still sends")]
    Moving,
    /// A system call failed.
    #[error(transparent)]
    System(#[from] anyhow::Error),
}

impl CaptureError {
    /// The same capture, made a little later, may succeed.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Backlog(_) | Self::Handshake | Self::Moving)
    }
}

/// A socket of which everything is captured but what it receives.
#[derive(Debug)]
pub struct Half {
    socket: TcpSocket,
}

/// Captures a TCP socket of a frozen process. It is left as it was; its traffic is to be held.
///
/// # Errors
/// See [`CaptureError`].
pub fn capture(fd: BorrowedFd<'_>) -> Result<TcpSocket, CaptureError> {
    capture_sending(fd)?.receiving(fd)
}

/// Captures the first half. Where no traffic is held: the second half, [`Half::receiving`], only after
/// this was done for the other ends of all connections.
///
/// # Errors
/// See [`CaptureError`].
pub fn capture_sending(fd: BorrowedFd<'_>) -> Result<Half, CaptureError> {
    refuse(fd)?;
    let ipv6 = inet::is_ipv6(fd).context("SO_DOMAIN")?.context("not an Internet socket")?;
    let settings = inet::capture(fd, Protocol::Tcp, ipv6)?;
    let local = inet::local(fd).context("getsockname")?;
    let info = Info::of(fd).context("TCP_INFO")?;
    let state = match info.state {
        state::LISTEN if info.waiting > 0 => return Err(CaptureError::Backlog(info.waiting)),
        state::LISTEN => TcpState::Listening { backlog: info.backlog },
        state::SYN_SENT => TcpState::Connecting { peer: connecting_peer(fd)? },
        state::CLOSE => closed(fd, settings.reuse_address)?,
        state::ESTABLISHED | state::CLOSE_WAIT | state::LAST_ACK | state::CLOSING => {
            TcpState::Connected(Box::new(stream(fd, settings.reuse_address)?))
        }
        state::FIN_WAIT_1 | state::FIN_WAIT_2 => {
            TcpState::Connected(Box::new(stream(fd, settings.reuse_address)?))
        }
        _ => return Err(CaptureError::Handshake),
    };
    Ok(Half { socket: TcpSocket { ipv6, local, settings, state } })
}

impl Half {
    /// Captures the second half: what has been received.
    ///
    /// # Errors
    /// See [`CaptureError`].
    pub fn receiving(mut self, fd: BorrowedFd<'_>) -> Result<TcpSocket, CaptureError> {
        let TcpState::Connected(stream) = &mut self.socket.state else { return Ok(self.socket) };
        let repair = Repair::enter(fd, self.socket.settings.reuse_address)?;
        for _ in 0..ATTEMPTS {
            let before = (Info::of(fd).context("TCP_INFO")?, repair.end(Queue::Receive)?);
            let queue = repair.peek(Queue::Receive, socket::input_queue(fd).context("SIOCINQ")?)?;
            let window = repair.window()?;
            let after = (Info::of(fd).context("TCP_INFO")?, repair.end(Queue::Receive)?);
            if before != after {
                continue;
            }
            let (info, end) = after;
            if info.state == state::CLOSE {
                // Both ends were finished and everything has arrived since the first half.
                let received = queue;
                self.socket.state = TcpState::Ended { received, error: has(fd, POLLERR)? };
                repair.leave()?;
                return Ok(self.socket);
            }
            let finished = info.peer_finished();
            stream.receiving = Receiving {
                next: end.wrapping_sub(finished.into()),
                shut: !finished && has(fd, POLLRDHUP)?,
                queue,
                finished,
            };
            stream.window.receive = window.receive;
            stream.window.announced_at = window.announced_at;
            repair.leave()?;
            return Ok(self.socket);
        }
        Err(CaptureError::Moving)
    }
}

/// Makes a socket whose job is being stopped silent: when its last descriptor is closed, nothing is
/// sent to the other end. Only for a process that will never run again.
///
/// # Errors
/// No CAP_NET_ADMIN.
pub fn silence(fd: BorrowedFd<'_>) -> Result<()> {
    if Info::of(fd).context("TCP_INFO")?.state != state::LISTEN {
        Repair::enter(fd, false)?.stay();
    }
    Ok(())
}

fn refuse(fd: BorrowedFd<'_>) -> Result<(), CaptureError> {
    let protocol: i32 = socket::get(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL).context("SO_PROTOCOL")?;
    match protocol {
        libc::IPPROTO_TCP => {}
        IPPROTO_MPTCP => return Err(CaptureError::Multipath),
        other => return Err(anyhow!("a stream socket of protocol {other} is not TCP").into()),
    }
    let mut name = [0; 16];
    let length = socket::get_into(fd, libc::IPPROTO_TCP, TCP_ULP, &mut name).unwrap_or(0);
    let name = name[..length].split(|byte| *byte == 0).next().unwrap_or_default();
    if !name.is_empty() {
        return Err(CaptureError::UpperProtocol(String::from_utf8_lossy(name).into_owned()));
    }
    if inet::has_filter(fd) {
        return Err(CaptureError::Filter);
    }
    if has(fd, POLLPRI)? {
        return Err(CaptureError::Urgent);
    }
    Ok(())
}

/// Does poll(2) show this event now?
fn has(fd: BorrowedFd<'_>, event: i16) -> Result<bool> {
    Ok(socket::events(fd, event).context("poll a socket")? & event != 0)
}

/// A socket in the state CLOSE: a fresh one, or one whose connection has ended.
fn closed(fd: BorrowedFd<'_>, reuse_address: bool) -> Result<TcpState> {
    if !has(fd, POLLRDHUP)? {
        return Ok(TcpState::Unconnected);
    }
    let length = socket::input_queue(fd).context("SIOCINQ")?;
    let received = if length == 0 {
        Vec::new()
    } else {
        let repair = Repair::enter(fd, reuse_address)?;
        let received = repair.peek(Queue::Receive, length)?;
        repair.leave()?;
        received
    };
    Ok(TcpState::Ended { received, error: has(fd, POLLERR)? })
}

/// Everything of a connection but its receiving direction.
fn stream(fd: BorrowedFd<'_>, reuse_address: bool) -> Result<Stream, CaptureError> {
    let Some(peer) = inet::peer(fd).context("getpeername")? else { return Err(CaptureError::Handshake) };
    let repair = Repair::enter(fd, reuse_address)?;
    let info = Info::of(fd).context("TCP_INFO")?;
    if info.state == state::CLOSE {
        return Err(CaptureError::Handshake);
    }
    let finished = info.finished();
    let end = repair.end(Queue::Send)?.wrapping_sub(finished.into());
    // The program is frozen: the end stays, and the start moves only towards it.
    let queue = repair.peek(Queue::Send, socket::output_queue(fd).context("SIOCOUTQ")?)?;
    let unsent = socket::unsent(fd).context("SIOCOUTQNSD")?.saturating_sub(finished.into());
    let stream = Stream {
        peer,
        kernel_state: info.state,
        sending: Sending {
            end,
            unsent: u32::try_from(unsent.min(queue.len())).context("send queue")?,
            queue,
            finished,
        },
        receiving: Receiving { next: 0, queue: Vec::new(), finished: false, shut: false },
        max_segment: repair.max_segment()?,
        window_scales: info.window_scales,
        sack: info.sack,
        timestamp: if info.timestamps { Some(repair.timestamp()?) } else { None },
        window: repair.window()?,
    };
    repair.leave()?;
    debug_assert!(distance(stream.sending.start(), stream.sending.end) >= 0);
    Ok(stream)
}

/// The address a socket is connecting with: getpeername(2) does not tell it yet, /proc/net does.
fn connecting_peer(fd: BorrowedFd<'_>) -> Result<Address> {
    let inode = nix::sys::stat::fstat(fd).context("fstat")?.st_ino;
    for file in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        let table = std::fs::read_to_string(file).with_context(|| format!("read {file}"))?;
        if let Some(peer) = find_peer(&table, inode) {
            return Ok(peer);
        }
    }
    Err(anyhow!("a connecting socket is not in this network namespace (inode {inode})"))
}

/// Remote address of an inode in /proc/net/tcp or tcp6 (proc_net_tcp in the kernel's documentation).
fn find_peer(table: &str, inode: u64) -> Option<Address> {
    let inode = inode.to_string();
    let line = table.lines().skip(1).find(|line| line.split_whitespace().nth(9) == Some(&inode))?;
    let (ip, port) = line.split_whitespace().nth(2)?.split_once(':')?;
    // Words of the address, each printed as a number of this machine's byte order.
    let mut words = Vec::new();
    for at in (0..ip.len()).step_by(8) {
        words.extend(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    }
    let ip: IpAddr = match words.len() {
        4 => Ipv4Addr::from(<[u8; 4]>::try_from(words).ok()?).into(),
        16 => Ipv6Addr::from(<[u8; 16]>::try_from(words).ok()?).into(),
        _ => return None,
    };
    Some(Address { ip, port: u16::from_str_radix(port, 16).ok()?, scope: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_found_by_inode() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
        let four = format!(
            "{head}   1: 0100007F:A1B2 0202000A:0050 02 00000000:00000000 01:00000064 00000001     0        0 777 2 0 20\n"
        );
        let address = find_peer(&four, 777).unwrap();
        assert_eq!(address.to_string(), "10.0.2.2:80");
        assert!(find_peer(&four, 77).is_none());
        let six = format!(
            "{head}   0: 00000000000000000000000000000000:0001 000077FD000000000000000001000000:1F90 02 00000000:00000000 00:00000000 00000000     0        0 5 1 0 100\n"
        );
        assert_eq!(find_peer(&six, 5).unwrap().to_string(), "[fd77::1]:8080");
    }
}
