//! Memory: process_vm_readv(2), process_vm_writev(2), and shared memory as a descriptor.

use super::check;
use std::io;

/// Reads memory of another process; short reads are errors.
pub fn read(pid: i32, address: u64, into: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        let rest = &mut into[done..];
        let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        let remote = libc::iovec { iov_base: (address as usize + done) as *mut _, iov_len: rest.len() };
        // SAFETY: `local` covers exactly the borrowed buffer; the remote side is checked by the kernel.
        let n = check(
            unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) } as i64
        )?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        done += n as usize;
    }
    Ok(())
}

/// Reads several ranges (address, length) of another process, one behind the other, with as few calls as possible;
/// short reads are errors. The buffer is as long as all ranges together.
pub fn read_ranges(pid: i32, ranges: &[(u64, usize)], mut into: &mut [u8]) -> io::Result<()> {
    /// IOV_MAX
    const MOST: usize = 1024;
    let mut rest =
        ranges.iter().map(|(at, len)| libc::iovec { iov_base: *at as usize as *mut _, iov_len: *len });
    let mut remote: Vec<libc::iovec> = Vec::with_capacity(ranges.len().min(MOST));
    loop {
        remote.extend(rest.by_ref().take(MOST - remote.len()));
        let wanted: usize = remote.iter().map(|r| r.iov_len).sum();
        if wanted == 0 {
            return Ok(());
        }
        let local = into.get_mut(..wanted).ok_or(io::ErrorKind::InvalidInput)?;
        let local = libc::iovec { iov_base: local.as_mut_ptr().cast(), iov_len: wanted };
        // SAFETY: `local` covers exactly borrowed bytes and the vector of remote ranges lives through the call; what
        // it says is checked by the kernel.
        let n = check(unsafe {
            libc::process_vm_readv(pid, &raw const local, 1, remote.as_ptr(), remote.len() as u64, 0)
        } as i64)? as usize;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        into = into.get_mut(n..).unwrap_or_default();
        // What is done goes; a range that was read in part begins later.
        let mut done = n;
        remote.retain_mut(|range| {
            let part = done.min(range.iov_len);
            done -= part;
            range.iov_base = (range.iov_base as usize + part) as *mut _;
            range.iov_len -= part;
            range.iov_len > 0
        });
    }
}

/// Writes memory of another process, subject to the protection of its mappings.
pub fn write(pid: i32, address: u64, from: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < from.len() {
        let rest = &from[done..];
        let local = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
        let remote = libc::iovec { iov_base: (address as usize + done) as *mut _, iov_len: rest.len() };
        // SAFETY: `local` covers exactly the borrowed buffer and is only read; the remote side is checked by the kernel.
        let n = check(
            unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) } as i64
        )?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        done += n as usize;
    }
    Ok(())
}

/// Shared anonymous memory of `size` bytes as a descriptor that others can map: what mmap(2) with
/// `MAP_SHARED | MAP_ANONYMOUS` makes, opened by its link in /proc/self/map_files.
pub fn shared_anonymous(size: u64) -> io::Result<std::os::fd::OwnedFd> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address that the kernel chooses; nothing refers to it before it is unmapped below.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), size as usize, prot, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let end = at as u64 + size.next_multiple_of(4096);
    let link = format!("/proc/self/map_files/{:x}-{end:x}", at as u64);
    let file = std::fs::File::options().read(true).write(true).open(link);
    // SAFETY: exactly the mapping made above, of which no reference exists.
    unsafe { libc::munmap(at, size as usize) };
    Ok(file?.into())
}
