//! ptrace(2). Every call must come from the thread that seized the tracee.

use super::check;
use std::io;

/// `struct user_regs_struct` of x86-64.
pub use libc::user_regs_struct as UserRegs;

/// Size of `siginfo_t` in bytes.
pub const SIGINFO_SIZE: usize = 128;

/// Stop signal with this bit set: a system call stop (`PTRACE_O_TRACESYSGOOD`).
pub const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;

const NT_X86_XSTATE: usize = 0x202;
/// XSAVE areas with every feature of today (AMX: 8 KiB) fit in this many bytes.
const XSTATE_MAX: usize = 16 * 1024;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;

fn request(request: libc::c_uint, tid: i32, addr: usize, data: usize) -> io::Result<i64> {
    // SAFETY: the callers below pass, per request, either plain numbers or the address of an object that
    // lives across the call and has the size the kernel writes or reads for that request.
    check(unsafe { libc::ptrace(request, tid, addr, data) })
}

/// Seizes a thread without stopping it. `options` are `PTRACE_O_*`.
pub fn seize(tid: i32, options: i32) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, options as usize).map(drop)
}

/// Asks a seized thread to stop; the stop is reported by [`wait`].
pub fn interrupt(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped thread run on, delivering `signal` (0: none).
pub fn cont(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Lets a stopped thread run to its next system call entry or exit.
pub fn cont_to_syscall(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

/// Ends tracing; a thread in group-stop stays stopped.
pub fn detach(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// General registers.
pub fn regs(tid: i32) -> io::Result<UserRegs> {
    // SAFETY: all-zero is a valid value of this structure of integers.
    let mut regs: UserRegs = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, tid, 0, &raw mut regs as usize)?;
    Ok(regs)
}

/// Sets the general registers.
pub fn set_regs(tid: i32, regs: &UserRegs) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, tid, 0, &raw const *regs as usize).map(drop)
}

/// The bytes of a register set, for the image.
pub fn regs_to_bytes(regs: &UserRegs) -> Vec<u8> {
    let len = size_of::<UserRegs>();
    // SAFETY: the structure has only `u64` fields, so no padding; the slice covers exactly the borrowed value.
    unsafe { std::slice::from_raw_parts((&raw const *regs).cast::<u8>(), len) }.to_vec()
}

/// A register set from the image; `None` where the length is not that of the structure.
pub fn regs_from_bytes(bytes: &[u8]) -> Option<UserRegs> {
    if bytes.len() != size_of::<UserRegs>() {
        return None;
    }
    // SAFETY: the length was checked, every bit pattern is valid for a structure of integers, and the read is unaligned.
    Some(unsafe { bytes.as_ptr().cast::<UserRegs>().read_unaligned() })
}

/// FPU, SSE, AVX and later state: the XSAVE area.
pub fn xstate(tid: i32) -> io::Result<Vec<u8>> {
    let mut area = vec![0u8; XSTATE_MAX];
    let mut iov = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
    request(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize)?;
    area.truncate(iov.iov_len);
    Ok(area)
}

/// Sets the XSAVE area.
pub fn set_xstate(tid: i32, area: &[u8]) -> io::Result<()> {
    let mut iov = libc::iovec { iov_base: area.as_ptr().cast_mut().cast(), iov_len: area.len() };
    request(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize).map(drop)
}

/// Blocked signals, bit n-1 for signal n.
pub fn sigmask(tid: i32) -> io::Result<u64> {
    let mut mask = 0u64;
    request(PTRACE_GETSIGMASK, tid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

/// Sets the blocked signals.
pub fn set_sigmask(tid: i32, mask: u64) -> io::Result<()> {
    request(PTRACE_SETSIGMASK, tid, 8, &raw const mask as usize).map(drop)
}

/// `siginfo_t` of the signal that the thread is stopped at.
pub fn siginfo(tid: i32) -> io::Result<[u8; SIGINFO_SIZE]> {
    let mut info = [0u8; SIGINFO_SIZE];
    request(libc::PTRACE_GETSIGINFO, tid, 0, info.as_mut_ptr() as usize)?;
    Ok(info)
}

/// Queued signals, oldest first, without taking them: of the process (`shared`) or of the thread.
pub fn queued_signals(tid: i32, shared: bool) -> io::Result<Vec<[u8; SIGINFO_SIZE]>> {
    const BATCH: usize = 32;
    let mut all = Vec::new();
    loop {
        let mut page = [[0u8; SIGINFO_SIZE]; BATCH];
        let args = libc::ptrace_peeksiginfo_args {
            off: all.len() as u64,
            flags: u32::from(shared),
            nr: BATCH as i32,
        };
        let n = request(libc::PTRACE_PEEKSIGINFO, tid, &raw const args as usize, page.as_mut_ptr() as usize)?
            as usize;
        all.extend_from_slice(&page[..n]);
        if n < BATCH {
            return Ok(all);
        }
    }
}

/// `struct ptrace_rseq_configuration`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct RseqConfiguration {
    /// Address of the area, 0 where none is registered.
    pub address: u64,
    /// Its length in bytes.
    pub length: u32,
    /// Signature before abort handlers.
    pub signature: u32,
    flags: u32,
    pad: u32,
}

/// Registration for restartable sequences; `None` where the thread has none.
pub fn rseq(tid: i32) -> io::Result<Option<RseqConfiguration>> {
    let mut conf = RseqConfiguration::default();
    request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size_of::<RseqConfiguration>(), &raw mut conf as usize)?;
    Ok((conf.address != 0).then_some(conf))
}

/// Message of an event stop: the new TID for clone, fork and vfork.
pub fn event_message(tid: i32) -> io::Result<u64> {
    let mut message = 0u64;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message as usize)?;
    Ok(message)
}

/// What happened to a tracee.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Nothing yet (only without blocking).
    Nothing,
    /// Stopped by the tracer's wish or by job control (`PTRACE_EVENT_STOP`): `SIGTRAP`, or the stop signal.
    EventStop(i32),
    /// Stopped at another `PTRACE_EVENT_*`.
    Event(i32),
    /// Stopped at a system call entry or exit.
    Syscall,
    /// About to receive a signal.
    Signal(i32),
    /// Gone: the status of wait(2).
    Gone(i32),
}

/// Waits for a change of one tracee.
pub fn wait(tid: i32, block: bool) -> io::Result<Wait> {
    let mut status = 0;
    let flags = libc::__WALL | if block { 0 } else { libc::WNOHANG };
    let got = loop {
        // SAFETY: `status` outlives the call.
        match check(i64::from(unsafe { libc::waitpid(tid, &raw mut status, flags) })) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    if got == 0 {
        return Ok(Wait::Nothing);
    }
    if !libc::WIFSTOPPED(status) {
        return Ok(Wait::Gone(status));
    }
    let signal = libc::WSTOPSIG(status);
    Ok(match status >> 16 {
        0 if signal == SYSCALL_STOP => Wait::Syscall,
        0 => Wait::Signal(signal),
        libc::PTRACE_EVENT_STOP => Wait::EventStop(signal),
        event => Wait::Event(event),
    })
}
