//! `ckpt dump`: take a checkpoint.

use super::{Global, interrupt, nodes_of};
use crate::{
    cluster::coordinator::{self, DumpOutcome, DumpRequest},
    store::{FAST, JobName},
    ui::{ExitCode, Failed, Ui, bytes, duration, plural},
};
use ckpt_common::{
    image::{PAGE_SIZE, manifest::DumpRecord},
    wire::{CopyBeforeWrite, DumpOptions, FilePolicy, Selector},
};
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
    target: Target,
    /// Name of the job in the store [default: the ID, or pid-PID]
    #[arg(long, value_name = "JOB")]
    name: Option<String>,
    /// Nodes of the job, such as n[01-04],login2 [default: the scheduler's, else this machine]
    #[arg(long, value_name = "LIST")]
    nodes: Option<String>,
    /// End the job once the checkpoint exists; it stays frozen until then
    #[arg(long)]
    stop: bool,
    /// Save all memory, as if there had been no checkpoint before
    #[arg(long)]
    full: bool,
    /// How long copying memory may prolong the freeze
    #[arg(long, value_name = "TIME", default_value = "10ms", value_parser = humantime::parse_duration)]
    max_pause: Duration,
    /// How memory that does not fit into that time is kept from being overwritten
    #[arg(long, value_name = "WAY", value_enum, default_value = "auto")]
    cow: Cow,
    /// `fast`, zstd level from 1 to 19, or none
    #[arg(long, value_name = "LEVEL", default_value = "fast", value_parser = compression)]
    compress: Compression,
    /// What to keep of files that the job has open for writing
    #[arg(long, value_name = "WHAT", value_enum, default_value = "content")]
    files: Files,
    /// Let something pass that leads out of the job; it comes back closed or disconnected
    #[arg(long, value_name = "KIND", value_enum)]
    allow: Vec<Allow>,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Target {
    /// The processes marked CKPT_JOB=ID, or of this job of a batch scheduler, and their descendants
    #[arg(long, value_name = "ID")]
    job: Option<String>,
    /// This process and its descendants
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Vec<i32>,
    /// Everything in this control group and below
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Compression(Option<i32>);

impl Compression {
    /// As it is typed.
    fn name(self) -> String {
        match self.0 {
            None => "none".to_owned(),
            Some(FAST) => "fast".to_owned(),
            Some(level) => level.to_string(),
        }
    }
}

fn compression(text: &str) -> Result<Compression, String> {
    match text.parse::<i32>() {
        _ if text == "none" => Ok(Compression(None)),
        _ if text == "fast" => Ok(Compression(Some(FAST))),
        Ok(level @ 1..=19) => Ok(Compression(Some(level))),
        _ => Err("give `fast`, a level from 1 to 19, or none".into()),
    }
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Files {
    /// Their content: they come back as they were
    Content,
    /// Their length: they are cut back to it
    Length,
    /// Nothing: they are opened as they are found
    None,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Cow {
    /// What costs the program least, of what the kernel offers
    Auto,
    /// A BPF program on page faults copies old content
    Bpf,
    /// Write faults wait until old content is copied
    Uffd,
    /// The freeze lasts until everything is copied
    Stop,
}

impl From<Cow> for CopyBeforeWrite {
    fn from(cow: Cow) -> Self {
        match cow {
            Cow::Auto => Self::Auto,
            Cow::Bpf => Self::Bpf,
            Cow::Uffd => Self::Uffd,
            Cow::Stop => Self::Stop,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Allow {
    /// TCP connections
    #[value(name = "outside-tcp")]
    Tcp,
    /// Unix sockets
    #[value(name = "outside-unix")]
    Unix,
    /// Pipes and FIFOs
    #[value(name = "outside-pipe")]
    Pipe,
    /// Terminals
    #[value(name = "outside-tty")]
    Tty,
}

impl Allow {
    fn word(self) -> &'static str {
        match self {
            Self::Tcp => "outside-tcp",
            Self::Unix => "outside-unix",
            Self::Pipe => "outside-pipe",
            Self::Tty => "outside-tty",
        }
    }
}

impl Target {
    fn selector(&self) -> Selector {
        match (&self.job, &self.cgroup) {
            (Some(job), _) => Selector::Job(job.clone()),
            (None, Some(cgroup)) => Selector::Cgroup(cgroup.clone()),
            (None, None) => Selector::Pids(self.pid.clone()),
        }
    }

    /// The options as typed, for the manifest.
    fn typed(&self) -> String {
        match self.selector() {
            Selector::Job(id) => format!("--job {id}"),
            Selector::Cgroup(path) => format!("--cgroup {path}"),
            Selector::Pids(pids) => {
                pids.iter().map(|pid| format!("--pid {pid}")).collect::<Vec<_>>().join(" ")
            }
        }
    }

    /// What it is, in a message.
    fn noun(&self) -> String {
        match self.selector() {
            Selector::Job(id) => format!("job {id}"),
            Selector::Cgroup(path) => format!("control group {path}"),
            Selector::Pids(pids) => match &pids[..] {
                [pid] => format!("process {pid}"),
                pids => format!("{} process trees", pids.len()),
            },
        }
    }

    fn default_name(&self) -> String {
        match self.selector() {
            Selector::Job(id) => id,
            Selector::Cgroup(path) => path.trim_matches('/').replace('/', "-"),
            Selector::Pids(pids) => format!("pid-{}", pids.first().copied().unwrap_or_default()),
        }
    }
}

const UNTOUCHED: &str = "the job runs on, the store is unchanged";

pub(super) fn run(arguments: &Arguments, global: &Global, ui: &Ui) -> Result<(), Failed> {
    let launcher = global.launcher()?;
    let nodes = match (nodes_of(arguments.nodes.as_deref())?, arguments.target.selector()) {
        (Some(nodes), Selector::Pids(_)) if nodes.len() > 1 => {
            return Err(Failed::usage("--pid names processes of one node, but --nodes names several")
                .hint("mark the processes with CKPT_JOB=ID in their environment and use --job ID"));
        }
        (Some(nodes), _) => nodes,
        (None, _) => vec![launcher.this_node()],
    };
    let name = arguments.name.clone().unwrap_or_else(|| arguments.target.default_name());
    let job: JobName = name
        .parse()
        .map_err(|error| Failed::from(error).hint("--name gives the job another name in the store"))?;
    let mut allow: Vec<String> = Vec::new();
    for kind in &arguments.allow {
        if !allow.iter().any(|word| word == kind.word()) {
            allow.push(kind.word().to_owned());
        }
    }
    let (files, files_text) = match arguments.files {
        Files::Content => (FilePolicy::Content, "content"),
        Files::Length => (FilePolicy::Length, "length"),
        Files::None => (FilePolicy::None, "none"),
    };
    let compress = arguments.compress.0;
    let request = DumpRequest {
        store: global.absolute_store()?,
        job,
        selector: arguments.target.selector(),
        nodes,
        options: DumpOptions {
            stop: arguments.stop,
            compress,
            files,
            allow: allow.clone(),
            full: arguments.full,
            max_pause: arguments.max_pause.as_micros() as u64,
            cow: arguments.cow.into(),
        },
        record: DumpRecord {
            selector: arguments.target.typed(),
            stop: arguments.stop,
            compress: arguments.compress.name(),
            files: files_text.to_owned(),
            allow,
        },
    };
    let interrupted = interrupt::flag()?;
    let progress = ui.progress();
    let outcome = coordinator::dump(&request, &global.context(&launcher, &interrupted, &progress));
    drop(progress);
    let what = format!("checkpoint {}", arguments.target.noun());
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

fn text(outcome: &DumpOutcome) -> String {
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

fn document(outcome: &DumpOutcome) -> serde_json::Value {
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

    #[test]
    fn compression_levels() {
        assert_eq!(compression("none"), Ok(Compression(None)));
        assert_eq!(compression("19"), Ok(Compression(Some(19))));
        assert!(compression("20").is_err() && compression("-1").is_err());
        for text in ["none", "fast", "3"] {
            assert_eq!(compression(text).unwrap().name(), text);
        }
    }
}
