//! Memory that is there before it is needed: anonymous mappings of our own, faulted in ahead.

use std::io;
use std::ptr::NonNull;

/// A private anonymous mapping.
#[derive(Debug)]
pub struct Arena {
    at: NonNull<u8>,
    size: usize,
}

// SAFETY: the mapping belongs to this value alone and may be used and unmapped by any thread.
unsafe impl Send for Arena {}
// SAFETY: a shared reference only reads.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps `size` bytes. Huge pages are not asked for: where memory is in pieces, the kernel would move others' pages
    /// about for each of them, which takes several times as long as the copy.
    ///
    /// # Errors
    /// No address space, or a size of zero.
    pub fn new(size: usize) -> io::Result<Self> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), size, prot, flags | libc::MAP_NORESERVE, -1, 0) };
        let at = NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED);
        let arena = Self { at: at.ok_or_else(io::Error::last_os_error)?, size };
        // Not for children: a fork(2) would copy page tables and turn every write into a fault.
        // SAFETY: advice about exactly this mapping, which does not change its content here.
        unsafe { libc::madvise(arena.at.as_ptr().cast(), size, libc::MADV_DONTFORK) };
        Ok(arena)
    }

    /// Makes the pages of `[start, end)` present.
    ///
    /// # Errors
    /// No memory.
    pub fn fault_in(&mut self, start: usize, end: usize) -> io::Result<()> {
        let (start, end) = (start / 4096 * 4096, end.min(self.size));
        if start >= end {
            return Ok(());
        }
        // SAFETY: a part of this mapping; its pages become present with the content they have.
        let result = unsafe {
            libc::madvise(self.at.as_ptr().add(start).cast(), end - start, libc::MADV_POPULATE_WRITE)
        };
        super::check(result.into()).map(drop)
    }

    /// Gives memory back; `[start, end)` reads as zero afterwards. Only whole pages within it are meant.
    pub fn discard(&mut self, start: usize, end: usize) {
        let (start, end) = (start.next_multiple_of(4096), end.min(self.size) / 4096 * 4096);
        if start < end {
            // SAFETY: a part of this mapping, nobody else refers to it; failure would change nothing.
            unsafe { libc::madvise(self.at.as_ptr().add(start).cast(), end - start, libc::MADV_DONTNEED) };
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is readable, initialised (zeros or what was written), and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.size) }
    }

    /// Its bytes, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and writable; the exclusive borrow of `self` makes the slice the only access.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.size) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no borrow of it lives on.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_there_and_goes() {
        let mut arena = Arena::new(1 << 20).unwrap();
        arena.fault_in(4096, 1 << 20).unwrap();
        arena.bytes_mut().fill(7);
        arena.discard(1, 3 * 4096 + 1);
        let bytes = arena.bytes();
        assert!(bytes[..4096].iter().chain(&bytes[3 * 4096..]).all(|b| *b == 7));
        assert!(bytes[4096..3 * 4096].iter().all(|b| *b == 0));
        assert!(Arena::new(0).is_err());
    }
}
