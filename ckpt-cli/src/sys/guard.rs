//! A process that acts when its parent dies: fork(2) without exec, so only system calls are allowed in it.

use super::check;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Level, name and value of an integer socket option.
pub type IntOption = (i32, i32, i32);

/// Starts a process that waits until the returned pipe is written to or closed. Closed without a
/// word, by our death or otherwise, it sets the options on the sockets, in order; then it ends. Its
/// PID is for waitpid(2).
///
/// # Errors
/// No more processes or descriptors.
pub fn spawn(sockets: &[(RawFd, [IntOption; 2])]) -> io::Result<(OwnedFd, i32)> {
    let mut ends = [0; 2];
    // SAFETY: the array has room for the two descriptors that the call makes.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }.into())?;
    // SAFETY: both were just made, and nobody else owns them.
    let (read, write) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    // SAFETY: the child calls nothing but system calls (`watch`) and never returns.
    let child = check(unsafe { libc::fork() }.into())? as i32;
    if child == 0 {
        watch(read.as_raw_fd(), write.as_raw_fd(), sockets);
    }
    Ok((write, child))
}

/// The child. Other threads do not exist in it and may have held locks: no allocation, no panic.
fn watch(read: RawFd, write: RawFd, sockets: &[(RawFd, [IntOption; 2])]) -> ! {
    // SAFETY: system calls on plain numbers, a zeroed and then filled signal set, a byte on the stack
    // and values behind references; `_exit` runs no code of ours.
    unsafe {
        // Neither the terminal nor the group's other members are to end it first.
        libc::setsid();
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
        libc::close(write);
        let mut byte = 0_u8;
        if libc::read(read, (&raw mut byte).cast(), 1) != 1 {
            for (socket, options) in sockets {
                for (level, name, value) in options {
                    let length = size_of::<i32>() as libc::socklen_t;
                    libc::setsockopt(*socket, *level, *name, (&raw const *value).cast(), length);
                }
            }
        }
        libc::_exit(0)
    }
}
