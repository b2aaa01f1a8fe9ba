//! What is kept of a job between two dumps, and which checkpoint it is relative to.

use crate::{
    memory::{
        keeper::{Keeper, State},
        kept::Kept,
    },
    store::{PartReader, Store},
};
use anyhow::{Context, Result};
use ckpt_common::image::manifest::{BaseRef, PartRef};

/// One dump's dealings with the job's keeper on this node.
pub(super) struct Keeping {
    pub(super) keeper: Option<Keeper>,
    pub(super) store: Store,
    /// Name of the job in the store.
    pub(super) job: String,
    /// The dump under way.
    pub(super) dump: String,
    pub(super) base: Option<Base>,
    /// The operator wants everything saved.
    pub(super) full: bool,
}

/// The checkpoint that what was kept is relative to.
pub(super) struct Base {
    name: BaseRef,
    dump: String,
    part: PartRef,
}

impl Keeping {
    fn keeper(&mut self) -> Keeper {
        self.keeper.take().unwrap_or_else(|| Keeper::of(self.store.root(), &self.job))
    }

    /// Takes what was kept since the last checkpoint; nothing where everything has to be saved.
    pub(super) fn take(&mut self) -> Option<(PartReader, Kept)> {
        let mut keeper = self.keeper();
        let state = keeper.take();
        self.keeper = Some(keeper);
        // Whatever was kept goes: trackers are made anew.
        let state = state.filter(|_| !self.full)?;
        match self.open(&state) {
            Ok((name, part)) => {
                self.base = Some(Base { name, dump: state.dump, part: state.part });
                Some((part, state.kept))
            }
            Err(error) => {
                tracing::info!("everything is saved, since the last checkpoint is of no use: {error:#}");
                None
            }
        }
    }

    /// The base, if it is still committed, with this node's part.
    fn open(&self, state: &State) -> Result<(BaseRef, PartReader)> {
        let committed = self.store.checkpoints(&self.job.parse()?)?;
        let base = committed.iter().rev().find(|checkpoint| checkpoint.manifest.dump == state.dump);
        let base = base.context("it is not in the store any more")?;
        let ours = base.manifest.nodes.iter().any(|node| node.part.id == state.part.id);
        anyhow::ensure!(ours, "it has no part of this node");
        Ok((BaseRef { name: base.name(), id: base.id }, self.store.open_part(&state.part)?))
    }

    /// Name of the checkpoint that this one builds on.
    pub(super) fn base_name(&self) -> Option<BaseRef> {
        self.base.as_ref().map(|base| base.name.clone())
    }

    /// The dump is committed: the next one builds on it.
    pub(super) fn give_new(&mut self, part: &PartRef, kept: Kept) {
        let (dump, part) = (self.dump.clone(), part.clone());
        self.give(State { dump, part, kept });
    }

    /// The dump is not committed: the next one builds on the same checkpoint.
    pub(super) fn give_back(&mut self, kept: Kept) {
        if let Some(Base { dump, part, .. }) = self.base.take() {
            self.give(State { dump, part, kept });
        }
    }

    fn give(&mut self, state: State) {
        if state.kept.spaces.is_empty() {
            return;
        }
        if let Err(error) = self.keeper().give(state) {
            tracing::warn!("nothing is kept, so the next checkpoint is a full one: {error:#}");
        }
    }
}
