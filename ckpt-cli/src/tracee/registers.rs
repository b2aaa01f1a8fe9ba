//! What a stopped thread's registers mean: interrupted system calls and restartable sequences.

use crate::sys::{memory, ptrace::UserRegs};

// Errors by which the kernel marks an interrupted call (include/linux/errno.h); never seen by programs.
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
const EINTR: i64 = -(libc::EINTR as i64);

/// Length of the `syscall` instruction.
const SYSCALL_LEN: u64 = 2;

/// Was the thread stopped on its way out of a system call?
pub fn in_syscall(regs: &UserRegs) -> bool {
    (regs.orig_rax as i64) >= 0
}

fn reissue(regs: &mut UserRegs) {
    regs.rax = regs.orig_rax;
    regs.rip -= SYSCALL_LEN;
    regs.orig_rax = u64::MAX;
}

/// Hides the freeze from calls that answer a stop with `EINTR` (epoll_wait, recv with a timeout, semop and others,
/// see signal(7)): the call is issued again. Not done where a real signal waits: then `EINTR` is the truth.
pub fn hide_eintr(regs: &mut UserRegs, signal_waits: bool) {
    if in_syscall(regs) && regs.rax as i64 == EINTR && !signal_waits {
        reissue(regs);
    }
}

/// The registers from which a thread that no longer has its kernel context goes on: a call that was interrupted is
/// issued again, with its full time-out where it waited for a relative time.
pub fn resumable(regs: &UserRegs) -> UserRegs {
    let mut regs = *regs;
    if in_syscall(&regs)
        && matches!(regs.rax as i64, ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND | ERESTART_RESTARTBLOCK)
    {
        reissue(&mut regs);
    }
    regs.orig_rax = u64::MAX;
    regs
}

/// The descriptor, where the thread issues connect(2) next.
///
/// That may be a call that was interrupted when the connection was there already. On the same socket the kernel knows
/// that it only has to succeed (`inet_stream_connect`, net/ipv4/af_inet.c); on another one in the same state it would
/// fail with `EISCONN`.
pub fn connects(pid: i32, regs: &UserRegs) -> Option<i32> {
    const SYSCALL: [u8; SYSCALL_LEN as usize] = [0x0f, 0x05];
    let mut code = [0; SYSCALL.len()];
    let issues = regs.rax as i64 == libc::SYS_connect
        && !in_syscall(regs)
        && memory::read(pid, regs.rip, &mut code).is_ok()
        && code == SYSCALL;
    issues.then_some(regs.rdi as i32)
}

/// The next system call has been made, and was successful.
pub fn succeed(regs: &mut UserRegs) {
    regs.rip += SYSCALL_LEN;
    regs.rax = 0;
}

/// The number of the call that a thread in restart_syscall(2) had made.
///
/// A sleep that was interrupted before goes on as restart_syscall: the kernel knows the time that is left, but the
/// number of the call is gone from the registers, which otherwise are as they were. It is in the instruction that
/// loaded it, mostly; else the arguments tell which of the four calls that are continued in this way it was
/// (`restart_block` in nanosleep(2), clock_nanosleep(2), poll(2), futex(2)).
pub fn name_restarted(pid: i32, regs: &mut UserRegs) {
    if regs.orig_rax as i64 != libc::SYS_restart_syscall {
        return;
    }
    // In front of the syscall instruction: mov $number, %eax.
    let mut code = [0; 5];
    let at = regs.rip.wrapping_sub(SYSCALL_LEN + code.len() as u64);
    let loaded = match memory::read(pid, at, &mut code) {
        Ok(()) if code[0] == 0xb8 => i64::from(u32::from_le_bytes([code[1], code[2], code[3], code[4]])),
        _ => -1,
    };
    let continued = [libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_poll, libc::SYS_futex];
    let number = if continued.contains(&loaded) { loaded } else { guess(pid, regs) };
    regs.orig_rax = number as u64;
}

fn guess(pid: i32, regs: &UserRegs) -> i64 {
    const PAGE: u64 = 4096;
    const FUTEX_COMMAND: u64 = 0x7f;
    // struct timespec: seconds and nanoseconds.
    let is_time = |address: u64| {
        let mut time = [0; 16];
        memory::read(pid, address, &mut time).is_ok()
            && u64::from_ne_bytes(time[8..].try_into().unwrap_or_default()) < 1_000_000_000
    };
    match (regs.rdi, regs.rsi) {
        (clock, flags) if clock < PAGE && flags < 2 && is_time(regs.rdx) => libc::SYS_clock_nanosleep,
        (_, operation)
            if [libc::FUTEX_WAIT, libc::FUTEX_WAIT_BITSET]
                .contains(&((operation & FUTEX_COMMAND) as i32))
                && operation < PAGE
                && is_time(regs.r10) =>
        {
            libc::SYS_futex
        }
        (_, rest) if rest == 0 || rest >= PAGE => libc::SYS_nanosleep,
        _ => libc::SYS_poll,
    }
}

/// Sends a thread that was stopped inside a restartable sequence to the sequence's abort handler, as the kernel does
/// after any preemption (Documentation of rseq(2)). `critical_section` is the `rseq_cs` word of its area.
pub fn abort_sequence(pid: i32, regs: &mut UserRegs, critical_section: u64) -> bool {
    if critical_section == 0 {
        return false;
    }
    // struct rseq_cs: version u32, flags u32, start_ip, post_commit_offset, abort_ip u64
    let mut raw = [0u8; 32];
    if memory::read(pid, critical_section, &mut raw).is_err() {
        return false;
    }
    let word = |i: usize| u64::from_ne_bytes(raw[i..i + 8].try_into().unwrap_or_default());
    let (start, length, abort) = (word(8), word(16), word(24));
    if regs.rip.wrapping_sub(start) >= length {
        return false;
    }
    regs.rip = abort;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regs(orig: i64, rax: i64) -> UserRegs {
        let zero = vec![0u8; size_of::<UserRegs>()];
        let mut r = crate::sys::ptrace::regs_from_bytes(&zero).expect("size");
        (r.orig_rax, r.rax, r.rip) = (orig as u64, rax as u64, 0x1002);
        r
    }

    #[test]
    fn interrupted_call_is_issued_again() {
        for mark in [-512, -513, -514, -516] {
            let r = resumable(&regs(7, mark));
            assert_eq!((r.rax, r.rip, r.orig_rax), (7, 0x1000, u64::MAX));
        }
    }

    #[test]
    fn a_connect_that_is_issued_next_is_seen_and_can_be_passed() {
        let (code, pid) = ([0x0f_u8, 0x05, 0x90], std::process::id() as i32);
        let mut r = resumable(&regs(libc::SYS_connect, ERESTARTSYS));
        (r.rip, r.rdi) = (code.as_ptr() as u64, 7);
        assert_eq!(connects(pid, &r), Some(7));
        for (rax, rip) in [(libc::SYS_accept as u64, r.rip), (r.rax, r.rip + 1)] {
            assert_eq!(connects(pid, &UserRegs { rax, rip, ..r }), None);
        }
        succeed(&mut r);
        assert_eq!((r.rax, r.rip), (0, code.as_ptr() as u64 + 2));
    }

    #[test]
    fn finished_call_and_user_code_go_on() {
        for (orig, rax) in [(7, 3), (7, -11), (-1, -512), (7, -4)] {
            let r = resumable(&regs(orig, rax));
            assert_eq!((r.rax as i64, r.rip), (rax, 0x1002));
        }
    }

    #[test]
    fn eintr_is_hidden_only_without_a_signal() {
        let mut r = regs(232, -4);
        hide_eintr(&mut r, true);
        assert_eq!(r.rax as i64, -4);
        hide_eintr(&mut r, false);
        assert_eq!((r.rax, r.rip), (232, 0x1000));
    }
}
