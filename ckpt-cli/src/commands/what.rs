//! What is to be checkpointed, and how: the options that `dump` and `watch` share.

use super::{Global, nodes_of};
use crate::{
    cluster::{coordinator::DumpRequest, transport::Launcher},
    store::{FAST, JobName},
    ui::Failed,
};
use ckpt_common::{
    image::manifest::DumpRecord,
    wire::{CopyBeforeWrite, DumpOptions, FilePolicy, Selector},
};
use std::time::Duration;

/// The job.
#[derive(Debug, clap::Args)]
pub(super) struct Which {
    #[command(flatten)]
    target: Target,
    /// Name of the job in the store [default: the ID, or pid-PID]
    #[arg(long, value_name = "JOB")]
    name: Option<String>,
    /// Nodes of the job, such as n[01-04],login2 [default: the scheduler's, else this machine]
    #[arg(long, value_name = "LIST")]
    nodes: Option<String>,
}

/// What happens to its memory and files.
#[derive(Debug, clap::Args)]
pub(super) struct How {
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

impl Which {
    /// What it is, in a message.
    pub(super) fn noun(&self) -> String {
        self.target.noun()
    }
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

/// The request to the coordinator.
pub(super) fn request(
    which: &Which,
    how: &How,
    stop: bool,
    full: bool,
    global: &Global,
    launcher: &Launcher,
) -> Result<DumpRequest, Failed> {
    let nodes = match (nodes_of(which.nodes.as_deref())?, which.target.selector()) {
        (Some(nodes), Selector::Pids(_)) if nodes.len() > 1 => {
            return Err(Failed::usage("--pid names processes of one node, but --nodes names several")
                .hint("mark the processes with CKPT_JOB=ID in their environment and use --job ID"));
        }
        (Some(nodes), _) => nodes,
        (None, _) => vec![launcher.this_node()],
    };
    let name = which.name.clone().unwrap_or_else(|| which.target.default_name());
    let job: JobName = name
        .parse()
        .map_err(|error| Failed::from(error).hint("--name gives the job another name in the store"))?;
    let mut allow: Vec<String> = Vec::new();
    for kind in &how.allow {
        if !allow.iter().any(|word| word == kind.word()) {
            allow.push(kind.word().to_owned());
        }
    }
    let (files, files_text) = match how.files {
        Files::Content => (FilePolicy::Content, "content"),
        Files::Length => (FilePolicy::Length, "length"),
        Files::None => (FilePolicy::None, "none"),
    };
    let compress = how.compress.0;
    Ok(DumpRequest {
        store: global.absolute_store()?,
        job,
        selector: which.target.selector(),
        nodes,
        options: DumpOptions {
            stop,
            compress,
            files,
            allow: allow.clone(),
            full,
            max_pause: how.max_pause.as_micros() as u64,
            cow: how.cow.into(),
        },
        record: DumpRecord {
            selector: which.target.typed(),
            stop,
            compress: how.compress.name(),
            files: files_text.to_owned(),
            allow,
        },
        when_below: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
