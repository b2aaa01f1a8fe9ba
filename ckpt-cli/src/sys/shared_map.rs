//! Memory that a BPF map shares with us (`BPF_F_MMAPABLE` arrays, since Linux 5.5).

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// An array map of `T`s, mapped. Programs in the kernel change it while we look.
#[derive(Debug)]
pub struct SharedMap<T> {
    at: NonNull<T>,
    length: usize,
    _type: PhantomData<T>,
}

// SAFETY: the mapping belongs to this value and can be used and unmapped by any thread; access goes through raw
// pointers and atomics only.
unsafe impl<T> Send for SharedMap<T> {}

/// Plain words, for which any content is a value and which fill their place in the array (a multiple of 8 bytes).
///
/// # Safety
/// The type must be as described.
pub unsafe trait Plain: Copy {}

// SAFETY: a number.
unsafe impl Plain for u64 {}
// SAFETY: structures and arrays of numbers, `repr(C)`, of 8-byte words.
unsafe impl Plain for ckpt_common::bpf::CowControl {}
// SAFETY: as above.
unsafe impl Plain for ckpt_common::bpf::CowRegion {}
// SAFETY: as above.
unsafe impl Plain for ckpt_common::bpf::CowPage {}

impl<T: Plain> SharedMap<T> {
    /// Maps an array of so many entries.
    ///
    /// # Errors
    /// The map is smaller, or not made to be mapped.
    pub fn new(map: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), length * size_of::<T>(), prot, flags, map.as_raw_fd(), 0)
        };
        let at = NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED);
        Ok(Self { at: at.ok_or_else(io::Error::last_os_error)?, length, _type: PhantomData })
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.length
    }

    /// No entries?
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    fn entry(&self, index: usize) -> *mut T {
        assert!(index < self.length, "entry {index} of {}", self.length);
        // SAFETY: within the mapping, as was just checked.
        unsafe { self.at.as_ptr().add(index) }
    }

    /// A copy of an entry.
    pub fn get(&self, index: usize) -> T {
        // SAFETY: an entry of the mapping; any content is a value of a plain type.
        unsafe { self.entry(index).read_volatile() }
    }

    /// Writes an entry.
    pub fn set(&self, index: usize, value: T) {
        // SAFETY: an entry of the mapping; nobody has a reference into it.
        unsafe { self.entry(index).write_volatile(value) }
    }
}

impl SharedMap<u64> {
    /// An entry as an atomic number.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        // SAFETY: an aligned word of the mapping, which lives as long as `self`; programs change it by single
        // instructions, too.
        unsafe { AtomicU64::from_ptr(self.entry(index)) }
    }
}

impl SharedMap<ckpt_common::bpf::CowControl> {
    /// Slots that were taken, and those that were emptied.
    pub fn progress(&self) -> (&AtomicU64, &AtomicU64) {
        let control = self.entry(0);
        // SAFETY: two aligned words of the mapping, which lives as long as `self`.
        unsafe {
            (AtomicU64::from_ptr(&raw mut (*control).taken), AtomicU64::from_ptr(&raw mut (*control).emptied))
        }
    }
}

impl SharedMap<ckpt_common::bpf::CowPage> {
    /// Content of a page that nobody writes to any more.
    pub fn page(&self, index: usize) -> &[u8] {
        // SAFETY: an entry of the mapping; its writer has finished, and the slot is not given to another before the
        // reader says so.
        unsafe { &(*self.entry(index)).0 }
    }
}

impl<T> Drop for SharedMap<T> {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no borrow of it lives on.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.length * size_of::<T>()) };
    }
}
