//! The traffic hold: packets of held sockets are dropped, in both directions.
//!
//! A socket is named by its cookie: unique on the machine for as long as it is up, the same for
//! IPv4, IPv6, TCP and UDP, and different for equal addresses in two network namespaces.

use crate::atomic::increment;
use aya_ebpf::{
    EbpfContext,
    bindings::BPF_F_NO_PREALLOC,
    helpers::bpf_get_socket_cookie,
    macros::{cgroup_skb, map},
    maps::HashMap,
    programs::SkBuffContext,
};
use ckpt_common::bpf::{Dropped, MAX_HELD};

/// What a cgroup_skb program returns.
const DROP: i32 = 0;
const PASS: i32 = 1;

/// The held sockets, by cookie, and what was dropped for each.
#[map]
static HELD: HashMap<u64, Dropped> = HashMap::with_max_entries(MAX_HELD, BPF_F_NO_PREALLOC);

#[inline(always)]
fn held(context: &SkBuffContext) -> Option<*mut Dropped> {
    // SAFETY: the context is the packet this program was called for.
    let cookie = unsafe { bpf_get_socket_cookie(context.as_ptr()) };
    HELD.get_ptr_mut(&cookie)
}

/// Called with every packet before it leaves.
#[cgroup_skb]
pub fn hold_egress(context: SkBuffContext) -> i32 {
    let Some(dropped) = held(&context) else { return PASS };
    // SAFETY: the pointer comes from the map.
    unsafe { increment(&raw mut (*dropped).egress) };
    DROP
}

/// Called with every packet before its socket gets it.
#[cgroup_skb]
pub fn hold_ingress(context: SkBuffContext) -> i32 {
    let Some(dropped) = held(&context) else { return PASS };
    // SAFETY: the pointer comes from the map.
    unsafe { increment(&raw mut (*dropped).ingress) };
    DROP
}
