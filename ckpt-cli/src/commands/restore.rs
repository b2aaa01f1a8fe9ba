//! `ckpt restore`: bring a checkpoint back.

use super::{Global, interrupt, nodes_of};
use crate::{
    cluster::{
        ClusterError,
        coordinator::{self, RestoreOutcome, RestoreRequest, StdioChoice},
    },
    ui::{ExitCode, Failed, Ui, duration, plural},
};
use ckpt_common::wire::PidPolicy;
use serde_json::json;
use std::path::PathBuf;

/// Bring a job back from a checkpoint
///
/// Nothing of the job runs before everything of it exists on every node. Its processes are then
/// children of init; the command returns, unless it is told to wait.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// JOB (the latest), JOB@N, JOB@latest, or the first digits of an id
    #[arg(value_name = "CHECKPOINT")]
    name: String,
    /// Nodes to use, such as n[01-04] [default: those of the checkpoint]
    #[arg(long, value_name = "LIST")]
    nodes: Option<String>,
    /// Bring what ran on node OLD back on node NEW
    #[arg(long, value_name = "OLD=NEW", value_parser = place)]
    place: Vec<(String, String)>,
    /// Let the job run at once; its memory follows, what is needed first
    #[arg(long)]
    lazy: bool,
    /// Wait until the restored processes have ended
    #[arg(long)]
    wait: bool,
    /// Write the PID of the first process to this file
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    /// Where the PIDs are: on the node, in a namespace of their own, or there if they are taken
    #[arg(long, value_enum, default_value = "auto")]
    pids: Pids,
    /// Where standard streams go that led out of the job
    #[arg(long, value_enum, default_value = "log")]
    stdio: Stdio,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Pids {
    /// The same PIDs on the node; fails where they are taken
    Same,
    /// The same PIDs in a PID namespace
    Namespace,
    /// Same, or namespace where they are taken
    Auto,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Stdio {
    /// To files in the store
    Log,
    /// To those of this command (on this machine only)
    Inherit,
    /// To /dev/null
    Null,
}

fn place(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((old, new)) if !old.is_empty() && !new.is_empty() => Ok((old.to_owned(), new.to_owned())),
        _ => Err("give OLD=NEW, the names of two nodes".into()),
    }
}

const UNTOUCHED: &str = "what had been built was removed again, the checkpoint is unchanged";

pub(super) fn run(arguments: &Arguments, global: &Global, ui: &Ui) -> Result<(), Failed> {
    let launcher = global.launcher()?;
    // Only what was typed: the scheduler's list does not move what nobody asked to move.
    let nodes = arguments.nodes.as_deref().map(|list| nodes_of(Some(list))).transpose()?.flatten();
    let request = RestoreRequest {
        store: global.absolute_store()?,
        name: arguments.name.clone(),
        places: arguments.place.clone(),
        lazy: arguments.lazy,
        nodes,
        pids: match arguments.pids {
            Pids::Same => PidPolicy::Same,
            Pids::Namespace => PidPolicy::Namespace,
            Pids::Auto => PidPolicy::Auto,
        },
        stdio: match arguments.stdio {
            Stdio::Log => StdioChoice::Log,
            Stdio::Inherit => StdioChoice::Inherit,
            Stdio::Null => StdioChoice::Null,
        },
    };
    let interrupted = interrupt::flag()?;
    let progress = ui.progress();
    let context = global.context(&launcher, &interrupted, &progress);
    let result = coordinator::restore(&request, &context);
    let what = format!("restore {}", arguments.name);
    let outcome = result.map_err(|error| match error {
        ClusterError::Store(error) => Failed::from(error),
        error => Failed::from_cluster(&error, &what, UNTOUCHED),
    })?;
    if let Some(path) = &arguments.pidfile {
        let pid = outcome.nodes.iter().flat_map(|(_, pids)| pids).next().copied().unwrap_or_default();
        std::fs::write(path, format!("{pid}\n")).map_err(|error| {
            Failed::other(format!("writing the PID to {}: {error}", path.display()))
                .note("the job was restored and runs")
        })?;
    }
    ui.summary(&text(&outcome), &document(&outcome))?;
    if arguments.wait {
        outcome.wait(&context).map_err(|error| match error {
            ClusterError::Interrupted => {
                Failed::new(ExitCode::Interrupted, "interrupted while waiting").note("the job runs on")
            }
            error => Failed::other(format!("waiting for the job's end: {error}")).note("the job runs on"),
        })?;
    }
    Ok(())
}

fn text(outcome: &RestoreOutcome) -> String {
    let checkpoint = &outcome.checkpoint;
    let nodes: Vec<_> = outcome.nodes.iter().map(|(node, _)| node.as_str()).collect();
    let mut text = format!(
        "Restored {} ({}): {} on {}, {}\n",
        checkpoint.name(),
        checkpoint.id.short(),
        plural(checkpoint.manifest.processes(), "process"),
        nodes.join(", "),
        duration(outcome.took),
    );
    text.extend(outcome.logs.first().map(|log| format!("Output goes to {}\n", log.display())));
    text
}

fn document(outcome: &RestoreOutcome) -> serde_json::Value {
    let nodes = outcome.nodes.iter().map(|(node, pids)| json!({"node": node, "pids": pids}));
    json!({
        "type": "restore",
        "checkpoint": outcome.checkpoint.name(),
        "id": outcome.checkpoint.id,
        "nodes": nodes.collect::<Vec<_>>(),
        "phases": outcome.phases,
        "took_us": outcome.took.as_micros() as u64,
        "logs": outcome.logs,
    })
}
