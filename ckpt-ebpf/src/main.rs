//! The programs of ckpt that run in the kernel.
//!
//! * [`cow`]: the old content of a page is saved before it is overwritten
//! * [`mappings`]: the mappings of a process with their flags
//! * [`hold`]: no packet of a held connection gets in or out. Attached at the root of the cgroup2 tree: cgroup
//!   hooks act on the cgroup a socket was created in, so a program on a job's own cgroup would miss the sockets it
//!   brought along.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod atomic;
mod cow;
mod hold;
mod mappings;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // No code path panics; the verifier would refuse the loop if one did.
    loop {}
}

/// Read by the kernel: some helpers are only for programs under a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
