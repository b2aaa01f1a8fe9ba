//! Is a checkpoint whole?

use super::{PartReader, Result, Store, StoreError, live::ChunkSet, pack_reader::Unpacker};
use ckpt_common::image::{
    Digest,
    manifest::{Checkpoint, NodePart},
    pages::Source,
};
use std::collections::BTreeMap;

/// What a verification has looked at and found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Parts opened.
    pub parts: usize,
    /// Packs opened.
    pub packs: usize,
    /// Chunks whose content was read, hashed and unpacked.
    pub chunks: u64,
    /// Bytes of content in them.
    pub bytes: u64,
    /// Connections whose positions were compared.
    pub channels: usize,
    /// Everything that is wrong.
    pub problems: Vec<Problem>,
}

/// Something that is wrong with a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Name of the node, where it is one node's.
    pub node: Option<String>,
    /// What it is.
    pub what: String,
}

/// A damaged pack would otherwise bury the other problems.
const PROBLEMS_PER_PACK: usize = 5;

impl Store {
    /// Checks a checkpoint: every part and pack is there and has its name's hash, page maps lie
    /// inside the packs, required records are known, connections have lost no byte; of the chunks
    /// that it uses, `sample` percent (1 to 100), evenly spread, are read, hashed and unpacked.
    /// (Chunks that no checkpoint uses any more may have been pruned.)
    pub fn verify(&self, checkpoint: &Checkpoint, sample: u8) -> VerifyReport {
        let mut report = VerifyReport::default();
        let mut packs = BTreeMap::new();
        for node in &checkpoint.manifest.nodes {
            self.verify_part(node, &mut packs, &mut report);
        }
        for (pack, (node, live)) in packs {
            let Err(error) = self.verify_pack(pack, &live, sample, &node, &mut report) else { continue };
            report.add(Some(&node), error);
        }
        for channel in &checkpoint.manifest.channels {
            report.channels += 1;
            if let Err(what) = channel.check() {
                report.problems.push(Problem { node: None, what });
            }
            let nodes = checkpoint.manifest.nodes.len();
            if channel.ends.iter().any(|end| end.node as usize >= nodes) {
                let what = format!(
                    "TCP {}: one of its nodes is not in the checkpoint",
                    channel.ends[0].position.local
                );
                report.problems.push(Problem { node: None, what });
            }
        }
        report
    }

    fn verify_part(
        &self,
        node: &NodePart,
        packs: &mut BTreeMap<Digest, (String, ChunkSet)>,
        report: &mut VerifyReport,
    ) {
        let part = match self.open_part(&node.part) {
            Ok(part) => part,
            Err(error) => return report.add(Some(&node.name), error),
        };
        report.parts += 1;
        let mut add = |pack: Digest, chunks: &ChunkSet| {
            let entry = packs.entry(pack).or_insert_with(|| (node.name.clone(), ChunkSet::default()));
            entry.1.add_all(chunks);
        };
        match part.live_chunks() {
            Ok(live) => live.iter().for_each(|(&pack, chunks)| add(pack, chunks)),
            Err(error) => report.add(Some(&node.name), error),
        }
        node.part.packs.iter().for_each(|pack| add(pack.id, &ChunkSet::default()));
        if let Err(error) = part.check_known() {
            report.add(Some(&node.name), error);
        }
        for id in part.memories() {
            if let Err(error) = check_bounds(&part, id) {
                // A pack that cannot be opened is reported with the packs.
                if !matches!(&error, StoreError::Missing { .. } | StoreError::Io { .. }) {
                    report.add(Some(&node.name), error);
                }
            }
        }
    }

    fn verify_pack(
        &self,
        id: Digest,
        live: &ChunkSet,
        sample: u8,
        node: &str,
        report: &mut VerifyReport,
    ) -> Result<()> {
        let pack = self.open_pack(id)?;
        let mut unpacker = Unpacker::new()?;
        report.packs += 1;
        let (mut bad, mut buffer) = (0, Vec::new());
        let every = u64::from(sample.clamp(1, 100));
        let live = (0..pack.chunks()?.len()).filter(|&number| live.contains(number as u32));
        for (_, number) in live.enumerate().filter(|(n, _)| (*n as u64 * every) % 100 < every) {
            match pack.read(number, &mut unpacker, std::mem::take(&mut buffer), true) {
                Ok(content) => {
                    report.chunks += 1;
                    report.bytes += content.len() as u64;
                    buffer = content;
                }
                Err(error) => {
                    report.add(Some(node), error);
                    bad += 1;
                }
            }
            if bad == PROBLEMS_PER_PACK {
                break;
            }
        }
        Ok(())
    }
}

fn check_bounds(part: &PartReader, id: ckpt_common::image::MemoryId) -> Result<()> {
    for run in part.page_map(id)? {
        if let Source::Chunk { pack, chunk, page } = run.source() {
            part.pack_of(pack, chunk, page, run.count.get())?;
        }
    }
    Ok(())
}

impl VerifyReport {
    fn add(&mut self, node: Option<&str>, error: StoreError) {
        let problem = Problem { node: node.map(str::to_owned), what: error.to_string() };
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }
}
