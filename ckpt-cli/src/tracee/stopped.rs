//! One stopped thread.

use super::batch::{Arena, Batch, Done, TOP_RESERVE};
use super::healing::{self, FRAME_SP, Pieces};
use super::{Result, TraceeError, proc, registers};
use crate::sys::ptrace::{self, UserRegs, Wait};
use crate::sys::{memory, pidfd};
use procfs::process::Status;

/// Signals that programs ignore unless they ask for them: candidates for the bell.
const BELLS: [i32; 3] = [libc::SIGWINCH, libc::SIGURG, libc::SIGCHLD];
/// What a thread gets that goes astray.
const FAULTS: [i32; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGSYS, libc::SIGTRAP, libc::SIGFPE];
/// `si_code` of a signal sent by tgkill(2).
const SI_TKILL: i32 = -6;

/// A stopped thread. Dropping it restores its registers and signal mask and lets it run on.
#[derive(Debug)]
pub struct Stopped {
    /// PID of its process and TID, as we see them.
    pub pid: i32,
    /// See `pid`.
    pub tid: i32,
    /// PID and TID in the thread's own PID namespace.
    pub ns: (i32, i32),
    regs: UserRegs,
    sigmask: u64,
    borrowed: bool,
    attached: bool,
    bell: i32,
    deferred: Vec<i32>,
    born: Vec<i32>,
    status: Option<Status>,
}

impl Stopped {
    /// Takes over a thread that [`ptrace::wait`] reported as stopped.
    pub fn new(pid: i32, tid: i32) -> Result<Self> {
        let mut stopped = Self {
            pid,
            tid,
            ns: (pid, tid),
            regs: ptrace::regs(tid).map_err(TraceeError::request("reading registers", tid))?,
            sigmask: ptrace::sigmask(tid).map_err(TraceeError::request("reading the signal mask", tid))?,
            borrowed: false,
            attached: true,
            bell: BELLS[0],
            deferred: Vec::new(),
            born: Vec::new(),
            status: None,
        };
        registers::name_restarted(pid, &mut stopped.regs);
        if let Ok(status) = proc::thread_status(pid, tid) {
            let last = |v: &Option<Vec<i32>>, or| v.as_ref().and_then(|v| v.last().copied()).unwrap_or(or);
            stopped.ns = (last(&status.nstgid, pid), last(&status.nspid, tid));
            let waiting = status.sigpnd | status.shdpnd;
            let free = |set: u64, s: i32| set & (1 << (s - 1)) == 0;
            stopped.bell = BELLS
                .into_iter()
                .find(|s| free(status.sigcgt | waiting, *s))
                .or_else(|| BELLS.into_iter().find(|s| free(waiting, *s)))
                .unwrap_or(BELLS[0]);
            registers::hide_eintr(&mut stopped.regs, waiting & !stopped.sigmask != 0);
            stopped.status = Some(status);
        }
        Ok(stopped)
    }

    /// What /proc said of it when it was taken over.
    ///
    /// # Errors
    /// It said nothing.
    pub fn status(&self) -> Result<&Status> {
        let nothing = || std::io::Error::from(std::io::ErrorKind::NotFound);
        self.status.as_ref().ok_or_else(nothing).map_err(TraceeError::request("reading the status", self.tid))
    }

    /// The program's registers.
    pub fn regs(&self) -> &UserRegs {
        &self.regs
    }

    /// Changes the registers with which the thread will go on.
    pub fn set_regs(&mut self, regs: UserRegs) {
        self.regs = regs;
    }

    /// The program's signal mask.
    pub fn sigmask(&self) -> u64 {
        self.sigmask
    }

    /// Changes the signal mask with which the thread will go on.
    pub fn set_sigmask(&mut self, mask: u64) {
        self.sigmask = mask;
    }

    /// FPU and vector state.
    pub fn xstate(&self) -> Result<Vec<u8>> {
        ptrace::xstate(self.tid).map_err(TraceeError::request("reading the FPU state", self.tid))
    }

    /// Sends a thread inside a restartable sequence to its abort handler.
    pub fn abort_sequence(&mut self, critical_section: u64) {
        registers::abort_sequence(self.pid, &mut self.regs, critical_section);
    }

    /// Signal mask of a batch: everything but the bell.
    fn batch_mask(&self) -> u64 {
        !(1u64 << (self.bell - 1))
    }

    /// Registers first, then the mask: where we are killed in between, the code runs with the program's mask and
    /// heals all the same.
    fn lend(&mut self, regs: &UserRegs) -> Result<()> {
        self.borrowed = true;
        ptrace::set_regs(self.tid, regs).map_err(TraceeError::request("setting registers", self.tid))?;
        ptrace::set_sigmask(self.tid, self.batch_mask())
            .map_err(TraceeError::request("setting the signal mask", self.tid))
    }

    /// Gives the thread its own mask and registers back; in this order, for the same reason.
    pub fn give_back(&mut self) -> Result<()> {
        if self.borrowed {
            ptrace::set_sigmask(self.tid, self.sigmask)
                .map_err(TraceeError::request("restoring the signal mask", self.tid))?;
        }
        ptrace::set_regs(self.tid, &self.regs)
            .map_err(TraceeError::request("restoring registers", self.tid))?;
        self.borrowed = false;
        Ok(())
    }

    /// Maps an arena in the target: the one call that is made before there is a batch.
    ///
    /// `scratch` is an address at which [`Self::healing_size`] bytes of the program's stack are unused.
    pub fn map_arena(&mut self, pieces: &Pieces, scratch: Option<u64>, len: u64) -> Result<Arena> {
        let args = [Arena::PLACE, len, 7, (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64, u64::MAX, 0];
        let base = self.single_call("mapping the arena", pieces, scratch, libc::SYS_mmap, args)? as u64;
        let arena = Arena { base, len };
        arena.install(self.pid)?;
        Ok(arena)
    }

    /// Unmaps the arena again.
    pub fn unmap_arena(&mut self, pieces: &Pieces, scratch: Option<u64>, arena: Arena) -> Result<()> {
        let args = [arena.base, arena.len, 0, 0, 0, 0];
        self.single_call("unmapping the arena", pieces, scratch, libc::SYS_munmap, args).map(drop)
    }

    /// Bytes that a healing frame may take.
    pub fn healing_size() -> u64 {
        20 * 1024
    }

    /// One system call through an instruction of the target itself.
    pub fn single_call(
        &mut self,
        what: &'static str,
        pieces: &Pieces,
        scratch: Option<u64>,
        number: i64,
        args: [u64; 6],
    ) -> Result<i64> {
        let mut regs = self.regs;
        if let (Some(scratch), Some(restorer)) = (scratch, pieces.restorer) {
            // [return slots][frame]: the gadget returns to the restorer with rsp at the frame's second word.
            let sp = scratch.next_multiple_of(64);
            let frame_at = sp + pieces.ret_slot + 8 - FRAME_SP;
            let mut bytes = vec![0u8; pieces.ret_slot as usize];
            bytes.extend(healing::frame(
                frame_at,
                &registers::resumable(&self.regs),
                self.sigmask,
                &self.xstate()?,
            ));
            // The return slot is the frame's first word, which rt_sigreturn does not read.
            bytes[pieces.ret_slot as usize..][..8].copy_from_slice(&restorer.to_ne_bytes());
            memory::write(self.pid, sp, &bytes)
                .map_err(TraceeError::request("writing the frame that heals an injected call", self.tid))?;
            (regs.rsp, regs.rbp) = (sp, sp);
        }
        regs.rip = pieces.syscall;
        (regs.rax, regs.orig_rax) = (number as u64, u64::MAX);
        (regs.rdi, regs.rsi, regs.rdx) = (args[0], args[1], args[2]);
        (regs.r10, regs.r8, regs.r9) = (args[3], args[4], args[5]);
        self.lend(&regs)?;
        for _entry_and_exit in 0..2 {
            self.resume_until(
                |s| ptrace::cont_to_syscall(s.tid).map_err(TraceeError::request("resuming", s.tid)),
                |_, wait| wait == Wait::Syscall,
            )?;
        }
        let now = ptrace::regs(self.tid).map_err(TraceeError::request("reading registers", self.tid))?;
        // From a stop at a system call's exit the kernel goes to the program without looking at an interrupted call in
        // the registers; from a stop for the tracer it does look. Asked for before the registers are given back, so
        // that this holds where we are killed in between, too.
        ptrace::interrupt(self.tid).map_err(TraceeError::request("interrupting", self.tid))?;
        self.give_back()?;
        self.resume_until(
            |s| ptrace::cont(s.tid, 0).map_err(TraceeError::request("resuming", s.tid)),
            |_, wait| matches!(wait, Wait::EventStop(_)),
        )?;
        let value = now.rax as i64;
        if (-4095..0).contains(&value) {
            let source = std::io::Error::from_raw_os_error(-value as i32);
            return Err(TraceeError::Call { what: what.into(), tid: self.tid, source });
        }
        Ok(value)
    }

    /// Runs a batch. With `heal`, the thread restores itself should we be killed meanwhile: for running programs.
    pub fn run(&mut self, batch: Batch, heal: bool) -> Result<Done> {
        self.run_with_pauses(batch, heal, |_| {})
    }

    /// The same; `at_pause` is called with the number of each pause while the thread stands there. Where we are
    /// killed, the thread goes on with the calls behind the pause: those that take back what the others made.
    pub fn run_with_pauses(
        &mut self,
        mut batch: Batch,
        heal: bool,
        mut at_pause: impl FnMut(usize),
    ) -> Result<Done> {
        let arena = batch.arena();
        let bell = [self.ns.0 as u64, self.ns.1 as u64, self.bell as u64];
        let (table, count) = batch.store(self.pid, bell)?;
        let frame_at = arena.end() - TOP_RESERVE / 2;
        if heal {
            let frame =
                healing::frame(frame_at, &registers::resumable(&self.regs), self.sigmask, &self.xstate()?);
            memory::write(self.pid, frame_at, &frame)
                .map_err(TraceeError::request("writing the frame that heals a batch", self.tid))?;
        }
        let mut regs = self.regs;
        (regs.rip, regs.rbx, regs.r12) = (arena.base, table, count);
        (regs.rsp, regs.orig_rax) = (frame_at + FRAME_SP, u64::MAX);
        self.lend(&regs)?;
        let us = self.ns.0;
        for stop in 0..=batch.pauses() {
            self.resume_until(
                |s| ptrace::cont(s.tid, 0).map_err(TraceeError::request("resuming", s.tid)),
                |s, wait| wait == Wait::Signal(s.bell) && is_bell(s.tid, us),
            )?;
            if stop < batch.pauses() {
                at_pause(stop);
            }
        }
        if heal {
            // The frame in the arena is the next thread's as soon as it runs a batch: where we were killed then, this one
            // would go on as that.
            self.give_back()?;
        }
        batch.load(self.pid, self.tid)
    }

    /// Runs a batch that has become full, in a stub, and begins a new one.
    pub fn flush(&mut self, batch: &mut Batch) -> Result<()> {
        self.flush_for(batch, 0)
    }

    /// The same where it has no room for so many bytes more.
    pub fn flush_for(&mut self, batch: &mut Batch, bytes: usize) -> Result<()> {
        if batch.fits(bytes + 4096) {
            return Ok(());
        }
        let full = std::mem::replace(batch, Batch::new(batch.arena()));
        self.run(full, false)?.all_ok()
    }

    /// Resumes until `done` says that the stop is the one waited for. Signals that arrive meanwhile are kept.
    fn resume_until(
        &mut self,
        mut resume: impl FnMut(&Self) -> Result<()>,
        done: impl Fn(&Self, Wait) -> bool,
    ) -> Result<()> {
        loop {
            resume(self)?;
            let wait = ptrace::wait(self.tid, true).map_err(TraceeError::request("waiting", self.tid))?;
            match wait {
                w if done(self, w) => return Ok(()),
                Wait::Gone(status) => {
                    self.attached = false;
                    return Err(TraceeError::Died { tid: self.tid, status });
                }
                Wait::Signal(signal) if FAULTS.contains(&signal) => return Err(self.fault(signal)),
                Wait::Signal(signal) => self.deferred.push(signal),
                // clone3 in a batch: the child is traced from its birth.
                Wait::Event(_) => self.born.extend(ptrace::event_message(self.tid).map(|tid| tid as i32)),
                Wait::Nothing | Wait::EventStop(_) | Wait::Syscall => {}
            }
        }
    }

    fn fault(&self, signal: i32) -> TraceeError {
        let call = ptrace::regs(self.tid).map_or(0, |r| r.r12 as usize);
        TraceeError::Fault { tid: self.tid, signal, call }
    }

    /// Processes and threads that were born in batches of this thread since the last call, as we see their TIDs.
    pub fn born(&mut self) -> Vec<i32> {
        std::mem::take(&mut self.born)
    }

    /// Uses a bell that is not in this set of signals (bit n-1 for signal n): they are to be left pending.
    pub fn avoid_bells(&mut self, signals: u64) {
        let free = BELLS.into_iter().find(|s| signals & (1 << (s - 1)) == 0);
        self.bell = free.unwrap_or(self.bell);
    }

    /// Runs a batch that ends the process, by a call or by `signal` (0: none), which is delivered once.
    pub fn run_to_end(mut self, mut batch: Batch, signal: i32) -> Result<i32> {
        let arena = batch.arena();
        let (table, count) = batch.store(self.pid, [0; 3])?;
        let mut regs = self.regs;
        (regs.rip, regs.rbx, regs.r12, regs.orig_rax) = (arena.base, table, count, u64::MAX);
        ptrace::set_regs(self.tid, &regs).map_err(TraceeError::request("setting registers", self.tid))?;
        ptrace::set_sigmask(self.tid, 0)
            .map_err(TraceeError::request("setting the signal mask", self.tid))?;
        let (mut deliver, mut delivered) = (0, false);
        loop {
            ptrace::cont(self.tid, deliver).map_err(TraceeError::request("resuming", self.tid))?;
            deliver = 0;
            match ptrace::wait(self.tid, true).map_err(TraceeError::request("waiting", self.tid))? {
                Wait::Gone(status) => {
                    self.attached = false;
                    return Ok(status);
                }
                Wait::Signal(s) if s == signal && !delivered => (deliver, delivered) = (signal, true),
                // It has outlived its end.
                Wait::Signal(s) if FAULTS.contains(&s) => return Err(self.fault(s)),
                _ => {}
            }
        }
    }

    /// Writes memory of the process.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        memory::write(self.pid, address, bytes).map_err(TraceeError::request("writing memory", self.pid))
    }

    /// Ends tracing; the thread goes on with its own registers and mask.
    pub fn release(mut self) -> Result<()> {
        self.let_go()
    }

    /// Forgets the thread without touching it: it was killed, or dies with the tracer.
    pub fn abandon(mut self) {
        self.attached = false;
    }

    fn let_go(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.attached) {
            return Ok(());
        }
        self.give_back()?;
        ptrace::detach(self.tid, 0).map_err(TraceeError::request("detaching", self.tid))?;
        if let Ok(process) = pidfd::open(self.pid) {
            use std::os::fd::AsFd;
            for signal in self.deferred.drain(..) {
                let _ = pidfd::send_signal(process.as_fd(), signal);
            }
        }
        Ok(())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Err(error) = self.let_go() {
            tracing::warn!(tid = self.tid, %error, "a thread could not be released");
        }
    }
}

/// Did the thread send the signal it is stopped at to itself, by the batch's last call?
fn is_bell(tid: i32, ns_pid: i32) -> bool {
    // siginfo_t: si_signo, si_errno, si_code, pad, si_pid
    let Ok(info) = ptrace::siginfo(tid) else { return false };
    let word = |i: usize| i32::from_ne_bytes(info[i..i + 4].try_into().unwrap_or_default());
    word(8) == SI_TKILL && word(16) == ns_pid
}
