//! All `unsafe` of ckpt: system calls and ioctls that no crate wraps, one file per kernel interface.
//!
//! Everything here is a thin typed call: it decides nothing and keeps nothing.

pub mod arena;
pub mod batch_code;
pub mod bpf_object;
pub mod clone;
pub mod cpu;
pub mod fork;
pub mod guard;
pub mod io_uring;
pub mod ioctl;
pub mod kcmp;
pub mod memory;
pub mod pagemap;
pub mod pidfd;
pub mod ptrace;
pub mod shared_map;
pub mod socket;
pub mod sysv;
pub mod task;
pub mod unix_socket;
pub mod userfaultfd;
pub mod vm_write;
pub mod vma_iter;
pub mod write_behind;

use std::io;

/// Result of a raw system call as the C library's wrapper gives it: -1 and errno.
fn check(result: libc::c_long) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
