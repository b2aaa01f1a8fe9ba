//! sync_file_range(2): getting written bytes to the disk while more are written.

use super::check;
use std::{fs::File, io, os::fd::AsRawFd};

/// Begins to write out dirty pages of a range, without waiting for it.
///
/// # Errors
/// That of the system call: among others EINVAL or ESPIPE where the file system has no such thing.
pub fn start(file: &File, offset: u64, length: u64) -> io::Result<()> {
    range(file, offset, length, libc::SYNC_FILE_RANGE_WRITE)
}

/// Writes a range out and waits for it. Nothing becomes durable by that: metadata and the disk's
/// cache are not flushed.
///
/// # Errors
/// That of the system call; an error of the disk is reported once, here or by fsync(2).
pub fn wait(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let all =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    range(file, offset, length, all)
}

fn range(file: &File, offset: u64, length: u64, flags: libc::c_uint) -> io::Result<()> {
    let (offset, length) = (offset as libc::off64_t, length as libc::off64_t);
    // SAFETY: it takes no pointers; the descriptor is open as long as `file` lives.
    check(unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, flags) }.into()).map(drop)
}
