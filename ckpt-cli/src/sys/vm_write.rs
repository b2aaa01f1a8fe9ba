//! process_vm_writev(2) of many pieces at once.

use super::check;
use std::io;

/// IOV_MAX
const MOST: usize = 1024;

/// Writes pieces to addresses of another process with as few calls as possible, subject to the protection of its
/// mappings.
///
/// # Errors
/// The kernel's, with the address that could not be written.
pub fn write_pieces(pid: i32, pieces: &[(u64, &[u8])]) -> Result<(), (u64, io::Error)> {
    let (mut local, mut remote) = (Vec::new(), Vec::new());
    for group in pieces.chunks(MOST) {
        local.clear();
        remote.clear();
        for (at, bytes) in group.iter().filter(|(_, bytes)| !bytes.is_empty()) {
            local.push(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
            remote.push(libc::iovec { iov_base: *at as usize as *mut _, iov_len: bytes.len() });
        }
        let (mut local, mut remote) = (&mut local[..], &mut remote[..]);
        while let Some(first) = remote.first() {
            let at = first.iov_base as u64;
            let (locals, remotes) = (local.len() as u64, remote.len() as u64);
            // SAFETY: the local ranges cover bytes that are borrowed through the call and only read; the remote side is
            // checked by the kernel; both vectors have the stated lengths.
            let n = check(unsafe {
                libc::process_vm_writev(pid, local.as_ptr(), locals, remote.as_ptr(), remotes, 0)
            } as i64)
            .map_err(|error| (at, error))? as usize;
            if n == 0 {
                return Err((at, io::ErrorKind::WriteZero.into()));
            }
            local = advance(local, n);
            remote = advance(remote, n);
        }
    }
    Ok(())
}

/// Drops the first `done` bytes of the ranges.
fn advance(mut ranges: &mut [libc::iovec], mut done: usize) -> &mut [libc::iovec] {
    while done > 0 {
        let Some(first) = ranges.first_mut() else { break };
        let part = done.min(first.iov_len);
        first.iov_base = (first.iov_base as usize + part) as *mut _;
        first.iov_len -= part;
        done -= part;
        if first.iov_len == 0 {
            ranges = &mut ranges[1..];
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_land_where_they_belong_and_a_hole_is_named() {
        let mut target = vec![0u8; 3 << 20];
        let base = target.as_mut_ptr() as u64;
        let data: Vec<u8> = (0..3 << 20).map(|i| (i / 11) as u8).collect();
        // More pieces than one call takes, in reverse, of different sizes.
        let pieces: Vec<(u64, &[u8])> = data
            .chunks(999)
            .scan(0, |at, piece| {
                let here = *at;
                *at += piece.len() as u64;
                Some((base + here, piece))
            })
            .collect();
        let reversed: Vec<_> = pieces.iter().rev().copied().collect();
        let pid = std::process::id() as i32;
        write_pieces(pid, &reversed).unwrap();
        assert!(target == data);
        let (at, _) = write_pieces(pid, &[(base, &data[..10]), (4096, &data[..10])]).unwrap_err();
        assert_eq!(at, 4096);
    }
}
