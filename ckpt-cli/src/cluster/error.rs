//! Why a dump or restore of a whole job failed.

use crate::{job::JobError, store::StoreError};
use ckpt_common::wire::{Blocker, Failure, FailureClass, Phase};
use std::io::ErrorKind;

/// Result of the coordinator's functions.
pub type Result<T, E = ClusterError> = std::result::Result<T, E>;

/// Why a dump or restore failed.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// Things stand in the way; nothing was touched.
    #[error("{} things stand in the way", blockers.len())]
    Blocked {
        /// Name of the node, and what is there.
        blockers: Vec<(String, Blocker)>,
    },
    /// An agent could not do what it was asked for.
    #[error("{node}: {phase} failed: {}", failure.message)]
    Agent {
        /// Name of the node.
        node: String,
        /// What it was asked for.
        phase: String,
        /// What it said.
        failure: Failure,
    },
    /// An agent is gone, or does not answer.
    #[error("{node}: {what} {why}")]
    Lost {
        /// Name of the node.
        node: String,
        /// What it was asked for, or `the agent`.
        what: String,
        /// How that showed.
        why: String,
    },
    /// An agent is of another version.
    #[error("{node} has ckpt {theirs}, this is {ours}: all nodes need the same")]
    Version {
        /// Name of the node.
        node: String,
        /// Its version.
        theirs: String,
        /// Our version.
        ours: String,
    },
    /// No process of the job was found.
    #[error("{0}")]
    NothingFound(String),
    /// The job changed between plan and cut in a way that cannot be saved.
    #[error("{0}")]
    Changed(String),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The selection of nodes or processes.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The operator, or a signal.
    #[error("interrupted")]
    Interrupted,
    /// The checkpoint is committed, but something after that failed.
    #[error("the checkpoint {name} is committed, but {what}")]
    AfterCommit {
        /// Name of the checkpoint.
        name: String,
        /// What failed.
        what: String,
    },
    /// Anything else, such as an injected fault.
    #[error("{phase}: {message}")]
    Other {
        /// In which phase.
        phase: Phase,
        /// What happened.
        message: String,
    },
}

impl ClusterError {
    /// What sort of failure it is; gives the exit code.
    pub fn class(&self) -> FailureClass {
        match self {
            Self::Blocked { .. } | Self::Changed(_) => FailureClass::Blocked,
            Self::Agent { failure, .. } => failure.class,
            Self::Store(error) => store_class(error),
            Self::Job(JobError::BadList { .. } | JobError::BadPlacement(_)) => FailureClass::Usage,
            Self::Interrupted => FailureClass::Interrupted,
            _ => FailureClass::Other,
        }
    }

    /// May it work a moment later?
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Changed(_) => true,
            Self::Agent { failure, .. } => failure.class == FailureClass::Transient,
            _ => false,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Agent { failure, .. } => failure.hint.clone(),
            Self::Version { .. } => Some("install the same ckpt on every node".into()),
            Self::Lost { node, .. } => Some(format!("try `ckpt doctor --nodes {node}`")),
            Self::Store(error) => store_hint(error),
            _ => None,
        }
    }
}

/// Sort of failure of a store error.
pub fn store_class(error: &StoreError) -> FailureClass {
    match error {
        StoreError::NoStore { .. } => FailureClass::NoStore,
        StoreError::Locked { .. } => FailureClass::Locked,
        StoreError::Damaged { .. } | StoreError::Missing { .. } => FailureClass::Damaged,
        StoreError::BadName { .. } => FailureClass::Usage,
        StoreError::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => FailureClass::System,
        _ => FailureClass::Other,
    }
}

/// What to do about a store error.
pub fn store_hint(error: &StoreError) -> Option<String> {
    let hint = match error {
        StoreError::NoStore { .. } => "`--store DIR` or CKPT_STORE says where the store is",
        StoreError::Locked { .. } => "wait until it has ended",
        StoreError::Missing { .. } => "`ckpt verify` lists everything that is wrong with the checkpoint",
        StoreError::Damaged { .. } => {
            "`ckpt verify` lists everything that is wrong; `ckpt ls` shows other checkpoints"
        }
        StoreError::NotFound { .. } => "`ckpt ls` lists what is there",
        StoreError::Io { source, .. } if source.raw_os_error() == Some(nix::libc::ENOSPC) => {
            "the storage is full; nothing of this checkpoint is left on it"
        }
        StoreError::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
            "the store belongs to somebody else: run ckpt as root"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

/// What an agent says about an error of its own.
pub fn failure_of(error: &anyhow::Error) -> Failure {
    let store = error.chain().find_map(|cause| cause.downcast_ref::<StoreError>());
    let job = error.chain().find_map(|cause| cause.downcast_ref::<JobError>());
    let system = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    let (mut class, mut hint) = (FailureClass::Other, None);
    if let Some(stated) = error.chain().find_map(|cause| cause.downcast_ref::<Classified>()) {
        (class, hint) = (stated.class, stated.hint.clone());
    } else if let Some(store) = store {
        (class, hint) = (store_class(store), store_hint(store));
    } else if job.is_none() && system.is_some_and(|error| error.kind() == ErrorKind::PermissionDenied) {
        class = FailureClass::System;
        hint =
            Some("ckpt needs root, or CAP_SYS_PTRACE and CAP_CHECKPOINT_RESTORE; try `ckpt doctor`".into());
    }
    Failure { message: format!("{error:#}"), hint, class }
}

/// An error whose class is known where it happens. Give it to anyhow as the cause.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Classified {
    /// What failed.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// What sort of failure it is.
    pub class: FailureClass,
}
