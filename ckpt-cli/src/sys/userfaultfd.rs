//! userfaultfd(2): who writes where, and what is missing (Documentation/admin-guide/mm/userfaultfd.rst).

use super::check;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// `UFFD_FEATURE_*` of linux/userfaultfd.h.
pub mod feature {
    /// Write protection, and its flag in messages (since Linux 5.7).
    pub const PAGEFAULT_FLAG_WP: u64 = 1;
    /// fork(2) waits until its event is read, and the child is registered as its parent is.
    pub const EVENT_FORK: u64 = 1 << 1;
    /// mremap(2) waits until its event is read.
    pub const EVENT_REMAP: u64 = 1 << 2;
    /// madvise(2) waits until the event of `MADV_DONTNEED` or `MADV_REMOVE` is read.
    pub const EVENT_REMOVE: u64 = 1 << 3;
    /// munmap(2) waits until its event is read.
    pub const EVENT_UNMAP: u64 = 1 << 6;
    /// Write protection of shared memory (since Linux 5.19).
    pub const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
    /// Pages that were never touched can be protected, too (since Linux 6.4).
    pub const WP_UNPOPULATED: u64 = 1 << 13;
    /// The kernel lifts the protection by itself and nobody is asked (since Linux 6.7).
    pub const WP_ASYNC: u64 = 1 << 15;
}

/// What a range is registered for (`UFFDIO_REGISTER_MODE_*`).
pub mod mode {
    /// Pages that are not there.
    pub const MISSING: u64 = 1;
    /// Writes to protected pages.
    pub const WP: u64 = 2;
}

/// Number of the ioctl on `/dev/userfaultfd` that makes a userfaultfd for the calling process: `_IO(0xAA, 0)`.
pub const IOC_NEW: u64 = 0xaa00;

const fn ioctl(direction: libc::c_ulong, number: libc::c_ulong, size: usize) -> libc::c_ulong {
    (direction << 30) | ((size as libc::c_ulong) << 16) | (0xaa << 8) | number
}

const READ: libc::c_ulong = 2;
const READ_WRITE: libc::c_ulong = 3;
const UFFDIO_API: libc::c_ulong = ioctl(READ_WRITE, 0x3f, 24);
const UFFDIO_REGISTER: libc::c_ulong = ioctl(READ_WRITE, 0, 32);
const UFFDIO_UNREGISTER: libc::c_ulong = ioctl(READ, 1, 16);
const UFFDIO_WAKE: libc::c_ulong = ioctl(READ, 2, 16);
const UFFDIO_COPY: libc::c_ulong = ioctl(READ_WRITE, 3, 40);
const UFFDIO_ZEROPAGE: libc::c_ulong = ioctl(READ_WRITE, 4, 32);
const UFFDIO_WRITEPROTECT: libc::c_ulong = ioctl(READ_WRITE, 6, 24);
/// `UFFD_API`
const API: u64 = 0xaa;
/// `UFFD_EVENT_*`
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;
/// Size of `struct uffd_msg`.
const MESSAGE: usize = 32;

/// A fault that waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// `UFFD_PAGEFAULT_FLAG_*`: 1 a write, 2 to a protected page.
    pub flags: u64,
    /// Where.
    pub address: u64,
}

/// What happens in the address space. All but a fault only with their [`feature`]s.
#[derive(Debug)]
pub enum Event {
    /// A page is missing, or protected.
    Fault(Fault),
    /// There is a child, with a userfaultfd of its own.
    Fork(Userfaultfd),
    /// So many bytes were moved.
    Remap {
        /// From this address.
        from: u64,
        /// To this one.
        to: u64,
        /// So many.
        len: u64,
    },
    /// The pages of a range were dropped (its mapping stays), or its mapping.
    Gone {
        /// First address.
        start: u64,
        /// First address behind.
        end: u64,
    },
}

/// Opens `/dev/userfaultfd`: whoever holds it may make userfaultfds that see faults of the kernel, too,
/// whatever its privileges (since Linux 6.1).
///
/// # Errors
/// No such device, or no right to open it.
pub fn device() -> io::Result<File> {
    File::options().read(true).write(true).open("/dev/userfaultfd")
}

/// A userfaultfd. It belongs to the address space in which it was made, whoever holds it; when the last
/// descriptor is closed, everything it has registered and protected is as before.
#[derive(Debug)]
pub struct Userfaultfd(OwnedFd);

impl From<OwnedFd> for Userfaultfd {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Userfaultfd> for OwnedFd {
    fn from(uffd: Userfaultfd) -> Self {
        uffd.0
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Userfaultfd {
    fn request(&self, number: libc::c_ulong, words: &mut [u64]) -> io::Result<()> {
        // SAFETY: each caller passes as many words as the size in its request number says; the kernel reads and
        // writes only them.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), number, words.as_mut_ptr()) }.into()).map(drop)
    }

    /// Begins its use with these [`feature`]s.
    ///
    /// # Errors
    /// `EINVAL` where the kernel lacks one.
    pub fn enable(&self, features: u64) -> io::Result<()> {
        self.request(UFFDIO_API, &mut [API, features, 0])
    }

    /// Registers a range for a [`mode`]; a range that is registered already may be registered again.
    ///
    /// # Errors
    /// `ESRCH`: the address space is gone. `EBUSY`: another userfaultfd has it. `EINVAL`, `EPERM`: memory of a
    /// kind that cannot be registered. `ENOMEM`: nothing is mapped there.
    pub fn register(&self, start: u64, end: u64, mode: u64) -> io::Result<()> {
        self.request(UFFDIO_REGISTER, &mut [start, end - start, mode, 0])
    }

    /// Takes a registration back; protection in the range ends.
    ///
    /// # Errors
    /// As for [`Self::register`].
    pub fn unregister(&self, start: u64, end: u64) -> io::Result<()> {
        self.request(UFFDIO_UNREGISTER, &mut [start, end - start])
    }

    /// Protects the pages of a range against writes, or lifts that and wakes who waits.
    ///
    /// # Errors
    /// `ENOENT`: not registered. `EAGAIN`: mappings are being changed.
    pub fn write_protect(&self, start: u64, end: u64, protect: bool) -> io::Result<()> {
        self.request(UFFDIO_WRITEPROTECT, &mut [start, end - start, protect.into()])
    }

    /// Wakes who waits for pages of a range.
    ///
    /// # Errors
    /// `EINVAL`: not a range of pages.
    pub fn wake(&self, start: u64, end: u64) -> io::Result<()> {
        self.request(UFFDIO_WAKE, &mut [start, end - start])
    }

    /// Puts content where pages are missing, and wakes who waits. With `protect` they are protected against
    /// writes at once.
    ///
    /// # Errors
    /// `EEXIST`: a page is there already. `ENOENT`: nothing is registered there (any more). `EAGAIN`: mappings are
    /// being changed. What was done before an error stays; the number of bytes is lost.
    pub fn copy(&self, at: u64, content: &[u8], protect: bool) -> io::Result<()> {
        /// `UFFDIO_COPY_MODE_WP`
        const MODE_WP: u64 = 2;
        let mode = if protect { MODE_WP } else { 0 };
        self.request(UFFDIO_COPY, &mut [at, content.as_ptr() as u64, content.len() as u64, mode, 0])
    }

    /// Puts zeros where pages are missing, and wakes who waits.
    ///
    /// # Errors
    /// As for [`Self::copy`].
    pub fn zero(&self, start: u64, end: u64) -> io::Result<()> {
        self.request(UFFDIO_ZEROPAGE, &mut [start, end - start, 0, 0])
    }

    /// Faults that wait, at most some dozens; none if there are none (the descriptor does not block).
    ///
    /// # Errors
    /// The kernel's.
    pub fn faults(&self) -> io::Result<Vec<Fault>> {
        let faults = self.events()?.into_iter().filter_map(|event| match event {
            Event::Fault(fault) => Some(fault),
            _ => None,
        });
        Ok(faults.collect())
    }

    /// What has happened, in order, at most some dozens; nothing if nothing has (the descriptor does not block).
    ///
    /// # Errors
    /// The kernel's.
    pub fn events(&self) -> io::Result<Vec<Event>> {
        let mut messages = [0_u8; MESSAGE * 64];
        // SAFETY: the kernel writes at most as many bytes as the buffer has.
        let n = unsafe { libc::read(self.0.as_raw_fd(), messages.as_mut_ptr().cast(), messages.len()) };
        let n = match check(n as libc::c_long) {
            Ok(n) => n as usize,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        // struct uffd_msg: event u8, 7 bytes; up to three words
        let events = messages[..n].chunks_exact(MESSAGE).filter_map(|message| {
            let word = |i: usize| {
                let bytes = &message[8 + 8 * i..16 + 8 * i];
                u64::from_ne_bytes(bytes.try_into().unwrap_or_default())
            };
            Some(match message[0] {
                // flags, address, thread u32
                EVENT_PAGEFAULT => Event::Fault(Fault { flags: word(0), address: word(1) }),
                // A descriptor that the read has just made, and that nobody else owns.
                EVENT_FORK => Event::Fork(super::unix_socket::own(word(0) as u32 as i32).into()),
                EVENT_REMAP => Event::Remap { from: word(0), to: word(1), len: word(2) },
                EVENT_REMOVE | EVENT_UNMAP => Event::Gone { start: word(0), end: word(1) },
                _ => return None,
            })
        });
        Ok(events.collect())
    }
}
