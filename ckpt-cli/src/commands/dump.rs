//! `ckpt dump`: take a checkpoint.

use super::{
    Global, interrupt,
    what::{self, How, Which},
};
use crate::{
    cluster::coordinator::{self, DumpOutcome, WhenBelow},
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
    /// Freeze the job when at most so much of its memory is modified since its last checkpoint, such as 64M
    ///
    /// Without an earlier checkpoint: since all memory was copied once, before the waiting begins.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    when_below: Option<u64>,
    /// With --when-below: freeze it after this time anyway
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration, requires = "when_below")]
    deadline: Duration,
    #[command(flatten)]
    how: How,
}

/// A number of bytes: K, M, G and T are powers of 1024, with or without `iB`; with `B`, of 1000.
fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size: give a number and B, K, M, G or T, such as 64M or 1.5GiB");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = text[digits..].trim().to_ascii_uppercase();
    let (prefix, base) = match unit.strip_suffix("IB") {
        Some(prefix) => (prefix, 1024_f64),
        None if unit.len() == 2 && unit.ends_with('B') => (&unit[..1], 1000.0),
        None => (unit.as_str(), 1024.0),
    };
    let power = match prefix {
        "" | "B" => 0,
        "K" => 1,
        "M" => 2,
        "G" => 3,
        "T" => 4,
        _ => return Err(wrong()),
    };
    Ok((number * base.powi(power)) as u64)
}

pub(super) const UNTOUCHED: &str = "the job runs on, the store is unchanged";

pub(super) fn run(arguments: &Arguments, global: &Global, ui: &Ui) -> Result<(), Failed> {
    let launcher = global.launcher()?;
    let mut request =
        what::request(&arguments.which, &arguments.how, arguments.stop, arguments.full, global, &launcher)?;
    request.when_below = arguments.when_below.map(|bytes| WhenBelow { bytes, deadline: arguments.deadline });
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
    let waited = outcome.waited.map_or_else(String::new, |waited| {
        let when = match waited.below {
            true => "Frozen when little was modified",
            false => "Frozen at the deadline, with more modified than wanted",
        };
        format!("{when}: {} after {}\n", bytes(waited.modified), duration(waited.waited))
    });
    format!(
        "Saved {} ({}): {} on {}, {} of memory in {}, {pause}, {}\n{waited}",
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
    let mut document = json!({
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
    });
    if let Some(waited) = outcome.waited {
        document["waited_us"] = json!(waited.waited.as_micros() as u64);
        document["below"] = json!(waited.below);
        document["modified_bytes"] = json!(waited.modified);
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::coordinator::Waited;
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
        let mut outcome = DumpOutcome {
            checkpoint,
            took: Duration::from_millis(1_912),
            left_out: Vec::new(),
            waited: None,
        };
        let running = text(&outcome);
        outcome.checkpoint.manifest.options.stop = true;
        insta::assert_snapshot!(format!("{running}{}{}", text(&outcome), document(&outcome)));
        let mut below = Waited { waited: Duration::from_millis(1_200), modified: 3 << 20, below: true };
        outcome.waited = Some(below);
        let low = text(&outcome);
        below.below = false;
        outcome.waited = Some(below);
        insta::assert_snapshot!(format!("{low}{}{}", text(&outcome), document(&outcome)));
    }

    #[test]
    fn sizes() {
        let all = [
            ("4096", 4096),
            ("64M", 64 << 20),
            ("64MiB", 64 << 20),
            ("1.5g", 3 << 29),
            ("2KB", 2000),
            ("7B", 7),
        ];
        for (text, bytes) in all {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "12Q", "-1", "1.2.3K"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
