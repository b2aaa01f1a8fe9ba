//! What can go wrong with a store.

use ckpt_common::image::FormatError;
use std::{io, path::PathBuf};

/// Result of the store's functions.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Why the store could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no store at this path.
    #[error("there is no checkpoint store at {path}: {why}", path = path.display())]
    NoStore {
        /// Where it was looked for.
        path: PathBuf,
        /// What is there instead.
        why: String,
    },
    /// Somebody else uses the store, or the job in it.
    #[error("{what} (lock {path})", path = path.display())]
    Locked {
        /// What is under way.
        what: String,
        /// The lock file.
        path: PathBuf,
    },
    /// A file is damaged, or this version cannot read it.
    #[error("{path}: {source}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A file that a checkpoint needs is not there.
    #[error("{path} is missing: the checkpoint is incomplete", path = path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// Nothing in the store is called so.
    #[error("{what} in the store {path}", path = path.display())]
    NotFound {
        /// What was looked for.
        what: String,
        /// The store.
        path: PathBuf,
    },
    /// A name that cannot be used.
    #[error("`{name}` cannot be the name of a job: {why}")]
    BadName {
        /// The name.
        name: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// The dump is being aborted.
    #[error("the dump is being aborted")]
    Cancelled,
    /// The writer was given something that the format cannot hold.
    #[error("the image cannot hold this: {0}")]
    Refused(#[from] FormatError),
    /// A system call failed.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl StoreError {
    /// Shorthand for the closure of `map_err`.
    pub(super) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// Shorthand for the closure of `map_err`.
    pub(super) fn damaged(path: impl Into<PathBuf>) -> impl FnOnce(FormatError) -> Self {
        let path = path.into();
        move |source| Self::Damaged { path, source }
    }
}
