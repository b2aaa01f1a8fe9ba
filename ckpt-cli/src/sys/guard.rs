//! A process that acts when its parent dies: fork(2) without exec, so only system calls are allowed in it.

use super::check;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Level, name and value of an integer socket option.
pub type IntOption = (i32, i32, i32);

/// Most descriptors that a guard can hold.
const MAX_HELD: usize = 1 << 16;
/// Room for a control message with one descriptor (`CMSG_SPACE(4)`), aligned as the kernel wants it.
const CONTROL: usize = 24;

/// Starts a guard. It collects descriptors that it is sent one by one (`SCM_RIGHTS`), each with one byte
/// of data: the index of the list of options that is to be set on it. When the returned socket is closed, by our
/// death or otherwise, it sets them, in order, and ends; a byte without a descriptor ends it without. Its
/// PID is for waitpid(2).
///
/// # Errors
/// No more processes or descriptors.
pub fn spawn(lists: &[[IntOption; 2]]) -> io::Result<(OwnedFd, i32)> {
    let mut ends = [0; 2];
    // SAFETY: the array has room for the two descriptors that the call makes.
    let result = unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr())
    };
    check(result.into())?;
    // SAFETY: both were just made, and nobody else owns them.
    let (its, ours) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    let mut held = Vec::with_capacity(MAX_HELD);
    // SAFETY: the child calls nothing but system calls (`watch`) and never returns.
    let child = check(unsafe { libc::fork() }.into())? as i32;
    if child == 0 {
        watch(its.as_raw_fd(), lists, &mut held);
    }
    Ok((ours, child))
}

/// The child. Other threads do not exist in it and may have held locks: no allocation, no panic.
fn watch(socket: RawFd, lists: &[[IntOption; 2]], held: &mut Vec<(RawFd, u8)>) -> ! {
    // SAFETY: system calls on plain numbers, a zeroed and then filled signal set, and values behind
    // references; `_exit` runs no code of ours.
    unsafe {
        // Neither the terminal nor the group's other members are to end it first.
        libc::setsid();
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
        // Nothing else of ours stays open because of it; descriptor 0 is the socket.
        libc::dup2(socket, 0);
        libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0);
        while held.len() < held.capacity() {
            match receive(0) {
                Message::Hold(fd, list) => held.push((fd, list)),
                Message::Dismissed => libc::_exit(0),
                Message::Again => {}
                Message::Closed => break,
            }
        }
        for (fd, list) in held.iter() {
            for (level, name, value) in lists.get(usize::from(*list)).into_iter().flatten() {
                let length = size_of::<i32>() as libc::socklen_t;
                libc::setsockopt(*fd, *level, *name, (&raw const *value).cast(), length);
            }
        }
        libc::_exit(0)
    }
}

/// What the guard hears.
enum Message {
    Hold(RawFd, u8),
    Dismissed,
    Again,
    Closed,
}

/// Control data of a message, aligned for its header.
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// One message.
fn receive(socket: RawFd) -> Message {
    let mut byte = MaybeUninit::new(0_u8);
    let mut control = Control([0; CONTROL]);
    // SAFETY: an all-zero message header is valid; its pointers lead to the byte and to the control
    // data, both of the stated sizes, and live through the call. A control header is read only where the
    // kernel says that it wrote one, and its data is one descriptor because there is room for no more.
    unsafe {
        let mut piece = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut piece;
        header.msg_iovlen = 1;
        header.msg_control = (&raw mut control).cast();
        header.msg_controllen = CONTROL;
        let length = libc::recvmsg(socket, &raw mut header, 0);
        if length < 0 {
            return if *libc::__errno_location() == libc::EINTR { Message::Again } else { Message::Closed };
        }
        if length == 0 {
            return Message::Closed;
        }
        let rights = libc::CMSG_FIRSTHDR(&raw const header);
        if rights.is_null() || (*rights).cmsg_type != libc::SCM_RIGHTS {
            return Message::Dismissed;
        }
        Message::Hold(libc::CMSG_DATA(rights).cast::<RawFd>().read_unaligned(), byte.assume_init())
    }
}
