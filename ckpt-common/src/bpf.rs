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

/// The first words of a mapping's `struct vm_area_struct` (linux/mm_types.h). It begins with the first address and the
/// first behind; where the flags are depends on the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MappingWords(pub [u64; 16]);

/// Most regions whose pages can be guarded.
pub const COW_MAX_REGIONS: u32 = 1 << 16;
/// Most PID namespaces that guarded processes can be in.
pub const COW_MAX_NAMESPACES: usize = 4;
/// Slots that are never used, because processors look whether there is one before they take it: at least as many
/// as there are processors.
pub const COW_RESERVE: u64 = 512;

/// A page's content.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct CowPage(pub [u8; 4096]);

/// A PID namespace, as stat(2) of `/proc/PID/ns/pid` names it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PidNamespace {
    /// Device in the kernel's numbers: (major << 20 | minor).
    pub device: u64,
    /// Inode; 0 where there is none.
    pub inode: u64,
}

/// What the guard of pages and its reader share.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CowControl {
    /// Number of regions; 0: nothing is guarded.
    pub regions: u64,
    /// Number of slots, a power of two.
    pub slots: u64,
    /// Slots that were taken so far. The next one is this number modulo `slots`.
    pub taken: u64,
    /// Slots that the reader has emptied so far.
    pub emptied: u64,
    /// Pages that were overwritten because there was no slot.
    pub lost: u64,
    /// PID namespaces of the guarded processes.
    pub namespaces: [PidNamespace; COW_MAX_NAMESPACES],
}

/// Neighbouring pages of a process.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CowRegion {
    /// (number of the namespace << 32 | PID in it).
    pub process: u64,
    /// First page number.
    pub start: u64,
    /// First page number behind.
    pub end: u64,
    /// Index of the first page's word.
    pub first: u64,
}

/// What is with a page in a region.
#[repr(u64)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Not on the list.
    Free = 0,
    /// On the list: its content is to be saved.
    Listed = 1,
    /// Its old content is in a slot, or was.
    Taken = 2,
    /// It was overwritten, and there was no slot.
    Lost = 3,
}

/// Whose content is in a slot.
pub struct SlotOwner;

impl SlotOwner {
    /// The copy is not finished.
    pub const EMPTY: u64 = 0;
    /// Nobody's: another thread was first.
    pub const NOBODY: u64 = 1;
    /// That of the page with word 0; and so on.
    pub const FIRST: u64 = 2;
}
