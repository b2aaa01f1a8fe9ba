//! Socket options and ioctls that nix does not wrap, as typed values.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Reads an option whose value has a fixed size.
///
/// # Errors
/// The kernel's; `InvalidData` where it gives another size.
pub fn get<T: FromBytes + IntoBytes>(socket: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<T> {
    let mut value = T::new_zeroed();
    let bytes = value.as_mut_bytes();
    let wanted = bytes.len();
    let length = get_into(socket, level, name, bytes)?;
    if length != wanted {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{length} bytes instead of {wanted}"),
        ));
    }
    Ok(value)
}

/// Reads an option into a buffer and tells how much of it was filled. What a call such as
/// `TCP_REPAIR_WINDOW` finds in the buffer beforehand may matter: pass zeros otherwise.
///
/// # Errors
/// The kernel's.
pub fn get_into(socket: BorrowedFd<'_>, level: i32, name: i32, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(buffer.len()).unwrap_or(libc::socklen_t::MAX);
    // SAFETY: the kernel writes at most `length` bytes, and `buffer` has at least as many.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(length as usize) }
}

/// Sets an option.
///
/// # Errors
/// The kernel's.
pub fn set<T: IntoBytes + Immutable + ?Sized>(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: &T,
) -> io::Result<()> {
    let bytes = value.as_bytes();
    let length = libc::socklen_t::try_from(bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the kernel reads `length` bytes, which `bytes` has.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, bytes.as_ptr().cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Bytes in the receive queue that can be read (`SIOCINQ`; for UDP: of the first datagram).
///
/// # Errors
/// The kernel's; `EINVAL` for a listening socket.
pub fn input_queue(socket: BorrowedFd<'_>) -> io::Result<usize> {
    queue(socket, libc::FIONREAD)
}

/// Bytes in the send queue (`SIOCOUTQ`): for TCP what is not acknowledged, a FIN counting as one.
///
/// # Errors
/// The kernel's; `EINVAL` for a listening socket.
pub fn output_queue(socket: BorrowedFd<'_>) -> io::Result<usize> {
    queue(socket, libc::TIOCOUTQ)
}

/// Bytes in a TCP send queue that were never sent (`SIOCOUTQNSD`, linux/sockios.h).
///
/// # Errors
/// The kernel's; `EINVAL` for a listening socket.
pub fn unsent(socket: BorrowedFd<'_>) -> io::Result<usize> {
    queue(socket, SIOCOUTQNSD)
}

/// Accepts a connection; the descriptor is close-on-exec.
///
/// # Errors
/// The kernel's.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let none = std::ptr::null_mut();
    // SAFETY: no address is asked for; a non-negative result is a new descriptor that nobody else owns.
    unsafe {
        let fd = libc::accept4(listener.as_raw_fd(), none, none.cast(), libc::SOCK_CLOEXEC);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Which of the events that poll(2) knows have happened; `POLLERR` and `POLLHUP` unasked.
///
/// # Errors
/// The kernel's.
pub fn events(socket: BorrowedFd<'_>, wanted: i16) -> io::Result<i16> {
    let mut fd = libc::pollfd { fd: socket.as_raw_fd(), events: wanted, revents: 0 };
    // SAFETY: one structure that lives through the call, and no waiting.
    let result = unsafe { libc::poll(&raw mut fd, 1, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(fd.revents) }
}

const SIOCOUTQNSD: libc::Ioctl = 0x894B;

fn queue(socket: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: these requests write one int through the pointer.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(usize::try_from(bytes).unwrap_or(0)) }
}
