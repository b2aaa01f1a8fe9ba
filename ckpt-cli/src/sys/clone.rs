//! clone3(2) with a chosen PID: the first process of a restored tree.

use super::check;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// `struct clone_args` of linux/sched.h, up to `set_tid_size` and `cgroup`.
#[repr(C)]
#[derive(Clone, Copy, Default, zerocopy::IntoBytes, zerocopy::Immutable)]
pub struct CloneArgs {
    /// `CLONE_*` flags.
    pub flags: u64,
    /// Where to store a pidfd.
    pub pidfd: u64,
    /// Where to store the child's TID in the child.
    pub child_tid: u64,
    /// Where to store the child's TID in the parent.
    pub parent_tid: u64,
    /// Signal sent at exit.
    pub exit_signal: u64,
    /// Lowest byte of the stack.
    pub stack: u64,
    /// Size of the stack.
    pub stack_size: u64,
    /// New TLS.
    pub tls: u64,
    /// Address of an array of `pid_t`: the wanted PIDs, innermost namespace first.
    pub set_tid: u64,
    /// Its length.
    pub set_tid_size: u64,
    /// Descriptor of the cgroup for `CLONE_INTO_CGROUP`.
    pub cgroup: u64,
}

/// Set in the memory of a child of [`spawn_pausing`] when it shall begin to reap.
static REAP: AtomicBool = AtomicBool::new(false);

/// Address of the byte that tells a child of [`spawn_pausing`], when it is set to 1, to begin to reap.
pub fn reap_flag() -> u64 {
    &raw const REAP as u64
}

/// Forks a child that waits until it is told to reap, and then reaps children until it has none: the first process of
/// a restored tree, or the init of its PID namespace. `flags` are `CLONE_NEW*`. It keeps copies of all our descriptors.
pub fn spawn_pausing(flags: u64) -> io::Result<i32> {
    let args = CloneArgs { flags, exit_signal: libc::SIGCHLD as u64, ..CloneArgs::default() };
    // SAFETY: a fork without CLONE_VM: the child has its own copy of memory, in which it makes nothing but raw system
    // calls (no lock of the C library or allocator is touched) until it is rebuilt or killed.
    unsafe {
        let child = check(libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()))?;
        if child == 0 {
            let moment = libc::timespec { tv_sec: 0, tv_nsec: 10_000_000 };
            while !REAP.load(Ordering::Relaxed) {
                libc::syscall(libc::SYS_nanosleep, &raw const moment, 0);
            }
            while libc::syscall(libc::SYS_wait4, -1, 0, libc::__WALL, 0) >= 0 {}
            libc::syscall(libc::SYS_exit_group, 0);
        }
        Ok(child as i32)
    }
}
