//! process_vm_readv(2) and process_vm_writev(2).

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
