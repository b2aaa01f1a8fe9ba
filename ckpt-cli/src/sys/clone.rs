//! clone3(2) with a chosen PID: the first process of a restored tree.

use super::check;
use std::io;

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

/// Forks a child that only waits for signals. `pid` is its PID (`None`: any); `flags` are `CLONE_NEW*`.
/// The child keeps copies of all our descriptors and is killed by nobody but the caller.
pub fn spawn_pausing(pid: Option<i32>, flags: u64) -> io::Result<i32> {
    let wanted = [pid.unwrap_or(0)];
    let args = CloneArgs {
        flags,
        exit_signal: libc::SIGCHLD as u64,
        set_tid: if pid.is_some() { wanted.as_ptr() as u64 } else { 0 },
        set_tid_size: u64::from(pid.is_some()),
        ..CloneArgs::default()
    };
    // SAFETY: a fork without CLONE_VM: the child has its own copy of memory, in which it makes nothing but raw system
    // calls (no lock of the C library or allocator is touched) until it is rebuilt or killed.
    unsafe {
        let child = check(libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()))?;
        if child == 0 {
            loop {
                libc::syscall(libc::SYS_pause);
            }
        }
        Ok(child as i32)
    }
}
