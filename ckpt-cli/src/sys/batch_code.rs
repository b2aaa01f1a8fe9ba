//! The code of the remote batch: the only instructions of ours that ever run in a target.
//!
//! At `ckpt_batch_start`, `rbx` points to a table of calls (number, six arguments, result: eight words of 64
//! bits) and `r12` holds how many there are. The loop issues each in turn and stores its result. The last call
//! of a table sends the *bell*, a signal that stops the traced thread. Where nobody traces it any more the bell
//! is ignored, and the code goes on to rt_sigreturn(2), whose frame `rsp` points to: the thread gets its own
//! registers back by itself.

use std::arch::global_asm;

global_asm!(
    ".pushsection .text.ckpt_batch,\"ax\",@progbits",
    ".globl ckpt_batch_start",
    "ckpt_batch_start:",
    "2: mov rax, [rbx]",
    "mov rdi, [rbx + 8]",
    "mov rsi, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "mov r10, [rbx + 32]",
    "mov r8, [rbx + 40]",
    "mov r9, [rbx + 48]",
    "syscall",
    "mov [rbx + 56], rax",
    "add rbx, 64",
    "dec r12",
    "jnz 2b",
    "mov eax, 15",
    "syscall",
    "ud2",
    ".globl ckpt_batch_end",
    "ckpt_batch_end:",
    ".popsection",
);

unsafe extern "C" {
    static ckpt_batch_start: u8;
    static ckpt_batch_end: u8;
}

/// The machine code, position independent.
pub fn bytes() -> &'static [u8] {
    // SAFETY: both symbols are defined above, in one section, the second behind the first; text is never written.
    unsafe {
        let start = &raw const ckpt_batch_start;
        let len = (&raw const ckpt_batch_end).offset_from(start) as usize;
        std::slice::from_raw_parts(start, len)
    }
}
