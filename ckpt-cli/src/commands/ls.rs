//! `ckpt ls`: what is in the store.

use super::Global;
use crate::{
    store::{JobName, Store},
    ui::{ExitCode, Failed, Table, Ui, bytes, date},
};
use ckpt_common::image::{PAGE_SIZE, manifest::Checkpoint};
use serde_json::json;

/// List the checkpoints in the store
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Only those of this job
    #[arg(value_name = "JOB")]
    job: Option<JobName>,
}

pub(super) fn run(arguments: &Arguments, global: &Global, ui: &Ui) -> Result<(), Failed> {
    let store = Store::open(&global.store)?;
    let jobs = match &arguments.job {
        Some(job) => vec![job.clone()],
        None => store.jobs()?,
    };
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for job in jobs {
        for entry in store.entries(&job)? {
            match entry {
                Ok(checkpoint) => good.push(checkpoint),
                Err(error) => bad.push(error),
            }
        }
    }
    if let (Some(job), true, true) = (&arguments.job, good.is_empty(), bad.is_empty()) {
        let message = format!("there is no job `{job}` in the store {}", global.store.display());
        return Err(Failed::other(message).hint("`ckpt ls` lists what is there"));
    }
    ui.result(&text(&good), &document(&good))?;
    for error in &bad {
        ui.warn(&error.to_string());
    }
    match bad.is_empty() {
        true => Ok(()),
        false => Err(Failed::silent(ExitCode::Damaged)),
    }
}

fn memory(checkpoint: &Checkpoint) -> u64 {
    let nodes = checkpoint.manifest.nodes.iter();
    nodes.map(|node| (node.part.data_pages + node.part.zero_pages) * PAGE_SIZE as u64).sum()
}

fn text(checkpoints: &[Checkpoint]) -> String {
    if checkpoints.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["CHECKPOINT", "ID", "TAKEN", ">PROCESSES", ">MEMORY", ">STORED", "NODES"]);
    for checkpoint in checkpoints {
        let manifest = &checkpoint.manifest;
        let nodes: Vec<_> = manifest.nodes.iter().map(|node| node.name.as_str()).collect();
        table.row([
            checkpoint.name(),
            checkpoint.id.short(),
            date(manifest.created),
            manifest.processes().to_string(),
            bytes(memory(checkpoint)),
            bytes(manifest.stored_bytes()),
            nodes.join(","),
        ]);
    }
    table.text()
}

fn document(checkpoints: &[Checkpoint]) -> serde_json::Value {
    let entry = |checkpoint: &Checkpoint| {
        let manifest = &checkpoint.manifest;
        json!({
            "checkpoint": checkpoint.name(),
            "job": manifest.job,
            "number": manifest.number,
            "id": checkpoint.id,
            "created": manifest.created,
            "processes": manifest.processes(),
            "memory_bytes": memory(checkpoint),
            "stored_bytes": manifest.stored_bytes(),
            "nodes": manifest.nodes.iter().map(|node| &node.name).collect::<Vec<_>>(),
        })
    };
    json!({"type": "ls", "checkpoints": checkpoints.iter().map(entry).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::show::tests::sample;

    #[test]
    fn what_a_person_reads() {
        let mut second = sample();
        second.manifest.number = 12;
        insta::assert_snapshot!(text(&[sample(), second]));
        insta::assert_snapshot!(document(&[sample()]));
    }
}
