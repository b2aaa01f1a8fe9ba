//! The parts of `TCP_INFO` that we need.

use super::super::inet;
use crate::sys::socket;
use ckpt_common::image::socket::Address;
use std::io;
use std::os::fd::BorrowedFd;

/// States, linux/tcp.h.
pub(super) mod state {
    pub(in super::super) const ESTABLISHED: u8 = 1;
    pub(in super::super) const SYN_SENT: u8 = 2;
    pub(in super::super) const FIN_WAIT_1: u8 = 4;
    pub(in super::super) const FIN_WAIT_2: u8 = 5;
    pub(in super::super) const CLOSE: u8 = 7;
    pub(in super::super) const CLOSE_WAIT: u8 = 8;
    pub(in super::super) const LAST_ACK: u8 = 9;
    pub(in super::super) const LISTEN: u8 = 10;
    pub(in super::super) const CLOSING: u8 = 11;
}

/// Bits of `tcpi_options`.
const TIMESTAMPS: u8 = 1;
const SACK: u8 = 2;
const WINDOW_SCALE: u8 = 4;
/// Offsets in `struct tcp_info`.
const UNACKED: usize = 24;
const SACKED: usize = 28;
const LENGTH: usize = 104;

/// `struct tcp_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Info {
    /// State of the connection.
    pub(super) state: u8,
    pub(super) timestamps: bool,
    pub(super) sack: bool,
    /// Ours for what the other end announces, its for what we announce.
    pub(super) window_scales: Option<(u8, u8)>,
    /// Of a listening socket: connections that wait to be accepted, and how many may.
    pub(super) waiting: u32,
    pub(super) backlog: u32,
}

/// Both ends of a connection: (own, the other, has the other sent its FIN?). `None` for a socket without one.
pub fn ends(fd: BorrowedFd<'_>) -> io::Result<Option<(Address, Address, bool)>> {
    use state::*;
    let info = Info::of(fd)?;
    if matches!(info.state, CLOSE | LISTEN | SYN_SENT) {
        return Ok(None);
    }
    let ends = inet::local(fd)?.zip(inet::peer(fd)?);
    Ok(ends.map(|(own, other)| (own.canonical(), other.canonical(), info.peer_finished())))
}

impl Info {
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let bytes: [u8; LENGTH] = socket::get(fd, libc::IPPROTO_TCP, libc::TCP_INFO)?;
        let number = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (options, scales) = (bytes[5], bytes[6]);
        Ok(Self {
            state: bytes[0],
            timestamps: options & TIMESTAMPS != 0,
            sack: options & SACK != 0,
            window_scales: (options & WINDOW_SCALE != 0).then_some((scales & 15, scales >> 4)),
            waiting: number(UNACKED),
            backlog: number(SACKED),
        })
    }

    /// Our FIN has a sequence number: sent, or at the end of the send queue.
    pub(super) fn finished(&self) -> bool {
        use state::*;
        matches!(self.state, FIN_WAIT_1 | FIN_WAIT_2 | CLOSING | LAST_ACK)
    }

    /// The other end's FIN was received.
    pub(super) fn peer_finished(&self) -> bool {
        use state::*;
        matches!(self.state, CLOSE_WAIT | CLOSING | LAST_ACK)
    }
}
