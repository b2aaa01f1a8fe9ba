//! `ckpt show`: what is in a checkpoint.

use super::Global;
use crate::{
    store::{PartReader, Store},
    ui::{Failed, Table, Ui, bytes, date, duration, plural},
};
use ckpt_common::image::{
    MemoryId, PAGE_SIZE,
    file::OpenFile,
    manifest::{Checkpoint, NodePart},
    pages::Source,
    process::Process,
};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, time::Duration};

/// Show what is in a checkpoint
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// JOB (the latest), JOB@N, JOB@latest, or the first digits of an id
    #[arg(value_name = "CHECKPOINT")]
    name: String,
    /// Processes
    #[arg(long)]
    ps: bool,
    /// Open files
    #[arg(long)]
    fds: bool,
    /// Memory
    #[arg(long)]
    mem: bool,
    /// TCP connections inside the job, and what was on its way
    #[arg(long)]
    channels: bool,
    /// What took how long, and how each process's memory was saved
    #[arg(long)]
    phases: bool,
}

pub(super) fn run(arguments: &Arguments, global: &Global, ui: &Ui) -> Result<(), Failed> {
    let store = Store::open(&global.store)?;
    let checkpoint = store.resolve(&arguments.name)?;
    let mut sections = vec![summary(&checkpoint)];
    if arguments.ps {
        sections.push(processes(&checkpoint));
    }
    if arguments.fds || arguments.mem {
        let mut parts = Vec::new();
        for node in &checkpoint.manifest.nodes {
            parts.push((node, store.open_part(&node.part)?));
        }
        if arguments.fds {
            sections.push(files(&parts)?);
        }
        if arguments.mem {
            sections.push(memory(&parts)?);
        }
    }
    if arguments.channels {
        sections.push(channels(&checkpoint));
    }
    if arguments.phases {
        sections.push(phases(&checkpoint));
        sections.push(saving(&checkpoint));
    }
    let text = sections.iter().map(|section| section.text.as_str()).filter(|text| !text.is_empty());
    let text: Vec<_> = text.collect();
    let mut document = Map::from_iter([("type".to_owned(), json!("show"))]);
    document.extend(sections.iter().map(|section| (section.name.to_owned(), section.document.clone())));
    ui.result(&text.join("\n"), &document)
}

/// One part of the output, for people and for programs.
struct Section {
    name: &'static str,
    text: String,
    document: Value,
}

fn summary(checkpoint: &Checkpoint) -> Section {
    let manifest = &checkpoint.manifest;
    let pause = match manifest.options.stop {
        true => "job ended".to_owned(),
        false => format!("paused {}", duration(Duration::from_micros(manifest.paused_us))),
    };
    let mut lines = vec![
        format!("{} ({})", checkpoint.name(), checkpoint.id),
        format!("taken    {}, {pause}, by ckpt {}", date(manifest.created), manifest.ckpt_version),
        format!("asked    {}{}", manifest.options.selector, options(checkpoint)),
        format!(
            "holds    {}, {} stored",
            plural(manifest.processes(), "process"),
            bytes(manifest.stored_bytes())
        ),
    ];
    for node in &manifest.nodes {
        let addresses: Vec<_> = node.addresses.iter().map(|entry| entry.address.to_string()).collect();
        let since = node.base.as_ref().map_or_else(String::new, |base| format!(" since {}", base.name));
        lines.push(format!(
            "node     {}: {}, {} stored{since}, Linux {}, {}",
            node.name,
            plural(node.processes.len(), "process"),
            bytes(node.part.stored_bytes()),
            node.kernel,
            addresses.join(" "),
        ));
    }
    let text = lines.iter().map(|line| format!("{}\n", line.trim_end_matches([' ', ',']))).collect();
    let document = json!({
        "name": checkpoint.name(),
        "id": checkpoint.id,
        "created": manifest.created,
        "paused_us": manifest.paused_us,
        "ckpt_version": manifest.ckpt_version,
        "options": manifest.options,
        "stored_bytes": manifest.stored_bytes(),
        "nodes": manifest.nodes.iter().map(|node| json!({
            "name": node.name,
            "kernel": node.kernel,
            "addresses": node.addresses,
            "processes": node.processes.len(),
            "stored_bytes": node.part.stored_bytes(),
            "part": node.part.id,
            "base": node.base,
        })).collect::<Vec<_>>(),
    });
    Section { name: "checkpoint", text, document }
}

fn options(checkpoint: &Checkpoint) -> String {
    let options = &checkpoint.manifest.options;
    let mut text = String::new();
    if options.stop {
        text.push_str(" --stop");
    }
    text.push_str(&format!(" --compress {} --files {}", options.compress, options.files));
    text.extend(options.allow.iter().map(|kind| format!(" --allow {kind}")));
    text
}

fn processes(checkpoint: &Checkpoint) -> Section {
    let mut table = Table::new(&["NODE", ">PID", ">PPID", ">THREADS", ">RESIDENT", "NAME", "COMMAND"]);
    let mut document = Vec::new();
    for node in &checkpoint.manifest.nodes {
        for process in &node.processes {
            table.row([
                node.name.clone(),
                process.pid.to_string(),
                process.ppid.to_string(),
                process.threads.to_string(),
                bytes(process.rss),
                process.name.clone(),
                shortened(&process.cmdline.join(" "), 60),
            ]);
            document.push(json!({"node": node.name, "process": process}));
        }
    }
    Section { name: "processes", text: table.text(), document: json!(document) }
}

/// The beginning of a text, on one line.
pub(super) fn shortened(text: &str, length: usize) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match text.char_indices().nth(length) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn files(parts: &[(&NodePart, PartReader)]) -> Result<Section, Failed> {
    let mut table = Table::new(&["NODE", ">PID", ">FD", "KIND", "FILE"]);
    let mut document = Vec::new();
    for (node, part) in parts {
        let files = part.read::<OpenFile>()?;
        let by_id: BTreeMap<_, _> = files.iter().map(|file| (file.id, file)).collect();
        for process in part.read::<Process>()? {
            for descriptor in &process.fds {
                let file = by_id.get(&descriptor.file);
                let (kind, label) = file.map_or(("?", "?"), |file| (&file.kind, &file.label));
                table.row([
                    node.name.clone(),
                    process.pid.to_string(),
                    descriptor.fd.to_string(),
                    kind.to_owned(),
                    shortened(label, 80),
                ]);
                document.push(json!({
                    "node": node.name,
                    "pid": process.pid,
                    "fd": descriptor.fd,
                    "cloexec": descriptor.cloexec,
                    "kind": kind,
                    "file": label,
                    "description": descriptor.file,
                }));
            }
        }
    }
    Ok(Section { name: "fds", text: table.text(), document: json!(document) })
}

/// Pages with content, and pages full of zeros.
fn count(part: &PartReader, id: MemoryId) -> Result<(u64, u64), Failed> {
    let (mut data, mut zero) = (0, 0);
    for run in part.page_map(id)? {
        match run.source() {
            Source::Zero => zero += u64::from(run.count.get()),
            Source::Chunk { .. } => data += u64::from(run.count.get()),
        }
    }
    Ok((data, zero))
}

fn memory(parts: &[(&NodePart, PartReader)]) -> Result<Section, Failed> {
    let mut table = Table::new(&["NODE", "OF", ">MAPPINGS", ">MAPPED", ">CONTENT", ">ZEROS"]);
    let mut document = Vec::new();
    for (node, part) in parts {
        let mut others: Vec<_> = part.memories();
        let mut rows = Vec::new();
        for process in part.read::<Process>()?.iter().filter(|process| process.zombie.is_none()) {
            let mapped: u64 = process.mm.mappings.iter().map(|m| m.end.saturating_sub(m.start)).sum();
            let of = format!("process {}", process.pid);
            rows.push((of, process.mm.mappings.len(), mapped, process.mm.memory));
            others.retain(|id| *id != process.mm.memory);
        }
        rows.extend(others.into_iter().map(|id| (format!("object {}", id.0), 0, 0, id)));
        for (of, mappings, mapped, id) in rows {
            let (data, zero) = count(part, id)?;
            let [data, zero] = [data, zero].map(|pages| pages * PAGE_SIZE as u64);
            let cells = [mappings.to_string(), bytes(mapped), bytes(data), bytes(zero)];
            document.push(json!({
                "node": node.name,
                "of": of,
                "mappings": mappings,
                "mapped_bytes": mapped,
                "content_bytes": data,
                "zero_bytes": zero,
            }));
            table.row([node.name.clone(), of].into_iter().chain(cells));
        }
    }
    Ok(Section { name: "memory", text: table.text(), document: json!(document) })
}

fn channels(checkpoint: &Checkpoint) -> Section {
    let mut table = Table::new(&["NODE", "FROM", "NODE", "TO", ">WRITTEN", ">RECEIVED", ">IN FLIGHT"]);
    let nodes = &checkpoint.manifest.nodes;
    let name = |node: u32| nodes.get(node as usize).map_or("?".to_owned(), |node| node.name.clone());
    let mut document = Vec::new();
    for channel in &checkpoint.manifest.channels {
        for (from, to) in [(0, 1), (1, 0)] {
            let (sender, receiver) = (&channel.ends[from], &channel.ends[to]);
            table.row([
                name(sender.node),
                sender.position.local.to_string(),
                name(receiver.node),
                receiver.position.local.to_string(),
                sender.position.send_end.to_string(),
                receiver.position.receive_next.to_string(),
                bytes(channel.in_flight(from).into()),
            ]);
        }
        document.push(json!({
            "ends": channel.ends,
            "in_flight": [channel.in_flight(0), channel.in_flight(1)],
            "whole": channel.check().is_ok(),
        }));
    }
    Section { name: "channels", text: table.text(), document: json!(document) }
}

fn phases(checkpoint: &Checkpoint) -> Section {
    let mut table = Table::new(&["PHASE", ">TOOK"]);
    for phase in &checkpoint.manifest.phases {
        table.row([phase.phase.clone(), duration(Duration::from_micros(phase.us))]);
    }
    Section { name: "phases", text: table.text(), document: json!(checkpoint.manifest.phases) }
}

/// What the nodes tell about the saving: times, and bytes by process. Empty where they tell nothing.
fn saving(checkpoint: &Checkpoint) -> Section {
    let nodes = &checkpoint.manifest.nodes;
    let mut tables = Vec::new();
    if nodes.iter().any(|node| !node.times.is_empty()) {
        let mut table = Table::new(&["NODE", "PHASE", ">TOOK"]);
        for (node, time) in nodes.iter().flat_map(|node| node.times.iter().map(move |time| (node, time))) {
            table.row([node.name.clone(), time.phase.clone(), duration(Duration::from_micros(time.us))]);
        }
        tables.push(table.text());
    }
    if nodes.iter().any(|node| !node.memory.is_empty()) {
        let columns =
            ["NODE", ">PID", ">RESIDENT", ">MODIFIED", ">BEFORE CUT", ">IN CUT", ">BEFORE WRITE", "SINCE"];
        let mut table = Table::new(&columns);
        for (node, memory) in
            nodes.iter().flat_map(|node| node.memory.iter().map(move |memory| (node, memory)))
        {
            table.row([
                node.name.clone(),
                memory.pid.to_string(),
                bytes(memory.resident_bytes),
                bytes(memory.modified_bytes),
                bytes(memory.presaved_bytes),
                bytes(memory.cut_bytes),
                bytes(memory.copied_before_write_bytes),
                node.base.as_ref().map_or("-".to_owned(), |base| base.name.clone()),
            ]);
        }
        tables.push(table.text());
    }
    let document = |node: &NodePart| {
        json!({
            "node": node.name,
            "base": node.base,
            "times": node.times,
            "memory": node.memory,
            "inherited_bytes": node.part.inherited_pages * PAGE_SIZE as u64,
            "shared_bytes": node.part.shared_pages * PAGE_SIZE as u64,
        })
    };
    let document = json!(nodes.iter().map(document).collect::<Vec<_>>());
    Section { name: "saving", text: tables.join("\n"), document }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use ckpt_common::image::{
        Digest,
        manifest::{
            BaseRef, Channel, ChannelEnd, DumpRecord, Manifest, NodeAddress, PackRef, PartRef, PhaseTime,
            ProcessMemory, ProcessSummary,
        },
        tcp::Position,
    };

    /// A checkpoint of two nodes.
    pub(crate) fn sample() -> Checkpoint {
        let node = |name: &str, address: &str, pid| NodePart {
            name: name.into(),
            kernel: "6.18.1".into(),
            part: PartRef {
                id: Digest([1; 32]),
                bytes: 40 << 10,
                packs: vec![PackRef { id: Digest([2; 32]), bytes: 12 << 20 }],
                records: 40,
                data_pages: 10_000,
                zero_pages: 500,
                ..Default::default()
            },
            addresses: vec![NodeAddress { interface: "eth0".into(), address: address.parse().unwrap() }],
            processes: vec![ProcessSummary {
                pid,
                ppid: 0,
                name: "redis-server".into(),
                cmdline: vec!["redis-server".into(), "*:6379".into()],
                threads: 5,
                rss: 40 << 20,
            }],
            ..Default::default()
        };
        let address = |text: &str| text.parse::<std::net::SocketAddr>().unwrap().into();
        let end = |node, local: &str, peer: &str, send_end, receive_next| ChannelEnd {
            node,
            position: Position {
                local: address(local),
                peer: address(peer),
                send_start: send_end - 100,
                send_end,
                receive_next,
                window_end: receive_next,
                finished: false,
                peer_finished: false,
            },
        };
        let phase = |phase: &str, us| PhaseTime { phase: phase.into(), us };
        let manifest = Manifest {
            job: "shop".into(),
            number: 3,
            created: 1_795_454_591,
            ckpt_version: "0.1.0".into(),
            options: DumpRecord {
                selector: "--job shop".into(),
                stop: true,
                compress: "1".into(),
                files: "content".into(),
                allow: vec!["outside-tcp".into()],
            },
            nodes: vec![node("node1", "10.0.0.1", 4242), node("node2", "10.0.0.2", 77)],
            channels: vec![Channel {
                ends: [
                    end(0, "10.0.0.1:6379", "10.0.0.2:40000", 5_000, 900),
                    end(1, "10.0.0.2:40000", "10.0.0.1:6379", 900, 4_960),
                ],
            }],
            phases: vec![phase("plan", 20_300), phase("cut", 7_100), phase("save", 1_200_000)],
            ..Default::default()
        };
        Checkpoint { id: Digest([0xab; 32]), manifest }
    }

    #[test]
    fn what_a_person_reads() {
        let checkpoint = sample();
        let sections =
            [summary(&checkpoint), processes(&checkpoint), channels(&checkpoint), phases(&checkpoint)];
        let text: Vec<_> = sections.iter().map(|section| section.text.as_str()).collect();
        insta::assert_snapshot!(text.join("\n"));
    }

    #[test]
    fn how_memory_was_saved() {
        let mut checkpoint = sample();
        assert_eq!(saving(&checkpoint).text, "");
        let node = &mut checkpoint.manifest.nodes[0];
        node.base = Some(BaseRef { name: "shop@2".into(), id: Digest([3; 32]) });
        node.times = vec![PhaseTime { phase: "pre-save".into(), us: 81_000 }];
        node.memory = vec![ProcessMemory {
            pid: 4242,
            resident_bytes: 40 << 20,
            modified_bytes: 5 << 20,
            presaved_bytes: 9 << 20,
            cut_bytes: 80 << 10,
            copied_before_write_bytes: 4 << 10,
        }];
        node.part.inherited_pages = 9_000;
        assert!(summary(&checkpoint).text.contains("12.0 MiB stored since shop@2, Linux"));
        let section = saving(&checkpoint);
        insta::assert_snapshot!(format!("{}\n{}", section.text, section.document));
    }

    #[test]
    fn long_and_strange_command_lines_stay_on_a_line() {
        assert_eq!(shortened("a\nb\u{1b}[31m", 60), "a b [31m");
        assert_eq!(shortened("ääää", 2), "ää...");
    }
}
