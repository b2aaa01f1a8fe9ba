//! Counters that several processors add to.

/// Adds one to a counter in a map value.
///
/// The compiler's BPF target has no `fetch_add` for `AtomicU64`; the instruction exists since v3.
///
/// # Safety
/// `counter` points into a map value that the verifier knows, and is aligned.
#[inline(always)]
pub(crate) unsafe fn increment(counter: *mut u64) {
    // SAFETY: the caller's promise; the instruction writes nothing but the counter.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({counter} + 0) += {one}",
            counter = in(reg) counter,
            one = in(reg) 1_u64,
        );
    }
}
