//! `ckpt verify`: is a checkpoint whole?

use super::Global;
use crate::{
    store::{Store, VerifyReport},
    ui::{ExitCode, Failed, Ui, bytes, plural},
};
use ckpt_common::image::manifest::Checkpoint;
use serde_json::json;

/// Check that a checkpoint is whole and unchanged
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// JOB (the latest), JOB@N, JOB@latest, or the first digits of an id
    #[arg(value_name = "CHECKPOINT")]
    name: String,
    /// Read only so much of the memory; everything else is always checked
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(1..=100))]
    sample: u8,
}

pub(super) fn run(arguments: &Arguments, global: &Global, ui: &Ui) -> Result<(), Failed> {
    let store = Store::open(&global.store)?;
    let _hold = store.hold()?;
    let checkpoint = store.resolve(&arguments.name)?;
    let report = store.verify(&checkpoint, arguments.sample);
    if !report.problems.is_empty() {
        return Err(failed(&checkpoint, &report));
    }
    ui.summary(&text(&checkpoint, &report), &document(&checkpoint, &report))
}

fn failed(checkpoint: &Checkpoint, report: &VerifyReport) -> Failed {
    let message = format!("{} ({}) is damaged", checkpoint.name(), checkpoint.id.short());
    let mut failed = Failed::new(ExitCode::Damaged, message);
    for problem in &report.problems {
        let line = match &problem.node {
            Some(node) => format!("{node}: {}", problem.what),
            None => problem.what.clone(),
        };
        failed.details.push((line, json!({"node": problem.node, "problem": problem.what})));
    }
    failed.hint("`ckpt ls` shows other checkpoints")
}

fn text(checkpoint: &Checkpoint, report: &VerifyReport) -> String {
    format!(
        "{} ({}) is whole: {}, {}, {} ({}), {}\n",
        checkpoint.name(),
        checkpoint.id.short(),
        plural(report.parts, "part"),
        plural(report.packs, "pack"),
        plural(report.chunks as usize, "chunk"),
        bytes(report.bytes),
        plural(report.channels, "connection"),
    )
}

fn document(checkpoint: &Checkpoint, report: &VerifyReport) -> serde_json::Value {
    json!({
        "type": "verify",
        "checkpoint": checkpoint.name(),
        "id": checkpoint.id,
        "whole": true,
        "parts": report.parts,
        "packs": report.packs,
        "chunks": report.chunks,
        "bytes": report.bytes,
        "connections": report.channels,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{commands::show::tests::sample, store::Problem};

    #[test]
    fn what_a_person_reads() {
        let mut report = VerifyReport {
            parts: 2,
            packs: 1,
            chunks: 900,
            bytes: 58 << 20,
            channels: 3,
            ..Default::default()
        };
        let whole = text(&sample(), &report);
        let problem =
            |node: Option<&str>, what: &str| Problem { node: node.map(str::to_owned), what: what.into() };
        report.problems = vec![
            problem(Some("n1"), "/s/packs/1.pack: pack is damaged: chunk 7 has a wrong checksum"),
            problem(None, "TCP 10.0.0.1:1 -> 10.0.0.2:2: 3 bytes are at neither end"),
        ];
        let failed = failed(&sample(), &report);
        let lines: Vec<_> = failed.details.iter().map(|(line, _)| line.as_str()).collect();
        insta::assert_snapshot!(format!("{whole}{}\n{}", failed.message, lines.join("\n")));
    }
}
