//! io_uring(7): rings of our own, made like those of a program, and calls that ask a program's ring for its state.

use super::check;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Flags of io_uring_setup(2).
pub mod setup {
    /// The length of the completion queue is given.
    pub const CQSIZE: u32 = 1 << 3;
    /// The submission queue is the entries themselves, without an array of indexes.
    pub const NO_SQARRAY: u32 = 1 << 16;
}

/// `IORING_ENTER_GETEVENTS`.
pub const GETEVENTS: u32 = 1;
/// `IORING_ENTER_REGISTERED_RING`: the ring is named by its number in the thread's table of rings.
pub const REGISTERED_RING: u32 = 1 << 4;

/// Offsets of mmap(2): both queues; the entries of the submission queue.
pub const RINGS: u64 = 0;
/// See [`RINGS`].
pub const COMPLETIONS: u64 = 0x800_0000;
/// See [`RINGS`].
pub const ENTRIES: u64 = 0x1000_0000;

/// `struct io_uring_params`, as words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Params([u32; 30]);

impl Params {
    /// Where a program looks: `struct io_sqring_offsets` and `struct io_cqring_offsets`.
    pub fn offsets(&self) -> &[u32] {
        &self.0[10..]
    }

    /// Offset of the submission queue's tail.
    pub fn sq_tail(&self) -> usize {
        self.0[11] as usize
    }

    /// Offset of the submission queue's head.
    pub fn sq_head(&self) -> usize {
        self.0[10] as usize
    }

    /// Offset of the count of entries that the kernel has thrown away.
    pub fn sq_dropped(&self) -> usize {
        self.0[15] as usize
    }

    /// Offset of the array of indexes.
    pub fn sq_array(&self) -> usize {
        self.0[16] as usize
    }

    /// Offset of the completion queue's head.
    pub fn cq_head(&self) -> usize {
        self.0[20] as usize
    }

    /// Offset of the completion queue's tail.
    pub fn cq_tail(&self) -> usize {
        self.0[21] as usize
    }

    /// Offset of the count of completions that found no room.
    pub fn cq_overflow(&self) -> usize {
        self.0[24] as usize
    }

    /// Offset of the completions.
    pub fn completions(&self) -> usize {
        self.0[25] as usize
    }

    /// Bytes of both queues.
    pub fn rings_len(&self) -> usize {
        let [sq, cq, flags, ..] = self.0;
        match flags & setup::NO_SQARRAY {
            0 => self.sq_array() + 4 * sq as usize,
            _ => self.completions() + 16 * cq as usize,
        }
    }

    /// Bytes of the entries of the submission queue.
    pub fn entries_len(&self) -> usize {
        64 * self.0[0] as usize
    }
}

/// io_uring_setup(2), close-on-exec, with queues of these lengths.
pub fn setup(sq_entries: u32, cq_entries: u32, flags: u32) -> io::Result<(OwnedFd, Params)> {
    let mut params = Params::default();
    (params.0[1], params.0[2]) = (cq_entries, flags | setup::CQSIZE);
    // SAFETY: the structure has the kernel's size and lives across the call; the result is a new descriptor.
    unsafe {
        let fd = check(libc::syscall(libc::SYS_io_uring_setup, sq_entries, &raw mut params.0))?;
        Ok((OwnedFd::from_raw_fd(fd as i32), params))
    }
}

/// io_uring_enter(2) without a signal mask; gives how many entries were taken.
pub fn enter(ring: BorrowedFd<'_>, submit: u32, wait: u32, flags: u32) -> io::Result<u32> {
    // SAFETY: plain numbers and no pointer; what the entries say is the caller's business.
    let taken = unsafe {
        libc::syscall(
            libc::SYS_io_uring_enter,
            ring.as_raw_fd(),
            submit,
            wait,
            flags,
            std::ptr::null::<u8>(),
            0,
        )
    };
    check(taken).map(|taken| taken as u32)
}

/// Asks for the registration of an eventfd that cannot come about: the error tells how the ring was made.
pub fn why_no_eventfd(ring: BorrowedFd<'_>) -> i32 {
    const REGISTER_EVENTFD: u32 = 4;
    // SAFETY: the kernel copies four bytes from the address, where nothing is mapped, and refuses.
    let done = check(unsafe {
        libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), REGISTER_EVENTFD, 1, 1)
    });
    done.err().and_then(|error| error.raw_os_error()).unwrap_or(0)
}

/// Has the ring provided buffers in this group? ENOENT is no, EINVAL also that the kernel cannot tell.
pub fn buffer_group(ring: BorrowedFd<'_>, group: u16) -> io::Result<()> {
    const REGISTER_PBUF_STATUS: u32 = 26;
    let mut status = [0u32; 10];
    status[0] = group.into();
    // SAFETY: the structure has the kernel's size and lives across the call.
    let done = unsafe {
        let fd = ring.as_raw_fd();
        libc::syscall(libc::SYS_io_uring_register, fd, REGISTER_PBUF_STATUS, &raw mut status, 1)
    };
    check(done).map(drop)
}

/// A mapping of one of a ring's areas. Program and kernel may change it at any time.
#[derive(Debug)]
pub struct Area {
    at: NonNull<u8>,
    len: usize,
}

impl Area {
    /// Maps `len` bytes at one of the offsets.
    pub fn map(ring: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let (fd, offset) = (ring.as_raw_fd(), offset as libc::off_t);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, offset) };
        let at = NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED);
        Ok(Self { at: at.ok_or_else(io::Error::last_os_error)?, len })
    }

    /// What is there now. EFAULT where the ring has less than was mapped: touching that would be fatal.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.len];
        super::memory::read(std::process::id() as i32, self.at.as_ptr() as u64, &mut bytes)?;
        Ok(bytes)
    }

    /// Writes from the beginning on.
    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > self.len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        super::memory::write(std::process::id() as i32, self.at.as_ptr() as u64, bytes)
    }

    /// A word of an area that the ring has in full.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.len, "word at {offset} of {}", self.len);
        // SAFETY: an aligned word within the mapping, which lives as long as `self`; the kernel uses single
        // instructions on it, too.
        unsafe { AtomicU32::from_ptr(self.at.as_ptr().add(offset).cast()) }
    }

    /// Sets a word.
    pub fn set(&self, offset: usize, value: u32) {
        self.word(offset).store(value, Ordering::Release);
    }

    /// A word's value.
    pub fn get(&self, offset: usize) -> u32 {
        self.word(offset).load(Ordering::Acquire)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`; no borrow of it lives on.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}
