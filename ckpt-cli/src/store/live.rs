//! Which chunks a part uses.

use super::{PartReader, Result};
use ckpt_common::image::{Digest, pack::MAX_CHUNKS, pages::Source};
use std::collections::BTreeMap;

/// A set of chunks of one pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ChunkSet(Box<[u64; MAX_CHUNKS as usize / 64]>);

impl Default for ChunkSet {
    fn default() -> Self {
        Self(Box::new([0; MAX_CHUNKS as usize / 64]))
    }
}

impl ChunkSet {
    /// Adds a chunk; one that no pack can have is not added.
    pub(super) fn insert(&mut self, chunk: u32) {
        if let Some(word) = self.0.get_mut(chunk as usize / 64) {
            *word |= 1 << (chunk % 64);
        }
    }

    pub(super) fn contains(&self, chunk: u32) -> bool {
        self.0.get(chunk as usize / 64).is_some_and(|word| word & (1 << (chunk % 64)) != 0)
    }

    pub(super) fn add_all(&mut self, other: &Self) {
        self.0.iter_mut().zip(&*other.0).for_each(|(word, other)| *word |= other);
    }
}

/// Chunks in use, by pack.
pub(super) type LiveChunks = BTreeMap<Digest, ChunkSet>;

impl PartReader {
    /// The chunks that its page maps point into.
    pub(super) fn live_chunks(&self) -> Result<LiveChunks> {
        let mut live = vec![ChunkSet::default(); self.packs().len()];
        for id in self.memories() {
            for run in self.page_map(id)? {
                if let Source::Chunk { pack, chunk, .. } = run.source() {
                    live[pack as usize].insert(chunk);
                }
            }
        }
        Ok(self.packs().iter().copied().zip(live).collect())
    }
}
