//! One thread of a stub: what the kernel keeps per task, and at the very end the registers.

use super::layout::Layout;
use crate::sys::{ptrace, task};
use crate::tracee::{Batch, Stopped, TraceeError};
use anyhow::{Context as _, Result};
use ckpt_common::image::process::{Credentials, SigInfo, Thread};

// prctl(2)
const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_NAME: u64 = 15;
const PR_CAPBSET_DROP: u64 = 24;
const PR_SET_SECUREBITS: u64 = 28;
const PR_SET_TIMERSLACK: u64 = 29;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
const PR_CAP_AMBIENT: u64 = 47;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;
/// `SECBIT_NO_SETUID_FIXUP`: capabilities stay as they are when user ids change.
const NO_SETUID_FIXUP: u64 = 4;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const CAPABILITIES: u32 = 64;

/// Restores everything but registers, mask and pending signals. The credentials come last: they may take away the right
/// to do anything else.
pub(super) fn rebuild(stopped: &mut Stopped, thread: &Thread, layout: Layout) -> Result<()> {
    let mut batch = Batch::new(layout.arena);
    batch.call("set_tid_address", libc::SYS_set_tid_address, &[thread.clear_child_tid]);
    batch.call("set_robust_list", libc::SYS_set_robust_list, &[thread.robust_list.0, 24]);
    if let Some(rseq) = thread.rseq {
        let args = [rseq.address, rseq.length.into(), 0, rseq.signature.into()];
        batch.call("rseq", libc::SYS_rseq, &args);
    }
    let stack = [thread.altstack.address, thread.altstack.flags as u32 as u64, thread.altstack.size];
    let bytes: Vec<u8> = stack.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let at = batch.bytes(&bytes);
    batch.call("sigaltstack", libc::SYS_sigaltstack, &[at, 0]);
    let name = batch.cstr(&thread.comm);
    batch.call("prctl(PR_SET_NAME)", libc::SYS_prctl, &[PR_SET_NAME, name]);
    if thread.timer_slack != 0 {
        batch.call("prctl(PR_SET_TIMERSLACK)", libc::SYS_prctl, &[PR_SET_TIMERSLACK, thread.timer_slack]);
    }
    credentials(&mut batch, &thread.creds);
    batch.call("prctl(PR_SET_PDEATHSIG)", libc::SYS_prctl, &[PR_SET_PDEATHSIG, thread.pdeathsig as u64]);
    task::set_sched_attr(stopped.tid, &thread.sched).context("setting the scheduling policy")?;
    if !thread.affinity.is_empty()
        && let Err(e) = task::set_affinity(stopped.tid, &thread.affinity)
    {
        // None of its CPUs is here; where it may run does not change what it computes.
        tracing::warn!(tid = thread.tid, error = %e, "CPU affinity not restored");
    }
    task::set_ioprio(stopped.tid, thread.ioprio).context("setting the I/O priority")?;
    stopped.run(batch, false)?.all_ok()?;
    if let Some(rseq) = thread.rseq {
        // Registration cleared the word.
        stopped.write(rseq.address + 8, &rseq.critical_section.to_ne_bytes())?;
    }
    Ok(())
}

fn credentials(batch: &mut Batch, creds: &Credentials) {
    let id = u64::from;
    batch.call("securebits", libc::SYS_prctl, &[PR_SET_SECUREBITS, NO_SETUID_FIXUP]);
    let groups: Vec<u8> = creds.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
    let at = batch.bytes(&groups);
    batch.call("setgroups", libc::SYS_setgroups, &[creds.groups.len() as u64, at]);
    let [real, effective, saved, filesystem] = creds.gids;
    batch.call("setresgid", libc::SYS_setresgid, &[id(real), id(effective), id(saved)]);
    // setfsgid and setfsuid return the previous id, never an error.
    batch.call("setfsgid", libc::SYS_setfsgid, &[id(filesystem)]);
    for cap in (0..CAPABILITIES).filter(|c| creds.caps[3] >> c & 1 == 0) {
        // Numbers that this kernel does not know cannot be dropped and need not be.
        if cap <= last_capability() {
            batch.call(format!("dropping capability {cap}"), libc::SYS_prctl, &[PR_CAPBSET_DROP, id(cap)]);
        }
    }
    let [real, effective, saved, filesystem] = creds.uids;
    batch.call("setresuid", libc::SYS_setresuid, &[id(real), id(effective), id(saved)]);
    batch.call("setfsuid", libc::SYS_setfsuid, &[id(filesystem)]);
    batch.call(
        "clearing ambient capabilities",
        libc::SYS_prctl,
        &[PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0],
    );
    batch.call("securebits", libc::SYS_prctl, &[PR_SET_SECUREBITS, id(creds.securebits)]);
    let header = batch.bytes(&[CAPABILITY_VERSION_3.to_ne_bytes(), [0; 4]].concat());
    let [inheritable, permitted, effective, _, ambient] = creds.caps;
    let mut data = Vec::new();
    for half in [0, 32] {
        for set in [effective, permitted, inheritable] {
            data.extend_from_slice(&((set >> half) as u32).to_ne_bytes());
        }
    }
    let data = batch.bytes(&data);
    batch.call("capset", libc::SYS_capset, &[header, data]);
    for cap in (0..CAPABILITIES).filter(|c| ambient >> c & 1 != 0) {
        let args = [PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, id(cap), 0, 0];
        batch.call(format!("raising ambient capability {cap}"), libc::SYS_prctl, &args);
    }
    if creds.no_new_privs {
        batch.call("prctl(PR_SET_NO_NEW_PRIVS)", libc::SYS_prctl, &[PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0]);
    }
}

/// The highest capability that the kernel knows (/proc/sys/kernel/cap_last_cap).
fn last_capability() -> u32 {
    static LAST: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *LAST.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap_or_default();
        text.trim().parse().unwrap_or(40)
    })
}

/// Queues signals that were pending, in their order: for the thread, or with `shared` for its process.
pub(super) fn queue(stopped: &mut Stopped, pending: &[SigInfo], shared: bool, layout: Layout) -> Result<()> {
    let mut batch = Batch::new(layout.arena);
    for info in pending {
        let signal = info.0.get(..4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
        let (tgid, tid) = (stopped.ns.0 as u64, stopped.ns.1 as u64);
        let at = batch.bytes(&info.0);
        if shared {
            batch.call("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &[tgid, signal as u64, at]);
        } else {
            batch.call("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, &[tgid, tid, signal as u64, at]);
        }
        stopped.flush(&mut batch)?;
    }
    if batch.is_empty() { Ok(()) } else { Ok(stopped.run(batch, false)?.all_ok()?) }
}

/// Registers, FPU state and signal mask with which the thread goes on.
pub(super) fn finish(stopped: &mut Stopped, thread: &Thread) -> Result<()> {
    let regs = ptrace::regs_from_bytes(&thread.regs).context("the image's registers have another size")?;
    ptrace::set_xstate(stopped.tid, &thread.xstate)
        .map_err(TraceeError::request("setting the FPU state", stopped.tid))?;
    stopped.set_regs(regs);
    stopped.set_sigmask(thread.sigmask);
    Ok(())
}
