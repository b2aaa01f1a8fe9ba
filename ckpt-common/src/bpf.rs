//! What the programs in the kernel share with us: map keys and values, `repr(C)`, no `std`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most sockets that one traffic hold can name.
pub const MAX_HELD: u32 = 1 << 20;

/// Packets that a hold has dropped for one socket: the value in the map `HELD`, whose key is the
/// socket's cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Dropped {
    /// Packets that did not leave.
    pub egress: u64,
    /// Packets that did not arrive.
    pub ingress: u64,
}
