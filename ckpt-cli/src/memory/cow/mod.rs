//! Copy before write: a consistent copy of a list of pages while the program runs and writes to them.
//!
//! The pages are protected against writes at the cut. The writer copies them in list order; where the program writes
//! to a page that is still on the list, its old content is saved first.

use super::page_set::PageSet;
use super::space::Space;
use super::staging::Staging;
use crate::store::PartWriter;
use anyhow::Result;
use std::collections::BTreeMap;

/// What happens to pages that cannot be copied in the freeze.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// What costs the program least, of what the kernel offers.
    #[default]
    Auto,
    /// A BPF program on page faults copies the old content.
    Bpf,
    /// Write faults wait for a thread of ours that copies the old content.
    Uffd,
    /// The freeze lasts until everything is copied.
    Stop,
}

impl Way {
    /// Can pages be left for after the freeze?
    pub fn can_copy_before_write(self) -> bool {
        false
    }
}

/// Pages that are guarded while the program runs.
#[derive(Debug)]
pub struct Cow {
    guarded: BTreeMap<i32, PageSet>,
}

impl Cow {
    /// Guards the previous lists of these spaces, whose processes are stopped. Nothing where that is not possible.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn begin(_: Way, _: &[&Space]) -> Result<Option<Self>> {
        Ok(None)
    }

    /// Pages of a process that need not be copied now.
    pub fn guarded(&self, pid: i32) -> PageSet {
        self.guarded.get(&pid).cloned().unwrap_or_default()
    }

    /// Saves everything that is guarded.
    ///
    /// # Errors
    /// Old content was lost.
    pub fn save(self, _: &mut BTreeMap<i32, Space>, _: &mut Staging, _: &mut PartWriter) -> Result<()> {
        Ok(())
    }
}
