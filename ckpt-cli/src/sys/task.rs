//! Attributes of other tasks that the kernel gives from outside.

use super::check;
use std::io;
use std::sync::OnceLock;

/// Head and length of the robust futex list (get_robust_list(2)).
pub fn robust_list(tid: i32) -> io::Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both results outlive the call and have pointer size.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) })?;
    Ok((head, len))
}

/// `struct sched_attr` in its first published size, 48 bytes (sched_getattr(2)).
pub const SCHED_ATTR_SIZE: usize = 48;

/// Scheduling policy and parameters.
pub fn sched_attr(tid: i32) -> io::Result<Vec<u8>> {
    let mut attr = vec![0u8; SCHED_ATTR_SIZE];
    // SAFETY: the buffer has the stated size and outlives the call.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, tid, attr.as_mut_ptr(), SCHED_ATTR_SIZE, 0) })?;
    Ok(attr)
}

/// Sets scheduling policy and parameters from what [`sched_attr`] gave.
pub fn set_sched_attr(tid: i32, attr: &[u8]) -> io::Result<()> {
    if attr.len() != SCHED_ATTR_SIZE {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the buffer has the size that its first word states and is only read.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, tid, attr.as_ptr(), 0) }).map(drop)
}

/// CPU affinity mask in bytes as the kernel gives it.
pub fn affinity(tid: i32) -> io::Result<Vec<u8>> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: the buffer has the stated size and outlives the call.
    let n = check(unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, mask.len(), mask.as_mut_ptr()) })?;
    mask.truncate(n as usize);
    Ok(mask)
}

/// Sets the CPU affinity mask.
pub fn set_affinity(tid: i32, mask: &[u8]) -> io::Result<()> {
    // SAFETY: the buffer has the stated size and is only read.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, mask.len(), mask.as_ptr()) }).map(drop)
}

/// I/O priority of one thread (ioprio_get(2), IOPRIO_WHO_PROCESS).
pub fn ioprio(tid: i32) -> io::Result<i32> {
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_get, 1, tid) }).map(|v| v as i32)
}

/// Sets the I/O priority of one thread.
pub fn set_ioprio(tid: i32, priority: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, 1, tid, priority) }).map(drop)
}

/// Resource limit of a process: (soft, hard).
pub fn limit(pid: i32, resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a null new limit means none; the old one outlives the call.
    check(unsafe { libc::prlimit64(pid, resource, std::ptr::null(), &raw mut limit) }.into())?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// Sets a resource limit of a process.
pub fn set_limit(pid: i32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the new limit is only read; a null old limit means it is not wanted.
    check(unsafe { libc::prlimit64(pid, resource, &raw const limit, std::ptr::null_mut()) }.into()).map(drop)
}

/// Raises our own limit on open files as far as it goes: descriptors of the whole job pass through our table.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let (_, hard) = limit(0, libc::RLIMIT_NOFILE)?;
    set_limit(0, libc::RLIMIT_NOFILE, hard, hard)
}

/// Processors that we may use; looked for once, since the cgroup's limits are several files.
pub fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Lets others run before the calling thread from now on (nice 10, setpriority(2)): about a tenth of a processor that
/// a job wants, too, all of one that nobody wants.
pub fn step_back() {
    // SAFETY: plain numbers; 0 is the calling thread. It cannot fail: that needs no right.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
}

/// For as long as this lives the calling thread runs before all others that are not of a real-time class (SCHED_RR,
/// sched(7)); threads that it starts do not. Where there is one processor only, it just has the lowest nice value: others
/// would not run at all.
#[derive(Debug)]
pub struct Urgent {
    nice: i32,
}

impl Urgent {
    /// From now on. Where that is not allowed, nothing changes.
    pub fn now() -> Self {
        // SAFETY: plain numbers; 0 is the calling thread.
        let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        if processors() == 1 || set_policy(libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, 1).is_err() {
            // SAFETY: as above.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
        }
        Self { nice }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        let _ = set_policy(libc::SCHED_OTHER, 0);
        // SAFETY: plain numbers; 0 is the calling thread.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, self.nice) };
    }
}

fn set_policy(policy: i32, priority: i32) -> io::Result<()> {
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameter is only read; 0 is the calling thread.
    check(unsafe { libc::sched_setscheduler(0, policy, &raw const param) }.into()).map(drop)
}
