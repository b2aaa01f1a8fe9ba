//! Failures as people and programs see them, and exit codes.

use crate::{
    cluster::{
        ClusterError,
        coordinator::OnNodes,
        error::{store_class, store_hint},
    },
    job::JobError,
    store::StoreError,
};
use ckpt_common::wire::FailureClass;
use serde_json::{Value, json};

/// Exit codes. They are safe to use in scripts; unknown ones mean failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Done.
    Done = 0,
    /// Failed.
    Failed = 1,
    /// Wrong usage.
    Usage = 2,
    /// Done, but with parts left out, as allowed by name.
    LeftOut = 3,
    /// The target cannot be checkpointed, or not restored here.
    Blocked = 4,
    /// Kernel or privilege lacking.
    System = 5,
    /// No store.
    NoStore = 10,
    /// Locked by another ckpt.
    Locked = 11,
    /// Damaged, or of another version.
    Damaged = 12,
    /// Interrupted.
    Interrupted = 130,
}

impl From<FailureClass> for ExitCode {
    fn from(class: FailureClass) -> Self {
        match class {
            FailureClass::Other => Self::Failed,
            FailureClass::Usage => Self::Usage,
            FailureClass::Blocked | FailureClass::Transient => Self::Blocked,
            FailureClass::System => Self::System,
            FailureClass::NoStore => Self::NoStore,
            FailureClass::Locked => Self::Locked,
            FailureClass::Damaged => Self::Damaged,
            FailureClass::Interrupted => Self::Interrupted,
        }
    }
}

/// Why a command failed.
#[derive(Clone, Debug, PartialEq)]
pub struct Failed {
    /// Exit code.
    pub code: ExitCode,
    /// One line; empty where all has been said.
    pub message: String,
    /// Indented lines below it, and what programs get to read instead.
    pub details: Vec<(String, Value)>,
    /// What to do about it.
    pub hints: Vec<String>,
    /// What is good to know, such as that nothing was touched.
    pub notes: Vec<String>,
}

impl Failed {
    /// A failure with an exit code and a message.
    pub fn new(code: ExitCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: Vec::new(), hints: Vec::new(), notes: Vec::new() }
    }

    /// A failure of no special kind.
    pub fn other(message: impl Into<String>) -> Self {
        Self::new(ExitCode::Failed, message)
    }

    /// Wrong usage.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ExitCode::Usage, message)
    }

    /// Ends with this code, and says nothing more.
    pub fn silent(code: ExitCode) -> Self {
        Self::new(code, "")
    }

    /// With something to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// With something to know.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// A list of blockers. `what` is what cannot be done, such as `checkpoint job 17`.
    pub fn blocked(what: &str, blockers: &OnNodes) -> Self {
        let things = match blockers.len() {
            1 => "one thing blocks it".to_owned(),
            count => format!("{count} things block it"),
        };
        let several_nodes = blockers.iter().any(|(node, _)| *node != blockers[0].0);
        let several = several_nodes || blockers.iter().any(|(_, item)| item.pid != blockers[0].1.pid);
        let named = blockers.first().filter(|(_, item)| !several && item.pid != 0);
        let whose = named.map_or(String::new(), |(_, item)| match what.ends_with(&item.pid.to_string()) {
            true => format!(" ({})", item.process),
            false => format!(" (because of process {}, {})", item.pid, item.process),
        });
        let mut failed = Self::new(ExitCode::Blocked, format!("cannot {what}{whose}: {things}"));
        let heads: Vec<_> = blockers
            .iter()
            .map(|(node, blocker)| {
                let node = if several_nodes { format!("{node}  ") } else { String::new() };
                match (several, blocker.pid) {
                    (true, pid) if pid != 0 => format!("{node}{pid} ({})  {}", blocker.process, blocker.item),
                    _ => format!("{node}{}", blocker.item),
                }
            })
            .collect();
        let width = heads.iter().map(String::len).max().unwrap_or_default();
        for (head, (node, blocker)) in heads.iter().zip(blockers) {
            let line = format!("{head:width$}  {}", blocker.reason).trim_start().to_owned();
            let document = json!({
                "node": node,
                "pid": blocker.pid,
                "process": blocker.process,
                "item": blocker.item,
                "reason": blocker.reason,
                "allow": blocker.allow,
            });
            failed.details.push((line, document));
            if let Some(allow) = &blocker.allow {
                let hint = format!("--allow {allow} lets it pass: it comes back closed or disconnected");
                if !failed.hints.contains(&hint) {
                    failed.hints.push(hint);
                }
            }
        }
        failed
    }

    /// The failure as one JSON document.
    pub fn json(&self) -> String {
        let document = json!({
            "type": "error",
            "exit_code": self.code as u8,
            "message": self.message,
            "details": self.details.iter().map(|(_, document)| document).collect::<Vec<_>>(),
            "hints": self.hints,
            "notes": self.notes,
        });
        document.to_string()
    }

    /// A failed dump or restore. `what` is what could not be done, `untouched` what stayed as it was.
    pub fn from_cluster(error: &ClusterError, what: &str, untouched: &str) -> Self {
        let mut failed = match error {
            ClusterError::Blocked { blockers } => Self::blocked(what, blockers),
            ClusterError::Job(JobError::BadList { .. } | JobError::BadPlacement(_)) => {
                Self::usage(error.to_string())
            }
            ClusterError::AfterCommit { .. } => return Self::other(error.to_string()),
            ClusterError::Interrupted => Self::new(ExitCode::Interrupted, "interrupted"),
            _ => Self::new(error.class().into(), format!("cannot {what}: {error}")),
        };
        failed.hints.extend(error.hint());
        failed.note(untouched)
    }
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        let mut failed = Self::new(store_class(&error).into(), error.to_string());
        failed.hints.extend(store_hint(&error));
        failed
    }
}

impl From<JobError> for Failed {
    fn from(error: JobError) -> Self {
        Self::usage(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_common::wire::{Blocker, Failure};

    fn text(failed: &Failed) -> String {
        let mut text = format!("error: {}\n", failed.message);
        text.extend(failed.details.iter().map(|(line, _)| format!("  {line}\n")));
        text.extend(failed.hints.iter().map(|line| format!("hint: {line}\n")));
        text.extend(failed.notes.iter().map(|line| format!("note: {line}\n")));
        text
    }

    fn blocker(node: &str, pid: i32, item: &str, reason: &str, allow: Option<&str>) -> (String, Blocker) {
        let (item, reason) = (item.to_owned(), reason.to_owned());
        let process = "python3".to_owned();
        (node.to_owned(), Blocker { pid, process, item, reason, allow: allow.map(str::to_owned) })
    }

    const UNTOUCHED: &str = "nothing was frozen, the store is unchanged";

    #[test]
    fn blockers_of_one_process() {
        let blockers = vec![
            blocker("n1", 4242, "fd 17", "/dev/infiniband/uverbs0: RDMA state cannot be saved", None),
            blocker("n1", 4242, "fd 3", "unix stream to pid 611 (dbus-daemon)", Some("outside-unix")),
        ];
        let error = ClusterError::Blocked { blockers };
        insta::assert_snapshot!(text(&Failed::from_cluster(&error, "checkpoint process 4242", UNTOUCHED)));
    }

    #[test]
    fn blockers_of_several_nodes() {
        let blockers = vec![
            blocker("n1", 4242, "fd 17", "in the way", Some("outside-tcp")),
            blocker("node02", 7, "mapping 7f0000000000", "in the way too", Some("outside-tcp")),
            blocker("node02", 0, "", "the node has another page size", None),
        ];
        let failed =
            Failed::from_cluster(&ClusterError::Blocked { blockers }, "checkpoint job 17", UNTOUCHED);
        insta::assert_snapshot!(text(&failed));
        insta::assert_snapshot!(failed.json());
    }

    #[test]
    fn agents_that_fail_or_are_gone() {
        let failure = Failure {
            message: "freezing the job: attach failed for thread 7: Operation not permitted".into(),
            hint: Some("ckpt needs root".into()),
            class: FailureClass::System,
        };
        let agent = ClusterError::Agent { node: "n1".into(), phase: "cut".into(), failure };
        let failed = Failed::from_cluster(&agent, "checkpoint job 17", UNTOUCHED);
        assert_eq!(failed.code, ExitCode::System);
        let lost = ClusterError::Lost {
            node: "n2".into(),
            what: "greeting".into(),
            why: "was not answered: the agent has ended (ssh: no route to host)".into(),
        };
        let lost = Failed::from_cluster(&lost, "checkpoint job 17", UNTOUCHED);
        insta::assert_snapshot!(format!("{}{}", text(&failed), text(&lost)));
    }

    #[test]
    fn every_class_has_its_code() {
        let codes = [
            (FailureClass::Other, 1),
            (FailureClass::Usage, 2),
            (FailureClass::Blocked, 4),
            (FailureClass::Transient, 4),
            (FailureClass::System, 5),
            (FailureClass::NoStore, 10),
            (FailureClass::Locked, 11),
            (FailureClass::Damaged, 12),
            (FailureClass::Interrupted, 130),
        ];
        for (class, code) in codes {
            assert_eq!(ExitCode::from(class) as u8, code, "{class:?}");
        }
    }
}
