//! kcmp(2): do two processes share a kernel object?

use super::check;
use std::cmp::Ordering;
use std::io;

/// What is compared.
#[derive(Clone, Copy, Debug)]
pub enum Resource {
    /// The address space.
    Vm = 1,
    /// The descriptor table.
    Files = 2,
    /// Working directory, root and umask.
    Fs = 3,
    /// Signal actions.
    Sighand = 4,
}

fn kcmp(pid1: i32, pid2: i32, kind: i32, a: u64, b: u64) -> io::Result<Ordering> {
    // SAFETY: plain numbers.
    Ok(match check(unsafe { libc::syscall(libc::SYS_kcmp, pid1, pid2, kind, a, b) })? {
        0 => Ordering::Equal,
        1 => Ordering::Less,
        _ => Ordering::Greater,
    })
}

/// Orders the open file descriptions behind two descriptors; equal means the same one.
pub fn files(pid1: i32, fd1: i32, pid2: i32, fd2: i32) -> io::Result<Ordering> {
    kcmp(pid1, pid2, 0, fd1 as u64, fd2 as u64)
}

/// Do both tasks share the resource?
pub fn shared(pid1: i32, pid2: i32, what: Resource) -> io::Result<bool> {
    Ok(kcmp(pid1, pid2, what as i32, 0, 0)? == Ordering::Equal)
}

/// Is the file that `epfd` of `pid` watches as (`tfd`, the `nth` with that number) the one behind `fd` of `owner`?
pub fn epoll_target(owner: i32, fd: i32, pid: i32, epfd: i32, tfd: u32, nth: u32) -> io::Result<bool> {
    #[repr(C)]
    struct Slot {
        efd: u32,
        tfd: u32,
        toff: u32,
    }
    let slot = Slot { efd: epfd as u32, tfd, toff: nth };
    // KCMP_EPOLL_TFD takes the address of a `struct kcmp_epoll_slot`, which lives across the call.
    Ok(kcmp(owner, pid, 7, fd as u64, &raw const slot as u64)? == Ordering::Equal)
}
