//! Copy before write: a page that is on the list and about to be overwritten is copied into a slot first.
//!
//! A protected page is written to only after a page fault, and the tracepoints are at the very beginning of the
//! fault. Several threads may fault on a page at the same time, and each may be the first to go on; so each makes a
//! copy, and the first to have finished its own enters it. Nobody has gone on before that, so that copy is clean.

use crate::atomic::{exchange_if, increment, take_number};
use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, bpf_pidns_info},
    helpers::generated::{bpf_get_ns_current_pid_tgid, bpf_probe_read_user},
    macros::{btf_tracepoint, map},
    maps::Array,
    programs::BtfTracePointContext,
};
use ckpt_common::bpf::{
    COW_MAX_NAMESPACES, COW_MAX_REGIONS, COW_RESERVE, CowControl, CowPage, CowRegion, PageState, SlotOwner,
};

/// `error_code` of a write to a page that is there (arch/x86/include/asm/trap_pf.h: `X86_PF_PROT`, `X86_PF_WRITE`).
const WRITE_TO_PRESENT: u64 = 3;
/// Steps of the search: 2^17 regions.
const STEPS: u32 = 18;

#[map]
static COW_CONTROL: Array<CowControl> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Ascending by process and page.
#[map]
static COW_REGIONS: Array<CowRegion> = Array::with_max_entries(COW_MAX_REGIONS, BPF_F_MMAPABLE);
/// A word for each page of the regions: [`PageState`]. The loader sets the size.
#[map]
static COW_PAGES: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Old content. The loader sets the size, a power of two.
#[map]
static COW_SLOTS: Array<CowPage> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Whose content is in a slot: [`SlotOwner`]. As many as slots.
#[map]
static COW_OWNERS: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// A fault of a program.
#[btf_tracepoint(function = "page_fault_user")]
pub fn cow_fault_user(context: BtfTracePointContext) -> i32 {
    fault(context.arg(0), context.arg(2));
    0
}

/// A fault of the kernel on a program's behalf: read(2) into a page, for example.
#[btf_tracepoint(function = "page_fault_kernel")]
pub fn cow_fault_kernel(context: BtfTracePointContext) -> i32 {
    fault(context.arg(0), context.arg(2));
    0
}

#[inline(always)]
fn fault(address: u64, error_code: u64) {
    if error_code & WRITE_TO_PRESENT != WRITE_TO_PRESENT {
        return;
    }
    let Some(control) = COW_CONTROL.get_ptr_mut(0) else { return };
    // SAFETY: a map value; the fields that are read here are set while all guarded processes are stopped.
    let (regions, slots) = unsafe { ((*control).regions, (*control).slots) };
    if regions == 0 {
        return;
    }
    let Some(process) = process(control) else { return };
    let Some(index) = find(process, address >> 12, regions) else { return };
    let Some(state) = COW_PAGES.get_ptr_mut(index) else { return };
    // SAFETY: a map value that others change, so it is read as it is now.
    if unsafe { core::ptr::read_volatile(state) } != PageState::Listed as u64 {
        return;
    }
    // SAFETY: pointers into map values; a slot belongs to whoever took its number, until the reader has emptied it.
    unsafe {
        let taken = core::ptr::read_volatile(&raw const (*control).taken);
        let emptied = core::ptr::read_volatile(&raw const (*control).emptied);
        // Others may take numbers at the same time: as many as there are processors.
        if taken.wrapping_sub(emptied) + COW_RESERVE >= slots {
            exchange_if(state, PageState::Listed as u64, PageState::Lost as u64);
            increment(&raw mut (*control).lost);
            return;
        }
        let number = take_number(&raw mut (*control).taken);
        let slot = (number & (slots - 1)) as u32;
        let (Some(content), Some(owner)) = (COW_SLOTS.get_ptr_mut(slot), COW_OWNERS.get_ptr_mut(slot)) else {
            return;
        };
        let page = (address & !0xfff) as *const core::ffi::c_void;
        let copied = bpf_probe_read_user(content.cast(), 4096, page) == 0;
        let before = if copied {
            exchange_if(state, PageState::Listed as u64, PageState::Taken as u64)
        } else {
            PageState::Lost as u64
        };
        let used = copied && before == PageState::Listed as u64;
        let whose = if used { SlotOwner::FIRST + u64::from(index) } else { SlotOwner::NOBODY };
        // Behind the content: stores of one processor are seen in their order.
        exchange_if(owner, SlotOwner::EMPTY, whose);
    }
}

/// Number of the namespace and PID of the process that faults, as in [`CowRegion::process`].
#[inline(always)]
fn process(control: *const CowControl) -> Option<u64> {
    let mut info = bpf_pidns_info { pid: 0, tgid: 0 };
    for number in 0..COW_MAX_NAMESPACES {
        // SAFETY: a map value that does not change while programs use it.
        let (device, inode) =
            unsafe { ((*control).namespaces[number].device, (*control).namespaces[number].inode) };
        if inode == 0 {
            return None;
        }
        // SAFETY: the structure has the stated size and lives through the call.
        let result = unsafe {
            bpf_get_ns_current_pid_tgid(device, inode, &raw mut info, size_of::<bpf_pidns_info>() as u32)
        };
        if result == 0 {
            return Some((number as u64) << 32 | u64::from(info.tgid));
        }
    }
    None
}

/// Index of the page's word, if it is in a region.
#[inline(always)]
fn find(process: u64, page: u64, regions: u64) -> Option<u32> {
    let (mut low, mut high) = (0_u64, regions);
    for _ in 0..STEPS {
        if low >= high {
            return None;
        }
        let middle = (low + high) / 2;
        let region = COW_REGIONS.get_ptr(middle as u32)?;
        // SAFETY: a map value that does not change while programs use it.
        let (whose, start, end, first) =
            unsafe { ((*region).process, (*region).start, (*region).end, (*region).first) };
        if process < whose || (process == whose && page < start) {
            high = middle;
        } else if process > whose || page >= end {
            low = middle + 1;
        } else {
            return Some((first + (page - start)) as u32);
        }
    }
    None
}
