//! System V shared memory: shmat(2), shmctl(2).

use super::check;
use std::fs::File;
use std::io;
use std::ptr;

/// `SHM_LOCK` of linux/shm.h.
const SHM_LOCK: libc::c_int = 11;

/// A segment attached to our own address space, until this value goes.
#[derive(Debug)]
pub struct Attached {
    at: *mut u8,
    /// Bytes: whole pages.
    len: usize,
}

impl Attached {
    /// Attaches segment `id`, which has `size` bytes.
    pub fn new(id: i32, size: u64, read_only: bool) -> io::Result<Self> {
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { libc::shmat(id, ptr::null(), if read_only { libc::SHM_RDONLY } else { 0 }) };
        if at as isize == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { at: at.cast(), len: (size as usize).next_multiple_of(4096) })
    }

    /// The segment as a file.
    pub fn file(&self, write: bool) -> io::Result<File> {
        let (start, end) = (self.at as usize, self.at as usize + self.len);
        File::options().read(true).write(write).open(format!("/proc/self/map_files/{start:x}-{end:x}"))
    }

    /// What is behind the first `size` bytes in the last page, where no file operation comes.
    pub fn tail(&self, size: u64) -> Vec<u8> {
        let mut tail = vec![0; self.len.saturating_sub(size as usize)];
        // SAFETY: the range lies in the attached pages. Other processes may write meanwhile: it is copied as raw bytes.
        unsafe {
            ptr::copy_nonoverlapping(self.at.add(self.len - tail.len()), tail.as_mut_ptr(), tail.len())
        };
        tail
    }

    /// Writes what is behind the first `size` bytes in the last page; as much as there is room for.
    pub fn set_tail(&self, size: u64, tail: &[u8]) {
        let room = self.len.saturating_sub(size as usize);
        // SAFETY: the range lies in the attached pages, which nobody else has yet; `self` was attached for writing.
        unsafe {
            ptr::copy_nonoverlapping(tail.as_ptr(), self.at.add(self.len - room), tail.len().min(room));
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; no reference into it was given out.
        unsafe { libc::shmdt(self.at.cast()) };
    }
}

fn control(id: i32, command: libc::c_int, argument: *mut libc::shmid_ds) -> io::Result<()> {
    // SAFETY: `argument` is null where the command takes none, or a valid structure of our own.
    check(unsafe { libc::shmctl(id, command, argument) }.into()).map(drop)
}

/// Sets owner and permission bits.
pub fn set(id: i32, owner: (u32, u32), mode: u32) -> io::Result<()> {
    // SAFETY: a plain structure of integers, for which zeros are valid.
    let mut wanted: libc::shmid_ds = unsafe { std::mem::zeroed() };
    (wanted.shm_perm.uid, wanted.shm_perm.gid) = owner;
    wanted.shm_perm.mode = mode as _;
    control(id, libc::IPC_SET, &raw mut wanted)
}

/// Keeps it out of swap.
pub fn lock(id: i32) -> io::Result<()> {
    control(id, SHM_LOCK, ptr::null_mut())
}

/// Destroys it, at once or with its last attach.
pub fn remove(id: i32) -> io::Result<()> {
    control(id, libc::IPC_RMID, ptr::null_mut())
}
