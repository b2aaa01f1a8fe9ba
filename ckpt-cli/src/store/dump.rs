//! A dump in the making: its temporary directory, its locks, its commit, and its end.

use super::{Hold, JobName, Result, Store, StoreError, files, locks::try_lock};
use ckpt_common::image::manifest::{Checkpoint, Manifest, PartRef};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::ErrorKind,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Identity of a dump: the name of its temporary directory. Agents show by it that they see the
/// same store as the coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DumpId(String);

impl From<String> for DumpId {
    /// What came over the wire; [`Store::dump_directory`] refuses what is none.
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl DumpId {
    /// Its text: 32 hexadecimal digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Is it what [`Workspace::create`] makes? (It becomes part of a path.)
    fn is_valid(&self) -> bool {
        self.0.len() == 32 && self.0.bytes().all(|byte| byte.is_ascii_hexdigit())
    }
}

/// A temporary directory and the lock that says that its owner lives.
pub(super) struct Workspace {
    store: Store,
    id: DumpId,
    lock: File,
    kept: bool,
    /// Nothing is pruned while a dump lives.
    _hold: Hold,
}

impl Workspace {
    pub(super) fn create(store: &Store) -> Result<Self> {
        Self::within(store, store.hold()?)
    }

    fn within(store: &Store, hold: Hold) -> Result<Self> {
        loop {
            let id = DumpId(files::token()?);
            let path = lock_path(store, &id);
            let lock = files::open_lock(&path)?;
            // A sweep may have met the file between its creation and our lock.
            if try_lock(&lock, &path)? && lock.metadata().is_ok_and(|meta| meta.nlink() > 0) {
                let workspace = Self { store: store.clone(), id, lock, kept: false, _hold: hold };
                files::make_dir(&workspace.directory())?;
                return Ok(workspace);
            }
        }
    }

    pub(super) fn directory(&self) -> PathBuf {
        self.store.tmp().join(&self.id.0)
    }

    /// Drops the temporary files and leaves alone what was put into place.
    pub(super) fn keep(self) -> Result<()> {
        self.end(Stays::Everything)
    }

    fn end(mut self, stays: Stays<'_>) -> Result<()> {
        self.kept = true;
        clear(&self.store, &self.id, stays)
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if !self.kept {
            // What cannot be removed now is removed by the next dump's sweep.
            let _ = clear(&self.store, &self.id, Stays::Nothing);
        }
        let _ = self.lock.unlock();
    }
}

/// A dump of a job, from the coordinator's side: it holds the job's lock, and until
/// [`Dump::commit`] nothing of it is visible. Dropped before, everything it wrote is removed.
pub struct Dump {
    workspace: Workspace,
    job: JobName,
    number: u64,
    /// Held for as long as the dump lives.
    _job_lock: File,
}

impl Store {
    /// Begins a dump of `job`, after removing what dead dumps have left.
    ///
    /// # Errors
    /// [`StoreError::Locked`] while another dump of the same job is under way, or the store is being pruned for
    /// longer than a dump waits.
    pub fn begin_dump(&self, job: &JobName) -> Result<Dump> {
        let directory = self.job_path(job);
        files::make_dir(&directory)?;
        files::sync_dir(&self.root().join("jobs"))?;
        let path = directory.join("lock");
        let job_lock = files::open_lock(&path)?;
        if !try_lock(&job_lock, &path)? {
            return Err(StoreError::Locked { what: format!("another dump of job {job} is under way"), path });
        }
        let hold = self.hold()?;
        self.sweep()?;
        let number = self.numbers(job)?.last().map_or(1, |last| last + 1);
        let workspace = Workspace::within(self, hold)?;
        Ok(Dump { workspace, job: job.clone(), number, _job_lock: job_lock })
    }

    /// Directory of a living dump: the proof that this node sees the coordinator's store.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if it is not there.
    pub fn dump_directory(&self, id: &DumpId) -> Result<PathBuf> {
        let directory = self.tmp().join(&id.0);
        if !id.is_valid() || !directory.is_dir() {
            let what = format!("dump {} is not under way", id.0);
            return Err(StoreError::NotFound { what, path: self.root().to_owned() });
        }
        Ok(directory)
    }

    /// Removes what dumps have left whose coordinator is dead. A living dump holds its lock.
    pub(super) fn sweep(&self) -> Result<()> {
        let tmp = self.tmp();
        for entry in std::fs::read_dir(&tmp).map_err(StoreError::io("read directory", &tmp))? {
            let path = entry.map_err(StoreError::io("read directory", &tmp))?.path();
            let id = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".lock"));
            let Some(id) = id.map(|id| DumpId(id.to_owned())).filter(DumpId::is_valid) else { continue };
            let lock = match File::options().read(true).write(true).open(&path) {
                Ok(lock) => lock,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(StoreError::io("open lock", path)(error)),
            };
            if try_lock(&lock, &path)? {
                let committed = self.is_committed(&id);
                tracing::info!(dump = id.0, committed, "removing what a dead dump has left");
                clear(self, &id, if committed { Stays::Everything } else { Stays::Nothing })?;
            }
        }
        Ok(())
    }

    /// Does a manifest come from this dump? When in doubt: yes.
    fn is_committed(&self, id: &DumpId) -> bool {
        let all = self.jobs().and_then(|jobs| {
            let jobs = jobs.iter().map(|job| self.checkpoints(job));
            Ok(jobs.collect::<Result<Vec<_>>>()?.concat())
        });
        all.map_or(true, |all| all.iter().any(|checkpoint| checkpoint.manifest.dump == id.0))
    }
}

impl Dump {
    /// Its identity, for the agents.
    pub fn id(&self) -> &DumpId {
        &self.workspace.id
    }

    /// Number that the checkpoint will have.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Makes the checkpoint visible: all its parts must be durable. Fills in job, number and dump.
    pub fn commit(self, mut manifest: Manifest) -> Result<Checkpoint> {
        let store = self.workspace.store.clone();
        manifest.job = self.job.to_string();
        manifest.number = self.number;
        manifest.dump = self.workspace.id.0.clone();
        let (text, id) = manifest.encode()?;
        let temporary = self.workspace.directory().join("manifest");
        files::write_new(&temporary, &[&text])?;
        let directory = store.job_path(&self.job);
        files::rename(&temporary, &directory.join(format!("{}.json", self.number)))?;
        // From here on the checkpoint exists, so its files stay whatever happens next.
        let flushed = files::sync_dir(&directory);
        if let Err(error) = self.workspace.end(Stays::Of(&manifest)) {
            tracing::warn!(%error, "the checkpoint is committed, but temporary files remain");
        }
        flushed?;
        Ok(Checkpoint { id, manifest })
    }
}

fn lock_path(store: &Store, id: &DumpId) -> PathBuf {
    store.tmp().join(format!("{}.lock", id.0))
}

/// What stays of the files that a dump's writers have put into place.
#[derive(Clone, Copy)]
enum Stays<'a> {
    /// It was not committed.
    Nothing,
    /// What the manifest names: a node may have been done before another one had to begin again.
    Of(&'a Manifest),
    /// It was committed, and that is all we know.
    Everything,
}

impl Stays<'_> {
    /// Does a file stay, such as `packs/ID.pack`?
    fn includes(self, name: &str) -> bool {
        let named = |part: &PartRef| {
            let mut packs = part.packs.iter();
            name == format!("parts/{}.part", part.id)
                || packs.any(|pack| name == format!("packs/{}.pack", pack.id))
        };
        match self {
            Self::Nothing => false,
            Self::Of(manifest) => manifest.nodes.iter().any(|node| named(&node.part)),
            Self::Everything => true,
        }
    }
}

/// Removes a dump's temporary files, and what its writers have put into place and is not to stay.
/// The caller holds its lock.
///
/// The directory is renamed first: a writer that is still alive can then neither move a file to
/// its place nor begin another one, so its lists are complete when they are read.
fn clear(store: &Store, id: &DumpId, stays: Stays<'_>) -> Result<()> {
    let (living, dead) = (store.tmp().join(&id.0), store.tmp().join(format!("{}.dead", id.0)));
    match std::fs::rename(&living, &dead) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(StoreError::io("rename", living)(error));
        }
        _ => {}
    }
    if dead.is_dir() {
        remove_published(store, &dead, stays)?;
        std::fs::remove_dir_all(&dead).map_err(StoreError::io("remove", dead))?;
    }
    let lock = lock_path(store, id);
    std::fs::remove_file(&lock).map_err(StoreError::io("remove", lock))
}

fn remove_published(store: &Store, directory: &Path, stays: Stays<'_>) -> Result<()> {
    for entry in std::fs::read_dir(directory).map_err(StoreError::io("read directory", directory))? {
        let path = entry.map_err(StoreError::io("read directory", directory))?.path();
        if path.extension().is_none_or(|extension| extension != "names") {
            continue;
        }
        let list = files::read_capped(&path, 64 << 20)?;
        for name in String::from_utf8_lossy(&list).lines() {
            let file = name.strip_prefix("packs/").or_else(|| name.strip_prefix("parts/"));
            // A list that was cut off by a crash was not acted upon beyond its whole lines.
            if !file.is_some_and(|file| !file.contains('/') && !file.starts_with('.')) || stays.includes(name)
            {
                continue;
            }
            let path = store.root().join(name);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(StoreError::io("remove", path)(error));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
impl Dump {
    /// What a kill does: the lock is gone, nothing is cleaned up.
    pub(super) fn kill(self) {
        let mut dump = std::mem::ManuallyDrop::new(self);
        dump.workspace.lock.unlock().expect("lock was held");
        dump.workspace._hold.release();
    }
}
