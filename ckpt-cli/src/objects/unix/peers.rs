//! Who is connected to whom: sock_diag(7) for Unix sockets.

use super::super::{Class, Probe};
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::unix::Peer;
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::unix::{ShowFlags, StateFlags, UnixRequest, nlas::Nla};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};
use std::collections::{HashMap, HashSet};

#[derive(Clone, Debug, Default)]
struct Entry {
    /// `TCP_ESTABLISHED` (1), `TCP_CLOSE` (7), `TCP_LISTEN` (10).
    state: u8,
    peer: u64,
    backlog: u32,
    shutdown: u8,
}

/// Unix sockets of the network namespace by inode.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    entries: HashMap<u64, Entry>,
    /// Client to listener, for connections that wait to be accepted.
    waiting: HashMap<u64, u64>,
}

const ESTABLISHED: u8 = 1;

impl Peers {
    /// Asks the kernel, if there is a socket among the probes at all.
    pub fn read<'a>(mut probes: impl Iterator<Item = &'a Probe>) -> Result<Self> {
        if probes.any(|p| p.class() == Class::Socket) { Self::dump() } else { Ok(Self::default()) }
    }

    /// All of this network namespace.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn dump() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG).context("opening a sock_diag socket")?;
        socket.bind_auto().context("binding a sock_diag socket")?;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let request = UnixRequest {
            state_flags: StateFlags::from_bits_retain(u32::MAX),
            inode: 0,
            show_flags: ShowFlags::PEER | ShowFlags::ICONS | ShowFlags::RQLEN,
            cookie: [0xff; 8],
        };
        let mut message = NetlinkMessage::new(header, SockDiagMessage::UnixRequest(request).into());
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        socket.send(&bytes, 0).context("asking sock_diag for Unix sockets")?;
        let mut peers = Self::default();
        loop {
            let (packet, _) = socket.recv_from_full().context("reading sock_diag's answer")?;
            let mut at = 0;
            while at < packet.len() {
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(&packet[at..])
                    .context("decoding sock_diag's answer")?;
                match message.payload {
                    NetlinkPayload::InnerMessage(SockDiagMessage::UnixResponse(response)) => {
                        peers.add(response.header.inode.into(), response.header.state, &response.nlas);
                    }
                    NetlinkPayload::Done(_) => return Ok(peers),
                    NetlinkPayload::Error(e) => bail!("sock_diag refused: {e:?}"),
                    _ => {}
                }
                at += (message.header.length as usize).next_multiple_of(4).max(4);
            }
        }
    }

    fn add(&mut self, inode: u64, state: u8, attributes: &[Nla]) {
        let mut entry = Entry { state, ..Entry::default() };
        for attribute in attributes {
            match attribute {
                Nla::Peer(peer) => entry.peer = u64::from(*peer),
                Nla::PendingConnections(clients) => {
                    self.waiting.extend(clients.iter().filter(|c| **c != 0).map(|c| (u64::from(*c), inode)));
                }
                Nla::ReceiveQueueLength(_, limit) => entry.backlog = *limit,
                Nla::Shutdown(how) => entry.shutdown = *how,
                _ => {}
            }
        }
        self.entries.insert(inode, entry);
    }

    /// What the socket is connected to.
    pub fn peer(&self, inode: u64, socket_type: i32, listening: bool) -> Peer {
        let entry = self.entries.get(&inode).cloned().unwrap_or_default();
        match entry {
            Entry { backlog, .. } if listening => Peer::Listening { backlog },
            Entry { peer, .. } if peer != 0 => Peer::Inode(peer),
            _ if self.waiting.contains_key(&inode) => Peer::Waiting(self.waiting[&inode]),
            // A datagram socket is called established as soon as another one has connected to it.
            Entry { state: ESTABLISHED, .. } if socket_type != libc::SOCK_DGRAM => Peer::Gone,
            Entry { shutdown: 3, .. } if socket_type != libc::SOCK_DGRAM => Peer::Gone,
            _ => Peer::None,
        }
    }

    /// The socket (inode) that this one is connected to, or the listener that has not accepted it yet.
    pub fn other_end(&self, inode: u64) -> Option<u64> {
        let peer = self.entries.get(&inode).map(|entry| entry.peer).filter(|peer| *peer != 0);
        peer.or_else(|| self.waiting.get(&inode).copied())
    }

    /// Sockets whose other end is one of these.
    pub fn connected_to(&self, ends: &HashSet<u64>) -> HashSet<u64> {
        let leads = |inode: &u64| self.other_end(*inode).is_some_and(|end| ends.contains(&end));
        self.entries.keys().copied().filter(leads).collect()
    }

    /// `RCV_SHUTDOWN` and `SEND_SHUTDOWN` bits.
    pub fn shutdown(&self, inode: u64) -> u8 {
        self.entries.get(&inode).map_or(0, |e| e.shutdown)
    }
}
