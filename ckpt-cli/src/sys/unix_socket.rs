//! Unix sockets below what nix offers: raw addresses, and messages with descriptors, peeked or sent.

use super::check;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Most descriptors in one message (`SCM_MAX_FD`).
const MAX_FDS: usize = 253;

fn address(path: &[u8]) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: all-zero is a valid value of this structure.
    let mut addr: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    addr.sun_family = libc::AF_UNIX as u16;
    if path.len() > addr.sun_path.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in addr.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    Ok((addr, (2 + path.len()) as libc::socklen_t))
}

fn path(addr: &libc::sockaddr_un, len: libc::socklen_t) -> Option<Vec<u8>> {
    let len = (len as usize).saturating_sub(2).min(addr.sun_path.len());
    let mut bytes: Vec<u8> = addr.sun_path[..len].iter().map(|c| *c as u8).collect();
    if bytes.first() != Some(&0) {
        // A path may carry its final NUL.
        bytes.truncate(bytes.iter().position(|b| *b == 0).unwrap_or(len));
    }
    (!bytes.is_empty()).then_some(bytes)
}

/// The socket's own address: the bytes of `sun_path`, `None` where it has no name.
pub fn name(fd: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    let mut addr = MaybeUninit::<libc::sockaddr_un>::zeroed();
    let mut len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the address has the stated size and outlives the call; zeroed, it is initialised whatever was written.
    unsafe {
        check(libc::getsockname(fd.as_raw_fd(), addr.as_mut_ptr().cast(), &raw mut len).into())?;
        Ok(path(&addr.assume_init(), len))
    }
}

/// bind(2).
pub fn bind(fd: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let (addr, len) = address(name)?;
    // SAFETY: the address has the stated size and is only read.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const addr).cast(), len) }.into()).map(drop)
}

/// connect(2).
pub fn connect(fd: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let (addr, len) = address(name)?;
    // SAFETY: the address has the stated size and is only read.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const addr).cast(), len) }.into()).map(drop)
}

/// A message of the queue.
#[derive(Debug)]
pub struct Peeked {
    /// Bytes.
    pub data: Vec<u8>,
    /// Sender's address.
    pub from: Option<Vec<u8>>,
    /// Duplicates of the descriptors in it.
    pub files: Vec<OwnedFd>,
}

/// Does an error wait to be told to the program? It stays there (unlike with `SO_ERROR`, which takes it).
pub fn has_error(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR)))
}

/// Looks at the next message (from `SO_PEEK_OFF` on) without taking it; `None` at the queue's end.
pub fn peek(fd: BorrowedFd<'_>, max: usize) -> io::Result<Option<Peeked>> {
    let mut data = vec![0u8; max];
    let mut control = vec![0u64; (MAX_FDS * 4 + 256) / 8];
    let mut addr = MaybeUninit::<libc::sockaddr_un>::zeroed();
    let mut iov = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: all-zero is a valid value; every pointer set below covers a buffer that outlives the call, with its size.
    // The control messages are walked with the C library's macros within what the kernel wrote; descriptors found in
    // them are new and owned by nobody else.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_name = addr.as_mut_ptr().cast();
        message.msg_namelen = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = control.len() * 8;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        let n = match check(libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) as i64) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            other => other?,
        };
        let mut files = Vec::new();
        let mut cmsg = libc::CMSG_FIRSTHDR(&raw const message);
        while let Some(header) = cmsg.as_ref() {
            if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
                let first = libc::CMSG_DATA(cmsg).cast::<i32>();
                let count = (header.cmsg_len - libc::CMSG_LEN(0) as usize) / 4;
                files.extend((0..count).map(|i| OwnedFd::from_raw_fd(first.add(i).read_unaligned())));
            }
            cmsg = libc::CMSG_NXTHDR(&raw const message, cmsg);
        }
        data.truncate(n as usize);
        let from =
            (message.msg_namelen > 2).then(|| path(&addr.assume_init(), message.msg_namelen)).flatten();
        Ok(Some(Peeked { data, from, files }))
    }
}

/// Sends bytes with descriptors, to `name` or to the peer. Does not wait.
pub fn send(fd: BorrowedFd<'_>, data: &[u8], files: &[i32], name: Option<&[u8]>) -> io::Result<usize> {
    let mut control = vec![0u64; (files.len() * 4 + 64) / 8];
    let mut target = name.map(address).transpose()?;
    let mut iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: all-zero is a valid value; every pointer set below covers a buffer that outlives the call, with its size;
    // the one control message is written inside `control`, which has room for its header and all descriptors.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        if let Some((addr, len)) = &mut target {
            message.msg_name = (&raw mut *addr).cast();
            message.msg_namelen = *len;
        }
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        if !files.is_empty() {
            let len = (files.len() * 4) as u32;
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(len) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(len) as usize;
            let first = libc::CMSG_DATA(header).cast::<i32>();
            for (i, file) in files.iter().enumerate() {
                first.add(i).write_unaligned(*file);
            }
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        check(libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) as i64).map(|n| n as usize)
    }
}

/// Takes ownership of a descriptor that a call just made and that nobody else owns.
pub fn own(fd: i32) -> OwnedFd {
    // SAFETY: by contract a fresh descriptor of the caller's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
