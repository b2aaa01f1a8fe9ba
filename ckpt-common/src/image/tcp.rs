//! TCP sockets.
//!
//! Sequence numbers count data only: a FIN, which takes a number on the wire, is a flag here. They
//! wrap around; compare them with [`distance`].

use super::Kind;
use super::socket::{Address, SocketSettings};
use serde::{Deserialize, Serialize};

/// One TCP socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TcpSocket {
    /// `AF_INET6`, which may speak IPv4 as well.
    pub ipv6: bool,
    /// Address it is bound to, itself or by connecting.
    pub local: Option<Address>,
    /// Options and buffers.
    pub settings: SocketSettings,
    /// The rest.
    pub state: TcpState,
}

impl Kind for TcpSocket {
    const KIND: &'static str = "tcp";
    const VERSION: u16 = 1;
}

/// Where in its life a socket is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TcpState {
    /// Neither connected nor listening, and never was.
    Unconnected,
    /// Waiting for connections.
    Listening {
        /// As passed to listen(2), cut by the kernel's limit.
        backlog: u32,
    },
    /// Connecting, without an answer so far.
    Connecting {
        /// The other end.
        peer: Address,
    },
    /// Connected, in one direction at least.
    Connected(Box<Stream>),
    /// Closed in both directions, or broken; what was received can still be read.
    Ended {
        /// Received and not read.
        #[serde(with = "serde_bytes")]
        received: Vec<u8>,
        /// An error waits to be read.
        error: bool,
    },
}

/// A connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stream {
    /// The other end.
    pub peer: Address,
    /// State in the kernel's numbers (`TCP_ESTABLISHED` is 1), for people.
    pub kernel_state: u8,
    /// What we send.
    pub sending: Sending,
    /// What we receive.
    pub receiving: Receiving,
    /// Largest segment that the other end takes, in bytes (`TCP_MAXSEG` in repair mode).
    pub max_segment: u32,
    /// Window scales: ours for what it announces, its for what we announce.
    pub window_scales: Option<(u8, u8)>,
    /// Selective acknowledgements were agreed on.
    pub sack: bool,
    /// Timestamps were agreed on: `TCP_TIMESTAMP`, opaque.
    pub timestamp: Option<u32>,
    /// Windows.
    pub window: Window,
}

/// The sending direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sending {
    /// Sequence number after the last byte in the queue.
    pub end: u32,
    /// Bytes not known to be received, up to `end`.
    #[serde(with = "serde_bytes")]
    pub queue: Vec<u8>,
    /// How many bytes of the queue, at its end, were never sent.
    pub unsent: u32,
    /// The program will send no more: a FIN was sent, or is to follow the queue.
    pub finished: bool,
}

impl Sending {
    /// Sequence number of the first byte in the queue.
    pub fn start(&self) -> u32 {
        self.end.wrapping_sub(self.queue.len() as u32)
    }
}

/// The receiving direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Receiving {
    /// Sequence number of the next byte to be received.
    pub next: u32,
    /// Received and not read, up to `next`.
    #[serde(with = "serde_bytes")]
    pub queue: Vec<u8>,
    /// The other end will send no more: its FIN was received.
    pub finished: bool,
    /// The program wants no more (`SHUT_RD`).
    pub shut: bool,
}

/// Windows of a connection, as `TCP_REPAIR_WINDOW` has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Sequence number of the segment that last updated the window for sending.
    pub update: u32,
    /// Window for sending, in bytes from the first unacknowledged one.
    pub send: u32,
    /// Largest window ever announced to us.
    pub max: u32,
    /// Window for receiving that we announced last, in bytes from `announced_at`.
    pub receive: u32,
    /// What was received when we announced it.
    pub announced_at: u32,
}

/// Signed distance from sequence number `from` to `to`: negative where `to` comes first.
pub fn distance(from: u32, to: u32) -> i32 {
    to.wrapping_sub(from) as i32
}

/// Where one end of a connection stands: what the other end's rebuilding needs to know, and what
/// tells whether two captures fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// This end, canonical.
    pub local: Address,
    /// The other end, canonical.
    pub peer: Address,
    /// First byte that this end can still send.
    pub send_start: u32,
    /// After the last byte that this end's program has written.
    pub send_end: u32,
    /// Next byte to be received.
    pub receive_next: u32,
    /// First byte that is outside of the window announced to the other end.
    pub window_end: u32,
    /// This end sends no more.
    pub finished: bool,
    /// The other end's FIN was received.
    pub peer_finished: bool,
}

/// What is under way from one end to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InFlight {
    /// Written and not received, in bytes: the content of the channel.
    pub bytes: u32,
    /// Received already, but still kept by the sender, in bytes: to be dropped.
    pub overlap: u32,
    /// Only the end of the stream is under way, or follows the bytes.
    pub end: bool,
}

/// Two captures of one connection do not fit: bytes would be lost or invented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// The sender no longer has what the receiver does not have yet.
    #[error("{0} bytes were acknowledged and not captured")]
    Gap(u32),
    /// The receiver has what the sender has not written.
    #[error("{0} bytes were received that the sender had not written")]
    Ahead(u32),
    /// The receiver saw an end that the sender has not sent.
    #[error("the end of the stream was received and not sent")]
    End,
}

impl Position {
    /// What is under way from this end to `other`, captured at any time between the freeze and the thaw.
    ///
    /// # Errors
    /// The two do not fit.
    pub fn in_flight(&self, other: &Self) -> Result<InFlight, Misfit> {
        let overlap = distance(self.send_start, other.receive_next);
        if overlap < 0 {
            return Err(Misfit::Gap(overlap.unsigned_abs()));
        }
        let bytes = distance(other.receive_next, self.send_end);
        if bytes < 0 {
            return Err(Misfit::Ahead(bytes.unsigned_abs()));
        }
        if other.peer_finished && (!self.finished || bytes > 0) {
            return Err(Misfit::End);
        }
        Ok(InFlight {
            bytes: bytes.unsigned_abs(),
            overlap: overlap.unsigned_abs(),
            end: self.finished && !other.peer_finished,
        })
    }

    /// The name of the connection as the other end would say it.
    pub fn matches(&self, other: &Self) -> bool {
        self.local == other.peer && self.peer == other.local
    }
}

impl TcpSocket {
    /// The connection, if there is one.
    pub fn stream(&self) -> Option<&Stream> {
        match &self.state {
            TcpState::Connected(stream) => Some(stream),
            _ => None,
        }
    }

    /// Where this end of its connection stands; `None` for a socket without one. On one node,
    /// connections of loopback addresses look like those of any other node.
    pub fn position(&self) -> Option<Position> {
        let stream = self.stream()?;
        Some(Position {
            local: self.local?.canonical(),
            peer: stream.peer.canonical(),
            send_start: stream.sending.start(),
            send_end: stream.sending.end,
            receive_next: stream.receiving.next,
            window_end: stream.window.announced_at.wrapping_add(stream.window.receive),
            finished: stream.sending.finished,
            peer_finished: stream.receiving.finished,
        })
    }

    /// The same socket after a break of its connection: what was received can be read, then comes
    /// an error. For connections that lead out of the job.
    #[must_use]
    pub fn broken(&self) -> Self {
        let state = match &self.state {
            TcpState::Connected(stream) => TcpState::Ended {
                received: stream.receiving.queue.clone(),
                error: !stream.receiving.finished,
            },
            TcpState::Connecting { .. } => TcpState::Ended { received: Vec::new(), error: true },
            other => other.clone(),
        };
        Self { state, ..self.clone() }
    }

    /// The other end of a connection whose program has closed its descriptor, so that nobody could
    /// capture it. Rebuilt where the peer's address now is, connected and closed, it sends the end
    /// of the stream. `None` where this end has not received that end yet: then the kernel over
    /// there still has something to send, and the capture must wait for it.
    pub fn closed_peer(&self) -> Option<Self> {
        let stream = self.stream().filter(|stream| stream.receiving.finished)?;
        let (sending, receiving, window) = (&stream.sending, &stream.receiving, &stream.window);
        let edge = sending.start().wrapping_add(window.send);
        let mirrored = Stream {
            peer: self.local?,
            kernel_state: stream.kernel_state,
            sending: Sending { end: receiving.next, queue: Vec::new(), unsent: 0, finished: true },
            receiving: Receiving { next: sending.start(), queue: Vec::new(), finished: false, shut: false },
            max_segment: stream.max_segment,
            window_scales: stream.window_scales.map(|(ours, its)| (its, ours)),
            sack: stream.sack,
            timestamp: stream.timestamp,
            window: Window {
                update: sending.start(),
                send: window.receive,
                max: window.receive.max(1),
                receive: edge.wrapping_sub(sending.start()),
                announced_at: sending.start(),
            },
        };
        Some(Self {
            ipv6: self.ipv6,
            local: Some(stream.peer),
            settings: SocketSettings {
                send_buffer: 1 << 16,
                receive_buffer: 1 << 18,
                // What is left of it for a minute (TIME_WAIT) must not keep the job's own listener off the port.
                reuse_address: true,
                ..SocketSettings::default()
            },
            state: TcpState::Connected(Box::new(mirrored)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(send: (u32, u32), receive_next: u32) -> Position {
        let end = Address { ip: std::net::Ipv4Addr::LOCALHOST.into(), port: 1, scope: 0 };
        Position {
            local: end,
            peer: end,
            send_start: send.0,
            send_end: send.1,
            receive_next,
            window_end: receive_next.wrapping_add(100),
            finished: false,
            peer_finished: false,
        }
    }

    #[test]
    fn what_is_in_flight_wraps_around() {
        let sender = position((u32::MAX - 9, 20), 0);
        let flight = sender.in_flight(&position((0, 0), 5)).unwrap();
        assert_eq!((flight.bytes, flight.overlap, flight.end), (15, 15, false));
    }

    #[test]
    fn captures_that_do_not_fit_are_told_apart() {
        let sender = position((100, 200), 0);
        assert_eq!(sender.in_flight(&position((0, 0), 99)), Err(Misfit::Gap(1)));
        assert_eq!(sender.in_flight(&position((0, 0), 202)), Err(Misfit::Ahead(2)));
        let seen_end = Position { peer_finished: true, ..position((0, 0), 200) };
        assert_eq!(sender.in_flight(&seen_end), Err(Misfit::End));
        let finished = Position { finished: true, ..sender };
        assert_eq!(finished.in_flight(&seen_end), Ok(InFlight { bytes: 0, overlap: 100, end: false }));
        assert!(finished.in_flight(&position((0, 0), 200)).unwrap().end);
    }
}
