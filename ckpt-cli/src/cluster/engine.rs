//! What an agent needs from the rooms that capture and rebuild.
//!
//! All calls of a session come from one thread, because ptrace(2) knows its tracer by thread; so
//! sessions need not be `Send`. Tests of the protocol put a fake in their place.

use crate::store::{PartReader, PartWriter, Store};
use anyhow::Result;
use ckpt_common::image::manifest::PartRef;
use ckpt_common::wire::{
    Connection, CutReport, DumpTask, MemoryReport, NetworkTask, PlanReport, RestoreOptions, RestoreReport,
};

/// Makes sessions.
pub trait Engine {
    /// Looks at the processes and their descendants and lists everything that stands in the way.
    /// Nothing is touched.
    fn plan_dump(
        &self,
        pids: &[i32],
        task: &DumpTask,
        store: &Store,
    ) -> Result<(Box<dyn DumpSession>, PlanReport)>;

    /// Looks at a part and at this node and lists everything that stands in the way of bringing it
    /// back here. Nothing is built.
    fn plan_restore(
        &self,
        part: PartReader,
        options: &RestoreOptions,
    ) -> Result<(Box<dyn RestoreSession>, RestoreReport)>;
}

/// What becomes of the job at the end of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It runs on.
    LeaveRunning,
    /// It is killed, its sockets silently closed.
    Kill,
}

/// One dump on one node. Dropped at any time, it lets the job run on unharmed.
pub trait DumpSession {
    /// This node's part of the checkpoint that this one builds on, if there is one. Asked once, before
    /// [`Self::arm`].
    fn base(&mut self) -> Result<Option<PartReader>>;
    /// Makes ready what the freeze must not wait for; memory that is saved ahead goes to the part. May be
    /// repeated.
    fn arm(&mut self, part: &mut PartWriter) -> Result<()>;
    /// Bytes of memory modified since the base, or since [`Self::arm`] where there is none. The job runs.
    fn sample(&mut self) -> Result<u64>;
    /// Freezes the job and takes its state.
    fn cut(&mut self) -> Result<CutReport>;
    /// Takes what connections have received: every sender, on all nodes, is cut. Gives all
    /// connections with their positions.
    fn settle(&mut self) -> Result<Vec<Connection>>;
    /// Lets the job run on; its state stays.
    fn thaw(&mut self) -> Result<()>;
    /// Writes everything to the part.
    fn save(&mut self, part: &mut PartWriter) -> Result<()>;
    /// How the memory was saved.
    fn memory(&self) -> MemoryReport;
    /// The checkpoint is committed, with this part.
    fn finish(self: Box<Self>, outcome: Outcome, part: &PartRef) -> Result<()>;
}

/// One restore on one node. Dropped before [`RestoreSession::release`] has succeeded, it removes
/// what it has built.
pub trait RestoreSession {
    /// Builds processes, objects and memory. Nothing of it runs, its connections do not speak.
    fn build(&mut self, task: &NetworkTask) -> Result<()>;
    /// Lets connections speak: every end exists, on all nodes. Nothing of the job runs.
    fn connect(&mut self) -> Result<()>;
    /// Lets everything run. Gives the PIDs as this node sees them.
    fn release(self: Box<Self>) -> Result<Vec<i32>>;
}
