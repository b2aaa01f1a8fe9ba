//! Chunks that are stored already, found by what is in them.

use super::{
    PartReader, Result,
    page_table::{Pack, Stored},
};
use ckpt_common::image::{
    Digest,
    pack::{ChunkEntry, Encoding},
};
use std::collections::{BTreeSet, HashMap};

/// What two chunks with the same content have in common.
pub(super) type Content = (Digest, u32, Encoding);

/// Chunks by content: those of a base that it uses, and those that were written since.
#[derive(Default)]
pub(super) struct Known(HashMap<Content, Stored>);

/// What a chunk has in common with every chunk of the same content.
pub(super) fn content(chunk: &ChunkEntry) -> Content {
    (chunk.hash(), chunk.raw() as u32, chunk.encoding())
}

impl Known {
    /// Chunks of a base part, but not of these packs. Those it does not use may be gone.
    pub(super) fn of(base: &PartReader, except: &BTreeSet<u32>) -> Result<Self> {
        base.check_present()?;
        let mut known = HashMap::new();
        let live = base.live_chunks()?;
        for (number, pack) in (0..).zip(base.packs()).filter(|(number, _)| !except.contains(number)) {
            let Some(live) = live.get(pack) else { continue };
            let reader = base.store().open_pack(*pack)?;
            for (chunk, entry) in (0..).zip(reader.chunks()?).filter(|(chunk, _)| live.contains(*chunk)) {
                known.insert(content(entry), Stored { pack: Pack::OfBase(number), chunk, again: false });
            }
        }
        Ok(Self(known))
    }

    /// Where a chunk with this content is.
    pub(super) fn find(&self, chunk: &ChunkEntry) -> Option<Stored> {
        self.0.get(&content(chunk)).copied()
    }

    /// Remembers a chunk that was written.
    pub(super) fn add(&mut self, chunk: &ChunkEntry, place: Stored) {
        self.0.insert(content(chunk), Stored { again: true, ..place });
    }
}
