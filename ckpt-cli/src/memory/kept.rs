//! What one dump leaves for the next; between the two, [`super::keeper`] has it.

use super::page_set::PageSet;
use super::tracker::Tracker;
use crate::tracee::mapping_flags::MappingFlags;
use ckpt_common::image::MemoryId;

/// What an earlier dump has left for the next one.
#[derive(Debug, Default)]
pub struct Kept {
    /// What tracks the address spaces.
    pub spaces: Vec<KeptSpace>,
    /// What reads flags of mappings.
    pub flags: Option<MappingFlags>,
}

/// What an earlier dump has left of an address space.
#[derive(Debug)]
pub struct KeptSpace {
    /// The process, and when it started.
    pub pid: i32,
    /// In ticks since the node's boot.
    pub started: u64,
    /// Its object in the base.
    pub memory: MemoryId,
    /// Modified pages of which the kernel has forgotten that they are.
    pub modified: PageSet,
    /// What tracks it.
    pub tracker: Tracker,
}
