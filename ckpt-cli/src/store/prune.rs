//! Removing old checkpoints, and what only they needed.
//!
//! First the old manifests go, then what no manifest leads to: parts, packs, and chunks in the
//! middle of packs. Each step is durable before the next one begins, and each leaves a store in
//! which every remaining checkpoint is whole; whatever is interrupted, the next pruning completes.
//! A part goes before anything it alone points into: as long as a part is there, so is its memory.

use super::{
    JobName, Result, Store, StoreError, files, holes,
    live::{ChunkSet, LiveChunks},
};
use ckpt_common::image::Digest;
use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroUsize,
    ops::Range,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Temporary copies of packs are called so, in `tmp/`.
const COPY: &str = "prune-";

/// What a pruning has removed, or would.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PruneReport {
    /// Checkpoints, as `job@number`.
    pub removed: Vec<String>,
    /// Number of checkpoints that stay.
    pub kept: usize,
    /// Parts removed.
    pub parts: usize,
    /// Packs removed.
    pub packs: usize,
    /// Packs that stay with less in them.
    pub repacked: usize,
    /// Bytes freed on storage.
    pub bytes: u64,
    /// Packs that could not be looked into, and why. They stay as they are.
    pub problems: Vec<String>,
}

/// What may be done to the store.
pub(super) trait Disk {
    fn remove(&mut self, path: &Path) -> Result<()>;
    fn sync(&mut self, directory: &Path) -> Result<()>;
    /// Frees ranges of a file, by way of a temporary file if need be.
    fn free(&mut self, path: &Path, ranges: &[Range<u64>], temporary: &Path) -> Result<()>;
}

/// Does it.
pub(super) struct Really;

impl Disk for Really {
    fn remove(&mut self, path: &Path) -> Result<()> {
        std::fs::remove_file(path).map_err(StoreError::io("remove", path))
    }

    fn sync(&mut self, directory: &Path) -> Result<()> {
        files::sync_dir(directory)
    }

    fn free(&mut self, path: &Path, ranges: &[Range<u64>], temporary: &Path) -> Result<()> {
        match holes::punch(path, ranges)? {
            true => Ok(()),
            false => holes::rewrite(path, ranges, temporary),
        }
    }
}

/// Does nothing.
struct OnlyLook;

impl Disk for OnlyLook {
    fn remove(&mut self, _: &Path) -> Result<()> {
        Ok(())
    }

    fn sync(&mut self, _: &Path) -> Result<()> {
        Ok(())
    }

    fn free(&mut self, _: &Path, _: &[Range<u64>], _: &Path) -> Result<()> {
        Ok(())
    }
}

/// What stays and what goes.
#[derive(Default)]
struct Marked {
    old: BTreeMap<JobName, Vec<u64>>,
    kept: usize,
    parts: BTreeSet<Digest>,
    live: LiveChunks,
}

impl Store {
    /// Removes all but the newest `keep` checkpoints of `job`, or of each job, and everything
    /// that then belongs to no checkpoint. `dry_run`: only says what that would be.
    ///
    /// # Errors
    /// [`StoreError::Locked`] while a dump or a reader uses the store. [`StoreError::Damaged`] or
    /// [`StoreError::Missing`] if a checkpoint that stays cannot be read: then nobody knows what
    /// it needs, and nothing is removed.
    pub fn prune(&self, job: Option<&JobName>, keep: NonZeroUsize, dry_run: bool) -> Result<PruneReport> {
        let _lock = self.lock_for_pruning()?;
        if dry_run {
            return self.prune_with(job, keep, &mut OnlyLook);
        }
        self.remove_copies()?;
        let report = self.prune_with(job, keep, &mut Really)?;
        // No dump is alive, so this clears everything that dead ones have left in `tmp/`.
        self.sweep()?;
        Ok(report)
    }

    /// Temporary files of a pruning that was interrupted.
    fn remove_copies(&self) -> Result<()> {
        for (path, name) in entries(&self.tmp())? {
            if name.starts_with(COPY) && name.ends_with(".pack") {
                Really.remove(&path)?;
            }
        }
        Ok(())
    }

    pub(super) fn prune_with(
        &self,
        job: Option<&JobName>,
        keep: NonZeroUsize,
        disk: &mut dyn Disk,
    ) -> Result<PruneReport> {
        let marked = self.mark(job, keep)?;
        let mut report = PruneReport { kept: marked.kept, ..Default::default() };
        for (job, numbers) in &marked.old {
            for number in numbers {
                disk.remove(&self.job_path(job).join(format!("{number}.json")))?;
                report.removed.push(format!("{job}@{number}"));
            }
            disk.sync(&self.job_path(job))?;
        }
        let directory = self.root().join("parts");
        for (path, id) in named_files(&directory, ".part")? {
            if !marked.parts.contains(&id) {
                report.bytes += allocated(&path)?;
                report.parts += 1;
                disk.remove(&path)?;
            }
        }
        disk.sync(&directory)?;
        self.prune_packs(&marked.live, disk, &mut report)?;
        Ok(report)
    }

    fn prune_packs(&self, live: &LiveChunks, disk: &mut dyn Disk, report: &mut PruneReport) -> Result<()> {
        let directory = self.root().join("packs");
        for (path, id) in named_files(&directory, ".pack")? {
            let Some(live) = live.get(&id) else {
                report.bytes += allocated(&path)?;
                report.packs += 1;
                disk.remove(&path)?;
                continue;
            };
            let (dead, bytes) = match self.dead_data(&path, id, live) {
                Ok(dead) => dead,
                Err(error) => {
                    report.problems.push(error.to_string());
                    continue;
                }
            };
            if bytes > 0 {
                disk.free(&path, &dead, &self.tmp().join(format!("{COPY}{id}.pack")))?;
                report.repacked += 1;
                report.bytes += bytes;
            }
        }
        disk.sync(&directory)
    }

    /// Ranges of a pack that nobody uses, and how many bytes of them are not free yet.
    fn dead_data(&self, path: &Path, id: Digest, live: &ChunkSet) -> Result<(Vec<Range<u64>>, u64)> {
        let dead = holes::dead_blocks(self.open_pack(id)?.chunks()?, live);
        let data = holes::with_data(&files::open(path)?, &dead);
        let data = data.map_err(StoreError::io("look for data in", path))?;
        Ok((dead, data.iter().map(|range| range.end - range.start).sum()))
    }

    fn mark(&self, only: Option<&JobName>, keep: NonZeroUsize) -> Result<Marked> {
        let jobs = self.jobs()?;
        if let Some(job) = only.filter(|job| !jobs.contains(job)) {
            let what = format!("there is no job `{job}`");
            return Err(StoreError::NotFound { what, path: self.root().to_owned() });
        }
        let mut marked = Marked::default();
        for job in jobs {
            let mut numbers = self.numbers(&job)?;
            let old = match only {
                Some(only) if *only != job => 0,
                _ => numbers.len().saturating_sub(keep.get()),
            };
            let remaining = numbers.split_off(old);
            marked.kept += remaining.len();
            for number in remaining {
                for node in self.checkpoint(&job, number)?.manifest.nodes {
                    if !marked.parts.insert(node.part.id) {
                        continue;
                    }
                    for (pack, chunks) in self.open_part(&node.part)?.live_chunks()? {
                        marked.live.entry(pack).or_default().add_all(&chunks);
                    }
                }
            }
            if !numbers.is_empty() {
                marked.old.insert(job, numbers);
            }
        }
        Ok(marked)
    }
}

/// Bytes that a file takes on storage.
fn allocated(path: &Path) -> Result<u64> {
    // st_blocks counts units of 512 bytes, whatever the block size (stat(2)).
    let meta = std::fs::metadata(path).map_err(StoreError::io("read", path))?;
    Ok(meta.blocks() * 512)
}

fn entries(directory: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(StoreError::io("read directory", directory))? {
        let entry = entry.map_err(StoreError::io("read directory", directory))?;
        found.push((entry.path(), entry.file_name().to_string_lossy().into_owned()));
    }
    found.sort();
    Ok(found)
}

/// Files whose name is a hash and this suffix. Others are not ours to remove.
fn named_files(directory: &Path, suffix: &str) -> Result<Vec<(PathBuf, Digest)>> {
    let all = entries(directory)?.into_iter();
    Ok(all.filter_map(|(path, name)| Some((path, name.strip_suffix(suffix)?.parse().ok()?))).collect())
}
