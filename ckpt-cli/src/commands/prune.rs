//! `ckpt prune`: remove old checkpoints.

use super::Global;
use crate::{
    store::{JobName, PruneReport, Store},
    ui::{ExitCode, Failed, Ui, bytes, plural},
};
use serde_json::json;
use std::num::NonZeroUsize;

/// Remove old checkpoints, and what only they needed
///
/// Parts, packs and chunks inside packs that no remaining checkpoint uses are freed, those of dumps that never
/// finished too. Not possible while a dump is under way in the store.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Only this job's [default: every job's]
    #[arg(value_name = "JOB")]
    job: Option<JobName>,
    /// Keep so many of the newest checkpoints of a job
    #[arg(long, value_name = "N", default_value = "1")]
    keep: NonZeroUsize,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn run(arguments: &Arguments, global: &Global, ui: &Ui) -> Result<(), Failed> {
    let store = Store::open(&global.store)?;
    let report = store.prune(arguments.job.as_ref(), arguments.keep, arguments.dry_run)?;
    ui.summary(&text(&report, arguments.dry_run), &document(&report, arguments.dry_run))?;
    for problem in &report.problems {
        ui.warn(problem);
    }
    match report.problems.is_empty() {
        true => Ok(()),
        false => Err(Failed::silent(ExitCode::Damaged)),
    }
}

fn text(report: &PruneReport, dry_run: bool) -> String {
    let stay = plural(report.kept, "checkpoint");
    let nothing = PruneReport { kept: report.kept, problems: report.problems.clone(), ..Default::default() };
    if *report == nothing {
        return format!("Nothing to remove; {stay} in use\n");
    }
    let verb = if dry_run { "Would remove" } else { "Removed" };
    let (frees, freed) = if dry_run { ("frees", "") } else { ("", " freed") };
    let names = match report.removed.is_empty() {
        true => "no checkpoint".to_owned(),
        false => report.removed.join(", "),
    };
    let what = [
        plural(report.parts, "part"),
        plural(report.packs, "pack"),
        format!("unused chunks of {}", plural(report.repacked, "pack")),
    ];
    let size = format!("{frees} {}{freed}", bytes(report.bytes));
    format!("{verb} {names} ({}): {}; {stay} kept\n", what.join(", "), size.trim())
}

fn document(report: &PruneReport, dry_run: bool) -> serde_json::Value {
    json!({
        "type": "prune",
        "dry_run": dry_run,
        "removed": report.removed,
        "kept": report.kept,
        "parts": report.parts,
        "packs": report.packs,
        "repacked": report.repacked,
        "freed_bytes": report.bytes,
        "problems": report.problems,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_person_reads() {
        let report = PruneReport {
            removed: vec!["shop@1".into(), "shop@2".into()],
            kept: 3,
            parts: 4,
            packs: 1,
            repacked: 2,
            bytes: 212 << 20,
            problems: Vec::new(),
        };
        let nothing = PruneReport { kept: 1, ..Default::default() };
        let texts = [text(&report, false), text(&report, true), text(&nothing, false)];
        insta::assert_snapshot!(format!("{}{}", texts.concat(), document(&report, false)));
    }
}
