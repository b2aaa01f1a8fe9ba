//! fork(2) without exec: a second process of ours that keeps all descriptors.

use super::check;
use std::io;

/// Runs `child` in a child process, which ends with its result. Gives the child's PID.
///
/// # Errors
/// No more processes; or this process has more than one thread: locks that another one holds would be held for ever in
/// the child.
pub fn fork(child: impl FnOnce() -> i32) -> io::Result<i32> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "fork with more than one thread"));
    }
    // SAFETY: this is the only thread, so no lock is held by another, and the child may run any code; it never returns
    // from here.
    let pid = check(unsafe { libc::fork() }.into())? as i32;
    if pid == 0 {
        let code = child();
        // SAFETY: ends the child without running what the parent wants to run at its exit.
        unsafe { libc::_exit(code) };
    }
    Ok(pid)
}
