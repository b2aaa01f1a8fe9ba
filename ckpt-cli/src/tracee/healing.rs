//! What makes an injected call heal itself when its tracer is killed.
//!
//! Before the registers of a running program's thread are changed, a frame of rt_sigreturn(2) with its true
//! registers lies in the target, and every path of the injected code ends in rt_sigreturn. The tracer takes the
//! thread back before it gets there; where the tracer is gone, the thread restores itself.

use super::proc::Maps;
use crate::sys::{memory, ptrace::UserRegs};
use memchr::memmem;
use std::collections::HashMap;

const SYSCALL: &[u8] = b"\x0f\x05";
/// mov $15, %rax; syscall: every restorer of signal handlers (rt_sigreturn is call 15).
const RESTORERS: [&[u8]; 2] = [b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05", b"\xb8\x0f\x00\x00\x00\x0f\x05"];
/// Offset of the software-reserved bytes in the legacy area (arch/x86/include/uapi/asm/sigcontext.h).
const FX_SW_RESERVED: usize = 464;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
/// Size of ucontext behind the return address, up to and with the signal mask.
const UCONTEXT_SIZE: usize = 16 + 24 + 256 + 8;

/// A `syscall` instruction followed by nothing but register clearing, stack adjustment and `ret`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gadget {
    /// Offset of the instruction.
    offset: u64,
    /// Distance from the stack pointer (which `rbp` must equal) to the return address that `ret` takes.
    ret_slot: u64,
}

/// Follows the bytes behind a `syscall`; the distance of the return address from `rsp` (`rbp` being equal to it).
fn follow(code: &[u8]) -> Option<u64> {
    let (mut at, mut sp, mut rbp_kept) = (0usize, 0u64, true);
    loop {
        match *code.get(at..)? {
            [0xc3, ..] => return Some(sp),
            [0x58..=0x5b | 0x5e | 0x5f, ..] => (at, sp) = (at + 1, sp + 8),
            [0x5d, ..] => (at, sp, rbp_kept) = (at + 1, sp + 8, false),
            [0x41, 0x58..=0x5f, ..] => (at, sp) = (at + 2, sp + 8),
            [0xc9, ..] if rbp_kept => (at, sp, rbp_kept) = (at + 1, 8, false),
            [0x48, 0x83, 0xc4, n @ 0..=0x7f, ..] => (at, sp) = (at + 4, sp + u64::from(n)),
            [0x31, 0xc0 | 0xc9 | 0xd2 | 0xdb | 0xf6 | 0xff, ..] => at += 2,
            [0x45, 0x31, 0xc0..=0xff, ..] => at += 3,
            _ => return None,
        }
    }
}

fn find_gadget(code: &[u8]) -> Option<Gadget> {
    memmem::find_iter(code, SYSCALL).find_map(|i| {
        let ret_slot = follow(&code[i + 2..code.len().min(i + 64)])?;
        Some(Gadget { offset: i as u64, ret_slot })
    })
}

fn find_restorer(code: &[u8]) -> Option<u64> {
    RESTORERS.iter().find_map(|pattern| memmem::find(code, pattern)).map(|at| at as u64)
}

/// Where, in one process, the pieces are. Addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pieces {
    /// A `syscall` instruction.
    pub syscall: u64,
    /// See [`Gadget`]; 0 and `restorer` `None` where the process has no restorer.
    pub ret_slot: u64,
    /// Code that calls rt_sigreturn(2).
    pub restorer: Option<u64>,
}

/// Looks for the pieces; remembers what it found per file, so that a hundred processes cost one search.
#[derive(Debug, Default)]
pub struct Finder {
    restorers: HashMap<(u64, u64, u64), Option<u64>>,
    vdso: HashMap<Vec<u8>, Option<Gadget>>,
}

impl Finder {
    /// Pieces of one process; `None` where it has no vdso with a usable `syscall`.
    pub fn find(&mut self, pid: i32, maps: &Maps) -> Option<Pieces> {
        let vdso = maps.iter().find(|m| m.path == "[vdso]")?;
        let code = read(pid, vdso.start, vdso.end)?;
        let plain = memmem::find(&code, SYSCALL)? as u64 + vdso.start;
        let gadget = *self.vdso.entry(code).or_insert_with_key(|code| find_gadget(code));
        // The C library has it. Where there is none, the program itself, which may be large.
        let mut code: Vec<_> = maps.iter().filter(|m| m.executable() && m.inode != 0).collect();
        code.sort_by_key(|m| (!is_c_library(&m.path), m.size()));
        let restorer = code.into_iter().find_map(|m| {
            let key = (m.device, m.inode, m.offset);
            let offset = *self
                .restorers
                .entry(key)
                .or_insert_with(|| read(pid, m.start, m.end).and_then(|code| find_restorer(&code)));
            offset.map(|o| m.start + o)
        });
        Some(match (gadget, restorer) {
            (Some(g), Some(r)) => {
                Pieces { syscall: vdso.start + g.offset, ret_slot: g.ret_slot, restorer: Some(r) }
            }
            _ => Pieces { syscall: plain, ret_slot: 0, restorer: None },
        })
    }
}

fn is_c_library(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    ["libc.so", "libc-", "ld-musl"].iter().any(|known| name.starts_with(known))
}

fn read(pid: i32, start: u64, end: u64) -> Option<Vec<u8>> {
    // Text of a mapping is at most a few hundred MiB; larger ones are not where a restorer is.
    let len = usize::try_from(end - start).ok().filter(|l| *l <= 1 << 28)?;
    let mut code = vec![0u8; len];
    memory::read(pid, start, &mut code).ok()?;
    Some(code)
}

/// Builds the frame. It must be written at `at`; `rsp` must be [`FRAME_SP`] above `at` when rt_sigreturn is called.
/// `regs` are those to go on with ([`super::registers::resumable`]).
pub fn frame(at: u64, regs: &UserRegs, sigmask: u64, xstate: &[u8]) -> Vec<u8> {
    let xstate_at = (at + FRAME_SP + UCONTEXT_SIZE as u64).next_multiple_of(64);
    let mut out = Vec::with_capacity(xstate.len() + 512);
    let mut put = |words: &[u64]| words.iter().for_each(|w| out.extend_from_slice(&w.to_ne_bytes()));
    put(&[0]); // return address, unused
    put(&[0b111, 0]); // uc_flags: UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS; uc_link
    put(&[0, 7, 0]); // uc_stack with impossible flags: the kernel refuses it silently and keeps the alternate stack
    put(&[regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15]);
    put(&[
        regs.rdi,
        regs.rsi,
        regs.rbp,
        regs.rbx,
        regs.rdx,
        regs.rax,
        regs.rcx,
        regs.rsp,
        regs.rip,
        regs.eflags,
    ]);
    put(&[regs.cs & 0xffff | (regs.ss & 0xffff) << 48]); // cs, gs, fs, ss
    put(&[0, 0, 0, 0]); // err, trapno, oldmask, cr2
    put(&[xstate_at, 0, 0, 0, 0, 0, 0, 0, 0]); // fpstate, reserved
    put(&[sigmask]);
    out.resize((xstate_at - at) as usize, 0);
    let start = out.len();
    out.extend_from_slice(xstate);
    if xstate.len() >= FX_SW_RESERVED + 48 {
        let features =
            u64::from_ne_bytes(xstate[FX_SW_RESERVED..FX_SW_RESERVED + 8].try_into().unwrap_or_default());
        let size = xstate.len() as u32;
        let sw = &mut out[start + FX_SW_RESERVED..start + FX_SW_RESERVED + 48];
        sw.fill(0);
        sw[0..4].copy_from_slice(&FP_XSTATE_MAGIC1.to_ne_bytes());
        sw[4..8].copy_from_slice(&(size + 4).to_ne_bytes());
        sw[8..16].copy_from_slice(&features.to_ne_bytes());
        sw[16..20].copy_from_slice(&size.to_ne_bytes());
        out.extend_from_slice(&FP_XSTATE_MAGIC2.to_ne_bytes());
    }
    out
}

/// Distance of the stack pointer from the frame's first byte at the call of rt_sigreturn(2): the return address was
/// popped.
pub const FRAME_SP: u64 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gadget_tails_are_followed() {
        assert_eq!(follow(b"\xc3"), Some(0));
        assert_eq!(follow(b"\x31\xd2\x45\x31\xdb\x5b\x41\x5e\xc3"), Some(16));
        assert_eq!(follow(b"\xc9\x31\xd2\xc3"), Some(8));
        assert_eq!(follow(b"\x48\x83\xc4\x30\x5b\xc3"), Some(0x38));
        assert_eq!(follow(b"\x48\x83\xf8\x20\xc3"), None);
        assert_eq!(follow(b"\x5d\xc9\xc3"), None);
        assert_eq!(follow(b"\x31\xd2"), None);
    }
}
