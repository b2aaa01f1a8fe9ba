//! One thread: registers and what the kernel keeps per task.

use crate::sys::{memory, pidfd, ptrace, task};
use crate::tracee::{Arena, Batch, Stopped, registers};
use anyhow::{Context as _, Result};
use ckpt_common::image::process::{AltStack, Credentials, Rseq, SigInfo, Thread};
use nix::sys::socket::{SockaddrStorage, getpeername};
use std::os::fd::{AsFd, AsRawFd};

// prctl(2)
const PR_GET_PDEATHSIG: u64 = 2;
const PR_GET_NAME: u64 = 16;
const PR_GET_TIMERSLACK: u64 = 30;
const PR_GET_SECUREBITS: u64 = 27;
const PR_GET_TID_ADDRESS: u64 = 40;

/// Has the socket an other end?
fn is_connected(pid: i32, fd: i32) -> bool {
    let socket = pidfd::open(pid).and_then(|process| pidfd::getfd(process.as_fd(), fd));
    socket.is_ok_and(|socket| getpeername::<SockaddrStorage>(socket.as_raw_fd()).is_ok())
}

/// Captures a thread. Runs one batch in it.
pub(super) fn capture(thread: &mut Stopped, arena: Arena) -> Result<Thread> {
    let tid = thread.tid;
    let rseq = ptrace::rseq(tid).context("reading the rseq registration")?;
    let rseq = rseq.map(|r| {
        let mut word = [0u8; 8];
        let critical_section = match memory::read(thread.pid, r.address + 8, &mut word) {
            Ok(()) => u64::from_ne_bytes(word),
            Err(_) => 0,
        };
        Rseq { address: r.address, length: r.length, signature: r.signature, critical_section }
    });
    if let Some(rseq) = rseq {
        thread.abort_sequence(rseq.critical_section);
    }
    let xstate = thread.xstate()?;
    let mut regs = registers::resumable(thread.regs());
    if let Some(fd) = registers::connects(thread.pid, &regs)
        && is_connected(thread.pid, fd)
    {
        registers::succeed(&mut regs);
    }

    let mut batch = Batch::new(arena);
    let (stack, ctid, death) = (batch.bytes(&[0; 24]), batch.bytes(&[0; 8]), batch.bytes(&[0; 8]));
    batch.call("sigaltstack", libc::SYS_sigaltstack, &[0, stack]);
    batch.call("prctl(PR_GET_TID_ADDRESS)", libc::SYS_prctl, &[PR_GET_TID_ADDRESS, ctid]);
    batch.call("prctl(PR_GET_PDEATHSIG)", libc::SYS_prctl, &[PR_GET_PDEATHSIG, death]);
    let name = batch.bytes(&[0; 16]);
    batch.call("prctl(PR_GET_NAME)", libc::SYS_prctl, &[PR_GET_NAME, name]);
    let slack = batch.call("prctl(PR_GET_TIMERSLACK)", libc::SYS_prctl, &[PR_GET_TIMERSLACK]);
    let securebits = batch.call("prctl(PR_GET_SECUREBITS)", libc::SYS_prctl, &[PR_GET_SECUREBITS]);
    let done = thread.run(batch, true)?;
    done.all_ok()?;

    let name = done.read(name, 16).split(|byte| *byte == 0).next().unwrap_or_default();
    let status = thread.status()?;
    Ok(Thread {
        tid: thread.ns.1,
        comm: String::from_utf8_lossy(name).into_owned(),
        regs: ptrace::regs_to_bytes(&regs),
        xstate,
        sigmask: thread.sigmask(),
        pending: pending(tid, false)?,
        altstack: AltStack {
            address: done.word(stack),
            flags: done.word(stack + 8) as i32 & !libc::SS_ONSTACK,
            size: done.word(stack + 16),
        },
        robust_list: task::robust_list(tid).context("reading the robust list")?,
        rseq,
        clear_child_tid: done.word(ctid),
        creds: Credentials {
            uids: [status.ruid, status.euid, status.suid, status.fuid],
            gids: [status.rgid, status.egid, status.sgid, status.fgid],
            groups: status.groups.clone(),
            caps: [
                status.capinh,
                status.capprm,
                status.capeff,
                status.capbnd.unwrap_or(0),
                status.capamb.unwrap_or(0),
            ],
            securebits: done.result(securebits)? as u32,
            no_new_privs: status.nonewprivs == Some(1),
        },
        sched: task::sched_attr(tid).context("reading the scheduling policy")?,
        affinity: affinity(tid)?,
        ioprio: task::ioprio(tid).context("reading the I/O priority")?,
        pdeathsig: done.word(death) as i32,
        timer_slack: done.result(slack)? as u64,
    })
}

/// The mask, or nothing where the thread may run anywhere that we may: another node may have other CPUs.
fn affinity(tid: i32) -> Result<Vec<u8>> {
    let mask = task::affinity(tid).context("reading the CPU affinity")?;
    let every = task::affinity(1).unwrap_or_default();
    Ok(if mask == every { Vec::new() } else { mask })
}

/// Queued signals of the thread or of its process.
pub(super) fn pending(tid: i32, shared: bool) -> Result<Vec<SigInfo>> {
    let queue = ptrace::queued_signals(tid, shared).context("reading queued signals")?;
    Ok(queue.into_iter().map(|info| SigInfo(info.to_vec())).collect())
}
