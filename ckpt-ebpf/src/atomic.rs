//! Instructions on words that several processors change.
//!
//! The compiler's BPF target has no read-modify-write operations for `AtomicU64`; the instructions exist since v3.

use core::arch::asm;

/// Adds one to a counter in a map value.
///
/// # Safety
/// `counter` points into a map value that the verifier knows, and is aligned.
#[inline(always)]
pub(crate) unsafe fn increment(counter: *mut u64) {
    // SAFETY: the caller's promise; the instruction writes nothing but the counter.
    unsafe {
        asm!(
            "lock *(u64 *)({counter} + 0) += {one}",
            counter = in(reg) counter,
            one = in(reg) 1_u64,
        );
    }
}

/// Adds one and gives the value before.
///
/// # Safety
/// As for [`increment`].
#[inline(always)]
pub(crate) unsafe fn take_number(counter: *mut u64) -> u64 {
    let mut value = 1_u64;
    // SAFETY: the caller's promise; the instruction writes nothing but the counter.
    unsafe {
        asm!(
            "{value} = atomic_fetch_add((u64 *)({counter} + 0), {value})",
            counter = in(reg) counter,
            value = inout(reg) value,
        );
    }
    value
}

/// Replaces a value if it is the expected one, and gives what was there.
///
/// # Safety
/// As for [`increment`].
#[inline(always)]
pub(crate) unsafe fn exchange_if(word: *mut u64, expected: u64, new: u64) -> u64 {
    let mut value = expected;
    // SAFETY: the caller's promise; the instruction writes nothing but the word. Its result is in r0, always.
    unsafe {
        asm!(
            "r0 = cmpxchg_64({word} + 0, r0, {new})",
            word = in(reg) word,
            new = in(reg) new,
            inout("r0") value,
        );
    }
    value
}
