//! Unix sockets again: first those with names, then pairs, then what is in the queues.

use crate::sys::{ioctl, unix_socket};
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::file::FileId;
use ckpt_common::image::unix::{Peer, UnixSocket};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, accept4, listen, shutdown, socket, socketpair,
};
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// All Unix sockets of a part, and those made so far by inode.
#[derive(Debug, Default)]
pub struct Rebuilder {
    records: HashMap<u64, UnixSocket>,
    made: HashMap<u64, OwnedFd>,
}

fn kind(record: &UnixSocket) -> SockType {
    match record.socket_type {
        libc::SOCK_DGRAM => SockType::Datagram,
        libc::SOCK_SEQPACKET => SockType::SeqPacket,
        _ => SockType::Stream,
    }
}

fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).replace('\0', "@")
}

fn new(record: &UnixSocket) -> Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, kind(record), SockFlag::SOCK_CLOEXEC, None)
        .context("making a Unix socket")?;
    options(&fd, record)?;
    Ok(fd)
}

fn options(fd: &OwnedFd, record: &UnixSocket) -> Result<()> {
    for (level, name, value) in &record.options {
        // The kernel doubles what is set for these two, and shows it doubled (socket(7)).
        let (name, value) = match (*name, <[u8; 4]>::try_from(value.as_slice())) {
            (libc::SO_SNDBUF, Ok(v)) => {
                (libc::SO_SNDBUFFORCE, (i32::from_ne_bytes(v) / 2).to_ne_bytes().to_vec())
            }
            (libc::SO_RCVBUF, Ok(v)) => {
                (libc::SO_RCVBUFFORCE, (i32::from_ne_bytes(v) / 2).to_ne_bytes().to_vec())
            }
            (name, _) => (name, value.clone()),
        };
        ioctl::set_sockopt(fd.as_fd(), *level, name, &value)
            .with_context(|| format!("setting socket option {name}"))?;
    }
    Ok(())
}

fn bind(fd: &OwnedFd, record: &UnixSocket) -> Result<()> {
    let Some(name) = &record.address else { return Ok(()) };
    let path = (name.first() != Some(&0)).then(|| text(name));
    if let Some(path) = &path {
        use std::os::unix::fs::FileTypeExt;
        // Left behind by the process that was killed; anything but a socket is not ours to remove.
        if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
            nix::unistd::unlink(path.as_str()).with_context(|| format!("removing the old socket {path}"))?;
        }
    }
    unix_socket::bind(fd.as_fd(), name).with_context(|| format!("binding a socket to {}", text(name)))?;
    if let (Some(path), Some((mode, uid, gid))) = (path, record.path_mode) {
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode))?;
        nix::unistd::chown(path.as_str(), Some(uid.into()), Some(gid.into()))?;
    }
    Ok(())
}

impl Rebuilder {
    /// Takes the records of all Unix sockets of the part and makes the sockets.
    pub fn new(records: Vec<UnixSocket>) -> Result<Self> {
        let mut all =
            Self { records: records.into_iter().map(|r| (r.inode, r)).collect(), ..Self::default() };
        let mut inodes: Vec<u64> = all.records.keys().copied().collect();
        // Listeners first, connections that wait for them last: those must not be accepted by ours.
        inodes.sort_unstable_by_key(|inode| match all.records[inode].peer {
            Peer::Listening { .. } => (0, *inode),
            Peer::None | Peer::Outside => (1, *inode),
            Peer::Inode(_) | Peer::Gone => (2, *inode),
            Peer::Waiting(_) => (3, *inode),
        });
        for inode in inodes {
            all.make(inode).with_context(|| format!("rebuilding Unix socket {inode}"))?;
        }
        Ok(all)
    }

    fn make(&mut self, inode: u64) -> Result<()> {
        if self.made.contains_key(&inode) {
            return Ok(());
        }
        let record = self.records[&inode].clone();
        let fd = match record.peer {
            Peer::None | Peer::Outside => {
                let fd = new(&record)?;
                bind(&fd, &record)?;
                fd
            }
            Peer::Listening { backlog } => {
                let fd = new(&record)?;
                bind(&fd, &record)?;
                listen(&fd, Backlog::new(backlog.min(i32::MAX as u32) as i32).unwrap_or(Backlog::MAXCONN))
                    .context("listening")?;
                fd
            }
            Peer::Waiting(listener) => {
                let listener = self.records.get(&listener).context("its listener is not in the image")?;
                let fd = new(&record)?;
                bind(&fd, &record)?;
                let name = listener.address.as_deref().context("its listener has no name")?;
                unix_socket::connect(fd.as_fd(), name)
                    .with_context(|| format!("connecting to {}", text(name)))?;
                fd
            }
            Peer::Gone => {
                let (fd, other) = self.pair(&record, None)?;
                self.fill_from(&other, &record, &HashMap::new())?;
                if record.reset {
                    unix_socket::send(fd.as_fd(), &[0], &[], None).context("leaving something unread")?;
                }
                drop(other);
                fd
            }
            Peer::Inode(peer) => {
                let other = self.records.get(&peer).cloned().context("its peer is not in the image")?;
                if record.socket_type == libc::SOCK_DGRAM
                    && (other.peer != Peer::Inode(inode) || other.address.is_some())
                {
                    let fd = new(&record)?;
                    bind(&fd, &record)?;
                    self.made.insert(inode, fd.try_clone()?);
                    self.make(peer)?;
                    let name = other.address.as_deref().context("its peer has no name")?;
                    unix_socket::connect(fd.as_fd(), name)
                        .with_context(|| format!("connecting to {}", text(name)))?;
                    fd
                } else {
                    let (fd, made) = self.pair(&record, Some(&other))?;
                    self.made.insert(peer, made);
                    fd
                }
            }
        };
        self.made.insert(inode, fd);
        Ok(())
    }

    /// A connected pair. An end with a name got it from the listener that accepted it, so it is accepted again.
    fn pair(&self, one: &UnixSocket, other: Option<&UnixSocket>) -> Result<(OwnedFd, OwnedFd)> {
        let listens = |name: &Vec<u8>| {
            let mut all = self.records.values();
            all.any(|r| matches!(r.peer, Peer::Listening { .. }) && r.address.as_ref() == Some(name))
        };
        let (fd, peer) = match (&one.address, other.and_then(|o| o.address.as_ref())) {
            (None, None) => socketpair(AddressFamily::Unix, kind(one), None, SockFlag::SOCK_CLOEXEC)
                .context("making a socket pair")?,
            // Where both ends have names, the accepted one has its listener's.
            (Some(name), theirs) if theirs.is_none_or(|theirs| listens(name) || !listens(theirs)) => {
                self.accepted(one, name, other)?
            }
            (_, name) => {
                let (server, name) =
                    (other.context("a named end without a record")?, name.context("no name")?);
                let (server, client) = self.accepted(server, name, Some(one))?;
                (client, server)
            }
        };
        options(&fd, one)?;
        if let Some(other) = other {
            options(&peer, other)?;
        }
        Ok((fd, peer))
    }

    /// (accepted end, connecting end)
    fn accepted(
        &self,
        server: &UnixSocket,
        name: &[u8],
        client: Option<&UnixSocket>,
    ) -> Result<(OwnedFd, OwnedFd)> {
        let listener = self
            .records
            .values()
            .find(|r| matches!(r.peer, Peer::Listening { .. }) && r.address.as_deref() == Some(name));
        let temporary;
        let listening = match listener.and_then(|l| self.made.get(&l.inode)) {
            Some(fd) => fd,
            None => {
                temporary = new(server)?;
                bind(&temporary, server)?;
                listen(&temporary, Backlog::new(1)?).context("listening for a moment")?;
                &temporary
            }
        };
        let connecting = socket(AddressFamily::Unix, kind(server), SockFlag::SOCK_CLOEXEC, None)?;
        if let Some(client) = client.filter(|c| c.address.as_deref().is_some_and(|a| a != name)) {
            bind(&connecting, client)?;
        }
        unix_socket::connect(connecting.as_fd(), name)
            .with_context(|| format!("connecting to {}", text(name)))?;
        let raw = accept4(listening.as_raw_fd(), SockFlag::SOCK_CLOEXEC).context("accepting")?;
        let accepted = crate::sys::unix_socket::own(raw);
        if listener.is_none() && name.first() != Some(&0) {
            nix::unistd::unlink(text(name).as_str())?;
        }
        Ok((accepted, connecting))
    }

    /// A duplicate of the socket with this inode.
    pub fn get(&self, inode: u64) -> Result<OwnedFd> {
        Ok(self.made.get(&inode).with_context(|| format!("Unix socket {inode} was not made"))?.try_clone()?)
    }

    /// Fills the queues and shuts down what was shut down. `files` are the rebuilt descriptions.
    pub fn fill(&self, files: &HashMap<FileId, OwnedFd>) -> Result<()> {
        for record in self.records.values().filter(|r| !r.messages.is_empty() && r.peer != Peer::Gone) {
            let sender = match record.peer {
                Peer::Inode(peer)
                    if self.records.get(&peer).is_some_and(|p| p.peer == Peer::Inode(record.inode)) =>
                {
                    self.get(peer)?
                }
                _ => new(record)?,
            };
            self.fill_from(&sender, record, files)
                .with_context(|| format!("filling the queue of Unix socket {}", record.inode))?;
        }
        for record in self.records.values() {
            let how = match record.shutdown {
                1 => Shutdown::Read,
                2 => Shutdown::Write,
                3 if record.peer != Peer::Gone => Shutdown::Both,
                _ => continue,
            };
            shutdown(self.get(record.inode)?.as_raw_fd(), how).context("shutting down a Unix socket")?;
        }
        Ok(())
    }

    fn fill_from(
        &self,
        sender: &OwnedFd,
        record: &UnixSocket,
        files: &HashMap<FileId, OwnedFd>,
    ) -> Result<()> {
        let connected = matches!(record.peer, Peer::Inode(_) | Peer::Gone)
            && record.messages.iter().all(|m| m.from.is_none());
        for message in &record.messages {
            let mut fds = Vec::new();
            for id in &message.files {
                fds.push(files.get(id).context("a descriptor in flight was not rebuilt")?.as_raw_fd());
            }
            let from = message.from.as_ref().and_then(|from| {
                self.records
                    .values()
                    .find(|r| r.address.as_ref() == Some(from))
                    .and_then(|r| self.made.get(&r.inode))
            });
            let to = if connected { None } else { record.address.as_deref() };
            if !connected && to.is_none() && from.is_none() {
                bail!("messages of a socket without name or peer");
            }
            let sender = from.unwrap_or(sender);
            let mut rest = &message.data[..];
            loop {
                let n = unix_socket::send(sender.as_fd(), rest, &fds, to).context("filling its queue")?;
                rest = &rest[n..];
                fds.clear();
                if rest.is_empty() {
                    break;
                }
            }
        }
        Ok(())
    }
}
