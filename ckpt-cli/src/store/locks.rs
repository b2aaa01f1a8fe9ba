//! Who may use a store at the same time: any number of dumps and readers, or one pruning.
//!
//! `STORE/lock` is held (flock(2)) shared by every dump for as long as it lives and by
//! whoever reads a checkpoint's memory, exclusively by `ckpt prune`. Only coordinators hold it, so
//! nodes that share the directory need not agree on more than that.

use super::{Result, Store, StoreError, files};
use std::{
    fs::{File, TryLockError},
    io::ErrorKind,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// A dump that finds the store locked waits so long: a pruning is soon over.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time between two looks at a lock.
const LOOK: Duration = Duration::from_millis(50);

/// While this lives, nothing is pruned from the store.
#[derive(Debug)]
pub struct Hold {
    /// None where the store can only be read and nothing was ever pruned.
    _lock: Option<File>,
}

impl Store {
    /// Keeps everything in the store that is there now. Waits while something is being pruned.
    ///
    /// # Errors
    /// [`StoreError::Locked`] if that takes too long.
    pub fn hold(&self) -> Result<Hold> {
        self.hold_for(PATIENCE)
    }

    fn hold_for(&self, patience: Duration) -> Result<Hold> {
        let path = self.prune_lock_path();
        let lock = match files::open_lock(&path) {
            Ok(lock) => lock,
            Err(StoreError::Io { source, .. })
                if matches!(source.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) =>
            {
                match File::open(&path) {
                    Ok(lock) => lock,
                    Err(_) => return Ok(Hold { _lock: None }),
                }
            }
            Err(error) => return Err(error),
        };
        let start = Instant::now();
        loop {
            match lock.try_lock_shared() {
                Ok(()) => return Ok(Hold { _lock: Some(lock) }),
                Err(TryLockError::WouldBlock) if start.elapsed() < patience => thread::sleep(LOOK),
                Err(TryLockError::WouldBlock) => {
                    return Err(StoreError::Locked { what: "the store is being pruned".into(), path });
                }
                Err(TryLockError::Error(error)) => return Err(StoreError::io("lock", path)(error)),
            }
        }
    }

    /// The store for oneself.
    ///
    /// # Errors
    /// [`StoreError::Locked`] while a dump or a reader holds it, or another pruning.
    pub(super) fn lock_for_pruning(&self) -> Result<File> {
        let path = self.prune_lock_path();
        let lock = files::open_lock(&path)?;
        match try_lock(&lock, &path)? {
            true => Ok(lock),
            false => {
                Err(StoreError::Locked { what: "a dump, a restore or a check is under way".into(), path })
            }
        }
    }

    fn prune_lock_path(&self) -> PathBuf {
        self.root().join("lock")
    }
}

#[cfg(test)]
impl Hold {
    /// What a kill does.
    pub(super) fn release(&mut self) {
        self._lock = None;
    }
}

/// Takes a lock, if nobody else has it.
pub(super) fn try_lock(file: &File, path: &Path) -> Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(StoreError::io("lock", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_hold_a_store_and_one_prunes_it() {
        let directory = tempfile::TempDir::new().unwrap();
        let store = Store::create(directory.path()).unwrap();
        let holds = [store.hold().unwrap(), store.hold().unwrap()];
        let error = store.lock_for_pruning().unwrap_err().to_string();
        assert!(error.starts_with("a dump, a restore or a check is under way (lock "), "{error}");
        drop(holds);
        let pruning = store.lock_for_pruning().unwrap();
        assert!(store.lock_for_pruning().is_err());
        let error = store.hold_for(LOOK).unwrap_err().to_string();
        assert!(error.starts_with("the store is being pruned (lock "), "{error}");
        let waiting = thread::spawn({
            let store = store.clone();
            move || store.hold()
        });
        drop(pruning);
        waiting.join().unwrap().unwrap();
    }
}
