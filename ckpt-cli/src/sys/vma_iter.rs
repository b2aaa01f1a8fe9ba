//! Reading what a BPF program says of each mapping of a process (`bpf_iter_task_vma`, kernel/bpf/task_iter.c; of one
//! process alone since Linux 6.1).

use super::check;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// `BPF_LINK_CREATE`, `BPF_ITER_CREATE` (linux/bpf.h)
const LINK_CREATE: libc::c_long = 28;
const ITER_CREATE: libc::c_long = 33;
/// `BPF_TRACE_ITER`
const TRACE_ITER: u32 = 28;
/// Size of a specimen.
const PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// `union bpf_iter_link_info`, of tasks.
#[repr(C)]
#[derive(Default)]
struct Task {
    tid: u32,
    pid: u32,
    pid_fd: u32,
    _rest: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    info: u64,
    info_length: u32,
    _rest: u32,
}

#[repr(C)]
struct IterCreate {
    link: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the attributes are plain data of this size, and what they point to lives in the caller.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>())
    })?;
    // SAFETY: both commands return a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// What `program`, an iterator over mappings, writes for the process `pid`.
pub fn open(program: BorrowedFd<'_>, pid: i32) -> io::Result<File> {
    let task = Task { tid: pid as u32, ..Task::default() };
    let link = LinkCreate {
        program: program.as_raw_fd() as u32,
        target: 0,
        attach_type: TRACE_ITER,
        flags: 0,
        info: &raw const task as u64,
        info_length: size_of::<Task>() as u32,
        _rest: 0,
    };
    let link = bpf(LINK_CREATE, &link)?;
    Ok(bpf(ITER_CREATE, &IterCreate { link: link.as_raw_fd() as u32, flags: 0 })?.into())
}

/// Pages of our own, no two of which have the same flags.
#[derive(Debug)]
pub struct Specimens(Vec<NonNull<c_void>>);

impl Specimens {
    /// Maps them; what this kernel does not have is left out.
    pub fn new() -> io::Result<Self> {
        let mut all = Self(Vec::new());
        let advice = [
            MmapAdvise::MADV_NORMAL,
            MmapAdvise::MADV_DONTFORK,
            MmapAdvise::MADV_DONTDUMP,
            MmapAdvise::MADV_WIPEONFORK,
            MmapAdvise::MADV_HUGEPAGE,
            MmapAdvise::MADV_NOHUGEPAGE,
            MmapAdvise::MADV_MERGEABLE,
            MmapAdvise::MADV_SEQUENTIAL,
            MmapAdvise::MADV_RANDOM,
        ];
        for advice in advice {
            let at = all.map(MapFlags::empty())?;
            // SAFETY: nobody else knows the page; this advice changes no content.
            let _ = unsafe { madvise(at, PAGE.get(), advice) };
        }
        for flags in [MapFlags::MAP_NORESERVE, MapFlags::MAP_GROWSDOWN] {
            all.map(flags)?;
        }
        let locked = all.map(MapFlags::empty())?;
        // SAFETY: it is mapped.
        let _ = unsafe { mlock(locked, PAGE.get()) };
        // One that can never be written.
        let file = File::open("/proc/self/exe")?;
        // SAFETY: a new mapping, wherever the kernel likes.
        all.0.push(unsafe { mmap(None, PAGE, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, 0) }?);
        Ok(all)
    }

    fn map(&mut self, flags: MapFlags) -> io::Result<NonNull<c_void>> {
        let (prot, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE | flags);
        // SAFETY: a new mapping, wherever the kernel likes.
        let at = unsafe { mmap_anonymous(None, PAGE, prot, flags) }?;
        self.0.push(at);
        Ok(at)
    }

    /// Their addresses.
    pub fn addresses(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().map(|at| at.as_ptr() as u64)
    }
}

impl Drop for Specimens {
    fn drop(&mut self) {
        for at in &self.0 {
            // SAFETY: it was mapped here, and no reference into it was ever made.
            let _ = unsafe { munmap(*at, PAGE.get()) };
        }
    }
}
