//! What this CPU can do.

/// XCR0: the register sets that the system has enabled (Intel SDM vol. 1, 13.3); 0 without XSAVE.
pub fn xstate_features() -> u64 {
    if !std::arch::is_x86_feature_detected!("xsave") {
        return 0;
    }
    // SAFETY: XGETBV exists, because the CPU has XSAVE and the system has enabled it.
    unsafe { xgetbv() }
}

#[target_feature(enable = "xsave")]
fn xgetbv() -> u64 {
    // SAFETY: register 0 exists wherever XGETBV does.
    unsafe { std::arch::x86_64::_xgetbv(0) }
}
