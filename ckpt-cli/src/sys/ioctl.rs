//! ioctl(2) requests on descriptors of kernel objects, and socket options that nix does not know.

use super::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// TFD_IOC_SET_TICKS: sets the expirations of a timerfd that were not read yet (needs CONFIG_CHECKPOINT_RESTORE).
pub fn timerfd_set_ticks(fd: BorrowedFd<'_>, ticks: u64) -> io::Result<()> {
    /// _IOW('T', 0, u64)
    const TFD_IOC_SET_TICKS: libc::c_ulong = (1 << 30) | (8 << 16) | (0x54 << 8);
    // SAFETY: the request reads one u64, which lives across the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) }.into()).map(drop)
}

/// FIONREAD: bytes that can be read.
pub fn readable(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut n: libc::c_int = 0;
    // SAFETY: the request writes one int, which lives across the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut n) }.into())?;
    Ok(n as usize)
}

/// SIOCOUTQ: bytes sent that the other side has not taken.
pub fn unsent(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut n: libc::c_int = 0;
    // SAFETY: the request writes one int, which lives across the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut n) }.into())?;
    Ok(n as usize)
}

/// Reads a socket option whose value is a plain integer structure, as bytes.
pub fn sockopt(fd: BorrowedFd<'_>, level: i32, name: i32, max: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; max];
    let mut len = max as libc::socklen_t;
    // SAFETY: the buffer has the stated length and outlives the call.
    let r = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    check(r.into())?;
    value.truncate(len as usize);
    Ok(value)
}

/// Reads a socket option that is an int.
pub fn sockopt_int(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let v = sockopt(fd, level, name, 4)?;
    Ok(v.try_into().map(i32::from_ne_bytes).unwrap_or(0))
}

/// Sets a socket option from bytes.
pub fn set_sockopt(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: the buffer has the stated length and is only read.
    let r = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as libc::socklen_t)
    };
    check(r.into()).map(drop)
}

/// Sets a socket option that is an int.
pub fn set_sockopt_int(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    set_sockopt(fd, level, name, &value.to_ne_bytes())
}

/// flock(2); `operation` is `LOCK_*`.
pub fn flock(fd: BorrowedFd<'_>, operation: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(unsafe { libc::flock(fd.as_raw_fd(), operation) }.into()).map(drop)
}

/// signalfd4(2) for a mask with bit n-1 for signal n, real-time signals included; close-on-exec.
pub fn signalfd(mask: u64) -> io::Result<OwnedFd> {
    // SAFETY: the mask lives across the call and has the stated size; the result is a new descriptor.
    unsafe {
        let fd = check(libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, libc::SFD_CLOEXEC))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Receiver of `SIGIO` (F_GETOWN_EX, F_GETSIG): (type, pid, signal).
pub fn owner(fd: BorrowedFd<'_>) -> io::Result<(i32, i32, i32)> {
    /// `struct f_owner_ex`
    #[repr(C)]
    #[derive(Default)]
    struct Owner {
        kind: i32,
        pid: i32,
    }
    const F_GETOWN_EX: i32 = 16;
    const F_GETSIG: i32 = 11;
    let mut owner = Owner::default();
    // SAFETY: the first request writes the structure, which lives across the call; the second has no argument.
    let signal = unsafe {
        check(libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner).into())?;
        check(libc::fcntl(fd.as_raw_fd(), F_GETSIG).into())?
    };
    Ok(if owner.pid == 0 { (0, 0, signal as i32) } else { (owner.kind, owner.pid, signal as i32) })
}
