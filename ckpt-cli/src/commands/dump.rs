//! `ckpt dump`: take a checkpoint.

use super::{
    Global, interrupt,
    what::{self, How, Which},
};
use crate::{
    cluster::coordinator::{self, DumpOutcome},
    ui::{ExitCode, Failed, Ui, bytes, duration, plural},
};
use ckpt_common::image::PAGE_SIZE;
use serde_json::json;
use std::time::Duration;

/// Take a checkpoint of a running job
///
/// The job is frozen only for as long as it takes to note its state; its memory is compressed and
/// written while it runs on. The checkpoint exists once every node's part is on storage; whatever
/// fails before leaves the job running and the store as it was.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    which: Which,
    /// End the job once the checkpoint exists; it stays frozen until then
    #[arg(long)]
    stop: bool,
    /// Save all memory, as if there had been no checkpoint before
    #[arg(long)]
    full: bool,
    #[command(flatten)]
    how: How,
}

pub(super) const UNTOUCHED: &str = "the job runs on, the store is unchanged";

pub(super) fn run(arguments: &Arguments, global: &Global, ui: &Ui) -> Result<(), Failed> {
    let launcher = global.launcher()?;
    let request =
        what::request(&arguments.which, &arguments.how, arguments.stop, arguments.full, global, &launcher)?;
    let interrupted = interrupt::flag()?;
    let progress = ui.progress();
    let outcome = coordinator::dump(&request, &global.context(&launcher, &interrupted, &progress));
    drop(progress);
    let what = format!("checkpoint {}", arguments.which.noun());
    let outcome = outcome.map_err(|error| Failed::from_cluster(&error, &what, UNTOUCHED))?;
    ui.summary(&text(&outcome), &document(&outcome))?;
    for (node, item) in &outcome.left_out {
        ui.note(&format!("left out: {node}: {} ({}) {}: {}", item.pid, item.process, item.item, item.reason));
    }
    match outcome.left_out.is_empty() {
        true => Ok(()),
        false => Err(Failed::silent(ExitCode::LeftOut)),
    }
}

fn memory(outcome: &DumpOutcome) -> u64 {
    let nodes = outcome.checkpoint.manifest.nodes.iter();
    nodes.map(|node| (node.part.data_pages + node.part.zero_pages) * PAGE_SIZE as u64).sum()
}

pub(super) fn text(outcome: &DumpOutcome) -> String {
    let (checkpoint, manifest) = (&outcome.checkpoint, &outcome.checkpoint.manifest);
    let pause = match manifest.options.stop {
        true => "job ended".to_owned(),
        false => format!("paused {}", duration(Duration::from_micros(manifest.paused_us))),
    };
    format!(
        "Saved {} ({}): {} on {}, {} of memory in {}, {pause}, {}\n",
        checkpoint.name(),
        checkpoint.id.short(),
        plural(manifest.processes(), "process"),
        plural(manifest.nodes.len(), "node"),
        bytes(memory(outcome)),
        bytes(manifest.stored_bytes()),
        duration(outcome.took),
    )
}

pub(super) fn document(outcome: &DumpOutcome) -> serde_json::Value {
    let (checkpoint, manifest) = (&outcome.checkpoint, &outcome.checkpoint.manifest);
    json!({
        "type": "dump",
        "checkpoint": checkpoint.name(),
        "id": checkpoint.id,
        "processes": manifest.processes(),
        "nodes": manifest.nodes.iter().map(|node| &node.name).collect::<Vec<_>>(),
        "memory_bytes": memory(outcome),
        "stored_bytes": manifest.stored_bytes(),
        "stopped": manifest.options.stop,
        "paused_us": manifest.paused_us,
        "took_us": outcome.took.as_micros() as u64,
        "phases": manifest.phases,
        "left_out": outcome.left_out.iter()
            .map(|(node, item)| json!({"node": node, "pid": item.pid, "item": item.item, "reason": item.reason}))
            .collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_common::image::{
        Digest,
        manifest::{Checkpoint, Manifest, NodePart, PartRef, ProcessSummary},
    };

    #[test]
    fn success_is_one_line_with_the_numbers_that_matter() {
        let part = PartRef {
            id: Digest([1; 32]),
            bytes: 40 << 20,
            packs: Vec::new(),
            records: 9,
            data_pages: 50_000,
            zero_pages: 2_000,
            ..Default::default()
        };
        let node = NodePart {
            name: "n1".into(),
            kernel: "6.18".into(),
            part,
            addresses: Vec::new(),
            processes: vec![ProcessSummary::default(); 3],
            ..Default::default()
        };
        let manifest = Manifest {
            job: "nightly".into(),
            number: 3,
            nodes: vec![node.clone(), node],
            paused_us: 11_200,
            ..Default::default()
        };
        let checkpoint = Checkpoint { id: Digest([0x9f; 32]), manifest };
        let mut outcome =
            DumpOutcome { checkpoint, took: Duration::from_millis(1_912), left_out: Vec::new() };
        let running = text(&outcome);
        outcome.checkpoint.manifest.options.stop = true;
        insta::assert_snapshot!(format!("{running}{}{}", text(&outcome), document(&outcome)));
    }
}
