//! From a record to a socket, in two steps with a barrier between them.

use super::ended;
use super::repair::{Agreed, Queue, Repair};
use crate::network::addresses::AddressMap;
use crate::objects::inet::{self, Protocol};
use anyhow::{Context, Result, bail};
use ckpt_common::image::socket::{Address, SocketSettings};
use ckpt_common::image::tcp::{Position, Stream, TcpSocket, TcpState, Window, distance};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Backlog, MsgFlags, Shutdown, connect, listen, send, shutdown};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// What the kernel's bookkeeping for queued data may take at most, per byte of data, and in all.
const OVERHEAD: u32 = 4;
const SPARE: u32 = 1 << 20;
/// How long the kernel may lack memory for a queue, in milliseconds.
const PATIENCE: u16 = 5000;

/// A socket that exists and does not speak yet. Dropped instead of connected, it goes silently.
#[derive(Debug)]
pub struct Rebuilt {
    fd: OwnedFd,
    settings: SocketSettings,
    rest: Rest,
}

/// What is left to do after the barrier.
#[derive(Debug)]
enum Rest {
    Nothing,
    /// Connect as if for the first time.
    Connect(Address),
    /// Leave repair mode, send, and close directions.
    Stream {
        unsent: Vec<u8>,
        finished: bool,
        shut: bool,
    },
}

/// Makes the socket of a record, with new addresses. Listening sockets first: a connection may use
/// the port of one, but not the other way round. `peer` is where the other end's capture stands.
///
/// # Errors
/// An address or port that cannot be had here, an option that cannot be set, or two captures that do
/// not fit; the message has both ends.
pub fn rebuild(socket: &TcpSocket, map: &AddressMap, peer: Option<&Position>) -> Result<Rebuilt> {
    let fd = Protocol::Tcp.socket(socket.ipv6)?;
    let settings = socket.settings.clone();
    inet::apply(fd.as_fd(), Protocol::Tcp, socket.ipv6, &settings)?;
    let rest = match &socket.state {
        TcpState::Unconnected => {
            if let Some(local) = socket.local {
                inet::bind(fd.as_fd(), local, map)?;
            }
            inet::apply_buffers(fd.as_fd(), &settings)?;
            Rest::Nothing
        }
        TcpState::Listening { backlog } => {
            let local = socket.local.context("a listening socket without an address")?;
            inet::bind(fd.as_fd(), local, map)?;
            inet::apply_buffers(fd.as_fd(), &settings)?;
            let backlog =
                Backlog::new(i32::try_from(*backlog).unwrap_or(i32::MAX)).unwrap_or(Backlog::MAXCONN);
            listen(&fd, backlog).with_context(|| format!("listen on {}", map.address(local)))?;
            Rest::Nothing
        }
        TcpState::Connecting { peer } => {
            let local = socket.local.context("a connecting socket without an address")?;
            bind_by_force(fd.as_fd(), local, map, settings.reuse_address)?;
            inet::apply_buffers(fd.as_fd(), &settings)?;
            Rest::Connect(map.address(*peer))
        }
        TcpState::Ended { received, error } => {
            ended::rebuild(fd.as_fd(), socket, map, received, *error)?;
            inet::apply_buffers(fd.as_fd(), &settings)?;
            Rest::Nothing
        }
        TcpState::Connected(stream) => {
            let local = socket.local.context("a connection without a local address")?;
            establish(fd.as_fd(), stream, local, &settings, map, peer)
                .with_context(|| format!("rebuild the TCP connection {local} to {}", stream.peer))?
        }
    };
    Ok(Rebuilt { fd, settings, rest })
}

/// Binds although the port is in use, as the ports of connections are.
pub(super) fn bind_by_force(fd: BorrowedFd<'_>, local: Address, map: &AddressMap, reuse: bool) -> Result<()> {
    let repair = Repair::enter(fd, reuse)?;
    inet::bind(fd, local, map)?;
    repair.leave()
}

/// Makes a connection in repair mode: everything but what is to be sent.
fn establish(
    fd: BorrowedFd<'_>,
    stream: &Stream,
    local: Address,
    settings: &SocketSettings,
    map: &AddressMap,
    peer: Option<&Position>,
) -> Result<Rest> {
    let (sending, receiving) = (&stream.sending, &stream.receiving);
    let known = match peer {
        Some(peer) => overlap(stream, local, peer)?,
        None => 0,
    };
    let start = sending.start().wrapping_add(u32::try_from(known)?);
    let unsent = sending.queue.get(known..).context("the other end is ahead")?.to_vec();
    let need = |data: usize, size: u32| -> Result<u32> {
        let data = u32::try_from(data).context("a queue of more than 4 GiB")?;
        Ok(data.saturating_mul(OVERHEAD).saturating_add(SPARE).max(size))
    };
    inet::set_buffers(
        fd,
        need(unsent.len(), settings.send_buffer)?,
        need(receiving.queue.len(), settings.receive_buffer)?,
    )?;

    let repair = Repair::enter(fd, settings.reuse_address)?;
    repair.set_start(Queue::Send, start)?;
    let received = u32::try_from(receiving.queue.len())?;
    repair.set_start(Queue::Receive, receiving.next.wrapping_sub(received))?;
    inet::bind(fd, local, map)?;
    let address = map.address(stream.peer);
    connect(fd.as_raw_fd(), &inet::storage(address))
        .with_context(|| format!("connect in repair mode to {address}"))?;
    repair.set_agreed(Agreed {
        max_segment: stream.max_segment,
        window_scales: stream.window_scales,
        sack: stream.sack,
        timestamp: stream.timestamp.is_some(),
    })?;
    if let Some(timestamp) = stream.timestamp {
        repair.set_timestamp(timestamp)?;
    }
    repair.fill_receive_queue(&receiving.queue)?;
    repair.set_window(window(stream, start, peer))?;
    repair.stay();
    Ok(Rest::Stream { unsent, finished: sending.finished, shut: receiving.shut })
}

/// How many bytes of the send queue the other end has already.
fn overlap(stream: &Stream, local: Address, peer: &Position) -> Result<usize> {
    let us = Position {
        local: local.canonical(),
        peer: stream.peer.canonical(),
        send_start: stream.sending.start(),
        send_end: stream.sending.end,
        receive_next: stream.receiving.next,
        window_end: 0,
        finished: stream.sending.finished,
        peer_finished: stream.receiving.finished,
    };
    if !us.matches(peer) {
        bail!("the position is of {} to {}", peer.local, peer.peer);
    }
    let flight = us.in_flight(peer).context("the captures of the two ends do not fit")?;
    Ok(flight.overlap as usize)
}

/// The windows, for a socket whose send queue starts at `start` and where no FIN has come or gone.
///
/// What was announced stays announced: since Linux 6.17 a segment outside of the announced window is
/// dropped, and a peer that believes in a larger one would send it again and again.
fn window(stream: &Stream, start: u32, peer: Option<&Position>) -> Window {
    let old = stream.window;
    let edge = peer.map_or_else(|| stream.sending.start().wrapping_add(old.send), |peer| peer.window_end);
    let send = u32::try_from(distance(start, edge)).unwrap_or(0);
    let next = stream.receiving.next;
    // A FIN that was acknowledged is not received yet: what was announced after it moves back.
    let late = u32::try_from(distance(next, old.announced_at)).unwrap_or(0);
    let update = if distance(next, old.update) > 0 { next } else { old.update };
    Window {
        update,
        send,
        max: old.max.max(send),
        receive: old.receive.saturating_add(late),
        announced_at: old.announced_at.wrapping_sub(late),
    }
}

impl Rebuilt {
    /// The socket, for the process that is to have it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// After the barrier: lets the socket speak, and closes our descriptor of it.
    ///
    /// # Errors
    /// The kernel has no memory for the queue, or no way to the other end.
    pub fn connect(self) -> Result<()> {
        let fd = self.fd.as_fd();
        match &self.rest {
            Rest::Nothing => Ok(()),
            Rest::Connect(peer) => connect_without_waiting(fd, *peer),
            Rest::Stream { unsent, finished, shut } => {
                Repair::resume(fd, self.settings.reuse_address).leave()?;
                send_all(fd, unsent)?;
                for (wanted, how) in [(*finished, Shutdown::Write), (*shut, Shutdown::Read)] {
                    if wanted {
                        shutdown(fd.as_raw_fd(), how)
                            .with_context(|| format!("shut a connection down ({how:?})"))?;
                    }
                }
                inet::apply_buffers(fd, &self.settings)
            }
        }
    }
}

fn connect_without_waiting(fd: BorrowedFd<'_>, peer: Address) -> Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).context("F_GETFL")?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).context("F_SETFL")?;
    let result = connect(fd.as_raw_fd(), &inet::storage(peer));
    fcntl(fd, FcntlArg::F_SETFL(flags)).context("F_SETFL")?;
    match result {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("connect to {peer}")),
    }
}

/// Puts all data into the send queue. The buffer is large enough; what may lack is the kernel's memory.
pub(super) fn send_all(fd: BorrowedFd<'_>, data: &[u8]) -> Result<()> {
    let mut done = 0;
    while done < data.len() {
        match send(fd.as_raw_fd(), &data[done..], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(length) => done += length,
            Err(Errno::EAGAIN) => {
                let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
                if poll(&mut fds, PollTimeout::from(PATIENCE)).context("poll a socket")? == 0 {
                    bail!("the kernel takes only {done} of {} bytes into a TCP send queue", data.len());
                }
            }
            Err(error) => return Err(error).with_context(|| format!("send {} queued bytes", data.len())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_common::image::tcp::{Receiving, Sending};

    fn stream() -> Stream {
        Stream {
            peer: Address { ip: [10, 0, 0, 2].into(), port: 2, scope: 0 },
            kernel_state: 1,
            sending: Sending { end: 50, queue: vec![1; 60], unsent: 20, finished: false },
            receiving: Receiving { next: 1000, queue: Vec::new(), finished: false, shut: false },
            max_segment: 1460,
            window_scales: None,
            sack: true,
            timestamp: None,
            window: Window { update: 1000, send: 500, max: 600, receive: 300, announced_at: 1000 },
        }
    }

    fn other_end() -> Position {
        let end = |host, port| Address { ip: [10, 0, 0, host].into(), port, scope: 0 };
        Position {
            local: end(2, 2),
            peer: end(1, 1),
            send_start: 1000,
            send_end: 1000,
            receive_next: 10,
            window_end: 400,
            finished: false,
            peer_finished: false,
        }
    }

    #[test]
    fn what_the_other_end_has_is_dropped() {
        let local = Address { ip: [10, 0, 0, 1].into(), port: 1, scope: 0 };
        assert_eq!(overlap(&stream(), local, &other_end()).unwrap(), 20);
        let ahead = Position { receive_next: 51, ..other_end() };
        let error = overlap(&stream(), local, &ahead).unwrap_err();
        assert!(
            format!("{error:#}").contains("1 bytes were received that the sender had not written"),
            "{error:#}"
        );
        assert!(overlap(&stream(), Address { port: 9, ..local }, &other_end()).is_err());
    }

    #[test]
    fn windows_keep_their_edges() {
        let window = window(&stream(), 10, Some(&other_end()));
        assert_eq!((window.send, window.max), (390, 600));
        // A FIN was acknowledged: announced_at is behind the data.
        let mut finished = stream();
        finished.receiving.next = 999;
        finished.receiving.finished = true;
        let moved = super::window(&finished, 10, Some(&other_end()));
        assert_eq!((moved.announced_at, moved.receive, moved.update), (999, 301, 999));
        // The other end's window is closed.
        assert_eq!(super::window(&stream(), 10, Some(&Position { window_end: 5, ..other_end() })).send, 0);
    }
}
