//! The engine that works on real processes: from the agent's words to those of the rooms that
//! capture and rebuild.

use super::engine::{DumpSession, Engine, RestoreSession};
use crate::{capture, objects, store::PartReader};
use anyhow::{Result, bail};
use ckpt_common::wire::{
    Blocker, CutReport, DumpOptions, FilePolicy, PlanReport, RestoreOptions, RestoreReport,
};

/// Real processes.
pub struct LiveEngine;

impl Engine for LiveEngine {
    fn plan_dump(&self, _pids: &[i32], _options: &DumpOptions) -> Result<(Box<dyn DumpSession>, PlanReport)> {
        bail!("x")
    }

    fn plan_restore(
        &self,
        _part: PartReader,
        _options: &RestoreOptions,
    ) -> Result<(Box<dyn RestoreSession>, RestoreReport)> {
        bail!("x")
    }
}
