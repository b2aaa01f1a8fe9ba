//! Unix sockets: streams, datagrams, sequenced packets; pairs, names, queues, descriptors in flight.

mod peers;
mod rebuild;

pub use peers::Peers;
pub use rebuild::Rebuilder;

use super::{CaptureContext, Captured, Passing, Probe};
use crate::sys::{ioctl, unix_socket};
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::unix::{Message, Peer, UnixSocket};
use std::os::fd::{AsFd, BorrowedFd};

/// A message is at most as large as the largest send buffer; queues are read in pieces of this many bytes.
const PIECE: usize = 1 << 20;

/// Options that come back, all of them of `SOL_SOCKET`.
const OPTIONS: [i32; 6] = [
    libc::SO_SNDBUF,
    libc::SO_RCVBUF,
    libc::SO_PASSCRED,
    libc::SO_RCVTIMEO,
    libc::SO_SNDTIMEO,
    libc::SO_PASSSEC,
];

/// Captures a socket; its queue is looked at, not taken.
pub fn capture(probe: &Probe, peers: &Peers, context: &mut dyn CaptureContext) -> Result<Captured> {
    let fd = probe.file.as_fd();
    let socket_type = ioctl::sockopt_int(fd, libc::SOL_SOCKET, libc::SO_TYPE)?;
    let address = unix_socket::name(fd).context("asking for the socket's name")?;
    let mut path_mode = None;
    if let Some(path) = address.as_deref().filter(|a| a.first() != Some(&0)) {
        let path = std::str::from_utf8(path).context("the socket's path is not UTF-8")?;
        if !path.starts_with('/') {
            bail!("it is bound to the relative path {path}, which cannot be found again");
        }
        path_mode = nix::sys::stat::stat(path).ok().map(|s| (s.st_mode & 0o7777, s.st_uid, s.st_gid));
    }
    let inode = probe.stat.st_ino;
    let listening = ioctl::sockopt_int(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)? != 0;
    let peer = peers.peer(inode, socket_type, listening);
    if matches!(peer, Peer::Waiting(_)) && ioctl::unsent(fd)? != 0 {
        return Err(Passing::Unaccepted.into());
    }
    let options = OPTIONS
        .into_iter()
        .filter_map(|name| {
            Some((libc::SOL_SOCKET, name, ioctl::sockopt(fd, libc::SOL_SOCKET, name, 16).ok()?))
        })
        .collect();
    let reset = matches!(peer, Peer::Gone) && unix_socket::has_error(fd)?;
    let messages = match peer {
        Peer::Listening { .. } => Vec::new(),
        // Not connected yet.
        Peer::None if socket_type != libc::SOCK_DGRAM => Vec::new(),
        // A look behind the last byte would take the error from the program.
        _ if reset && ioctl::readable(fd)? == 0 => Vec::new(),
        _ => {
            if reset && socket_type != libc::SOCK_STREAM {
                // Here the error comes first, and nothing tells what is behind it but to take it: a program that runs
                // on sees the packets and the end.
                let _ = unix_socket::peek(fd, 1);
            }
            queue(fd, socket_type, context).context("looking at the queue")?
        }
    };
    Captured::new(&UnixSocket {
        socket_type,
        inode,
        address,
        path_mode,
        peer,
        shutdown: peers.shutdown(inode),
        messages,
        reset,
        options,
    })
}

/// The queue, message by message: the kernel keeps the place in `SO_PEEK_OFF` (socket(7)).
fn queue(fd: BorrowedFd<'_>, socket_type: i32, context: &mut dyn CaptureContext) -> Result<Vec<Message>> {
    let empty = |m: &unix_socket::Peeked| m.data.is_empty() && m.files.is_empty() && m.from.is_none();
    if ioctl::readable(fd)? == 0 && unix_socket::peek(fd, 1)?.is_none_or(|m| empty(&m)) {
        return Ok(Vec::new());
    }
    let place = ioctl::sockopt_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    let messages = peek_all(fd, socket_type);
    ioctl::set_sockopt_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, place)?;
    messages?.into_iter().map(|message| finish(message, socket_type, context)).collect()
}

fn finish(
    message: unix_socket::Peeked,
    socket_type: i32,
    context: &mut dyn CaptureContext,
) -> Result<Message> {
    let files = message.files.into_iter().map(|f| context.in_flight(f)).collect::<Result<_>>()?;
    // Of a connection, the other end is known; its name, if it has one, is its listener's, too.
    let from = message.from.filter(|_| socket_type == libc::SOCK_DGRAM);
    Ok(Message { data: message.data, from, files })
}

/// A read of a stream ends with the first write that carries descriptors, and so does a look. Bytes that were written
/// before it and are unread, too, come in the same look, and no interface tells where they end: they are put back as
/// one write, so a program that reads just those first gets the descriptors that much earlier.
fn peek_all(fd: BorrowedFd<'_>, socket_type: i32) -> Result<Vec<unix_socket::Peeked>> {
    ioctl::set_sockopt_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
    let mut messages = Vec::new();
    // Of a stream it is known how much there is, and that there is no need to look behind it.
    let mut rest = if socket_type == libc::SOCK_STREAM { ioctl::readable(fd)? } else { usize::MAX };
    while let Some(message) = if rest == 0 { None } else { unix_socket::peek(fd, PIECE)? } {
        rest = rest.saturating_sub(message.data.len());
        let stream_end =
            socket_type != libc::SOCK_DGRAM && message.data.is_empty() && message.files.is_empty();
        if stream_end {
            break;
        }
        messages.push(message);
    }
    Ok(messages)
}
