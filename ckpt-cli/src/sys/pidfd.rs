//! pidfd_open(2), pidfd_getfd(2): a process as a descriptor, and its descriptors as ours.

use super::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A descriptor that refers to the process and never to a later one with the same number.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; a non-negative result is a new descriptor that nobody else owns.
    unsafe {
        let fd = check(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// A duplicate of descriptor `fd` of the process: the same open file description, close-on-exec.
pub fn getfd(pidfd: BorrowedFd<'_>, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; a non-negative result is a new descriptor that nobody else owns.
    unsafe {
        let fd = check(libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Sends a signal to the process behind the descriptor.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: plain numbers and a null siginfo, which the call allows.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, 0usize, 0) })
        .map(drop)
}

/// Makes a descriptor ours that another process has sent (`SCM_RIGHTS`).
pub fn adopt(fd: std::os::fd::RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made it for us, and nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
