//! `ckpt watch`: checkpoints at intervals and on request.

use super::{
    Global, dump, interrupt,
    what::{self, How, Which},
};
use crate::{
    cluster::{
        ClusterError, Result as ClusterResult,
        coordinator::{self, Context, DumpOutcome, DumpRequest, Reasons, Watcher},
        requests,
    },
    store::{JobName, Store, StoreError},
    ui::{Failed, Ui, duration},
};
use serde_json::{Value, json};
use std::{num::NonZeroUsize, time::Duration};

/// Take checkpoints of a job until it ends: at intervals, and whenever one is asked for
///
/// Asked for by a program of the job or by root, with `ckpt request` or by one line to a socket on the job's nodes
/// (docs/REQUEST.md), or by SIGUSR1 to this command. A checkpoint that fails is reported and tried again; the watch
/// goes on. With --json, each event is one line.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    which: Which,
    /// Time between the beginnings of two checkpoints [default: only on request]
    #[arg(long, value_name = "TIME", value_parser = interval)]
    every: Option<Duration>,
    /// After each checkpoint, remove all but so many of the newest of this job
    #[arg(long, value_name = "N")]
    keep: Option<NonZeroUsize>,
    #[command(flatten)]
    how: How,
}

fn interval(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("give a time above 0".into()),
        Ok(time) => Ok(time),
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn run(arguments: &Arguments, global: &Global, ui: &Ui) -> Result<(), Failed> {
    let launcher = global.launcher()?;
    let request = what::request(&arguments.which, &arguments.how, false, false, global, &launcher)?;
    let (interrupted, signalled) = (interrupt::flag()?, interrupt::request()?);
    let noun = arguments.which.noun();
    let context = global.context(&launcher, &interrupted, &());
    let mut watch = Watching { request: &request, keep: arguments.keep, context: &context, ui, noun: &noun };
    let listening =
        format!("watching {noun}; requests go to {}", requests::path(&request.job.to_string()).display());
    ui.note(&listening);
    match coordinator::watch(&request, arguments.every, &signalled, &context, &mut watch) {
        Ok(()) => {
            ui.summary(&format!("Ended: {noun}\n"), &json!({"type": "end", "job": request.job.to_string()}))
        }
        Err(ClusterError::Interrupted) => {
            Err(Failed::from_cluster(&ClusterError::Interrupted, "", "the job runs on, nobody watches it"))
        }
        Err(error) => Err(Failed::from_cluster(&error, &format!("watch {noun}"), "the job runs on")),
    }
}

struct Watching<'a> {
    request: &'a DumpRequest,
    keep: Option<NonZeroUsize>,
    context: &'a Context<'a>,
    ui: &'a Ui,
    noun: &'a str,
}

impl Watcher for Watching<'_> {
    fn take(&mut self, reasons: Reasons) -> ClusterResult<DumpOutcome> {
        let progress = self.ui.progress();
        let context = Context { observer: &progress, log: self.context.log.clone(), ..*self.context };
        let outcome = coordinator::dump(self.request, &context);
        drop(progress);
        let outcome = outcome?;
        self.say(&dump::text(&outcome), &saved(&outcome, reasons));
        if let Some(keep) = self.keep {
            self.prune(keep);
        }
        Ok(outcome)
    }

    fn failed(&mut self, error: &ClusterError, again: Option<Duration>) {
        let failed = Failed::from_cluster(error, &format!("checkpoint {}", self.noun), dump::UNTOUCHED);
        if self.ui.is_json() {
            return self.say("", &failure(&failed, again));
        }
        self.ui.failed(&failed);
        if let Some(again) = again {
            self.ui.note(&format!("trying again in {}", duration(again)));
        }
    }

    fn deaf(&mut self, error: &ClusterError) {
        self.ui.warn(&format!("requests are not heard for the moment: {error}"));
    }
}

impl Watching<'_> {
    /// Nobody to tell is no reason to stop.
    fn say(&self, text: &str, document: &Value) {
        if let Err(error) = self.ui.summary(text, document) {
            tracing::warn!("{}", error.message);
        }
    }

    fn prune(&self, keep: NonZeroUsize) {
        match prune(&self.request.store, &self.request.job, keep) {
            Ok(problems) => problems.iter().for_each(|problem| self.ui.warn(problem)),
            // Its turn comes after the next checkpoint.
            Err(error) => self.ui.warn(&format!("old checkpoints were not removed: {error}")),
        }
    }
}

fn prune(store: &std::path::Path, job: &JobName, keep: NonZeroUsize) -> Result<Vec<String>, StoreError> {
    Ok(Store::open(store)?.prune(Some(job), keep, false)?.problems)
}

fn saved(outcome: &DumpOutcome, reasons: Reasons) -> Value {
    let mut document = dump::document(outcome);
    document["reason"] = json!(reasons.to_string());
    document
}

fn failure(failed: &Failed, again: Option<Duration>) -> Value {
    json!({
        "type": "failed",
        "message": failed.message,
        "details": failed.details.iter().map(|(_, document)| document).collect::<Vec<_>>(),
        "hints": failed.hints,
        "again_us": again.map(|again| again.as_micros() as u64),
    })
}
