//! `ckpt diff`: what changed between two checkpoints.

use super::{Global, show::shortened};
use crate::{
    objects,
    store::{Object, PageDiff, PartReader, Store, compare_pages, stored_anew},
    ui::{Failed, Table, Ui, bytes, plural},
};
use ckpt_common::image::{
    MemoryId, PAGE_SIZE,
    file::OpenFile,
    manifest::Checkpoint,
    objects::{FileRestore, MemoryFile, PathFile, SysvMemory},
    process::{Backing, Process},
};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Show what changed between two checkpoints
///
/// Processes are matched by node and PID, or by PID where they are on another node now; shared
/// memory and files by name.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// JOB@N, JOB (the latest), or the first digits of an id
    #[arg(value_name = "OLD")]
    old: String,
    /// The same, for the other one
    #[arg(value_name = "NEW")]
    new: String,
}

pub(super) fn run(arguments: &Arguments, global: &Global, ui: &Ui) -> Result<(), Failed> {
    let store = Store::open(&global.store)?;
    let _hold = store.hold()?;
    let (old, new) = (store.resolve(&arguments.old)?, store.resolve(&arguments.new)?);
    let difference = compare(&Side::open(&store, &old)?, &Side::open(&store, &new)?)?;
    ui.result(&text(&old, &new, &difference), &document(&old, &new, &difference))
}

/// A process, or something else that has pages.
struct Thing {
    node: String,
    /// PID; 0 for other things.
    pid: i32,
    name: String,
    /// Its part's number, and its memory there.
    memory: Option<(usize, MemoryId)>,
    mappings: BTreeSet<String>,
    descriptors: BTreeSet<String>,
}

/// One of the two checkpoints.
struct Side {
    parts: Vec<PartReader>,
    things: Vec<Thing>,
}

impl Side {
    fn open(store: &Store, checkpoint: &Checkpoint) -> Result<Self, Failed> {
        let mut side = Self { parts: Vec::new(), things: Vec::new() };
        for node in &checkpoint.manifest.nodes {
            let part = store.open_part(&node.part)?;
            let things = things(&node.name, side.parts.len(), &part)?;
            side.things.extend(things);
            side.parts.push(part);
        }
        Ok(side)
    }

    fn object(&self, thing: Option<&Thing>) -> Option<Object<'_>> {
        thing.and_then(|thing| thing.memory).map(|(part, id)| (&self.parts[part], id))
    }
}

/// Processes of a part, then its shared memory and files.
fn things(node: &str, number: usize, part: &PartReader) -> Result<Vec<Thing>, Failed> {
    let files = part.read::<OpenFile>()?;
    let by_id: BTreeMap<_, _> = files.iter().map(|file| (file.id, file)).collect();
    let label = |id| by_id.get(&id).map_or("?", |file| file.label.as_str());
    let mut things = Vec::new();
    for process in part.read::<Process>()? {
        let mappings = process.mm.mappings.iter().map(|mapping| {
            let access = [(1, 'r'), (2, 'w'), (4, 'x')]
                .map(|(bit, letter)| if mapping.prot & bit != 0 { letter } else { '-' });
            let (sharing, what) = match &mapping.backing {
                Backing::Anonymous => ('p', String::new()),
                Backing::PrivateFile { file, offset } => ('p', format!("{} at {offset:#x}", label(*file))),
                Backing::SharedFile { file, offset } => ('s', format!("{} at {offset:#x}", label(*file))),
                Backing::Kernel { name } => ('p', name.clone()),
            };
            let access = String::from_iter(access);
            let text = format!("{:x}-{:x} {access}{sharing} {what}", mapping.start, mapping.end);
            text.trim_end().to_owned()
        });
        let descriptors = process.fds.iter().map(|entry| {
            let kind = by_id.get(&entry.file).map_or("?", |file| file.kind.as_str());
            format!("{} {kind} {}", entry.fd, label(entry.file))
        });
        things.push(Thing {
            node: node.to_owned(),
            pid: process.pid,
            name: process.threads.first().map_or_else(String::new, |thread| thread.comm.clone()),
            memory: process.zombie.is_none().then_some((number, process.mm.memory)),
            mappings: mappings.collect(),
            descriptors: descriptors.collect(),
        });
    }
    let mut seen = BTreeSet::new();
    for file in &files {
        let Some(id) = content(file).filter(|id| seen.insert(*id)) else { continue };
        things.push(Thing {
            node: node.to_owned(),
            pid: 0,
            name: file.label.clone(),
            memory: Some((number, id)),
            mappings: BTreeSet::new(),
            descriptors: BTreeSet::new(),
        });
    }
    Ok(things)
}

/// Memory object with the content of a file. One that this version cannot read has none to show.
fn content(file: &OpenFile) -> Option<MemoryId> {
    match file.kind.as_str() {
        "sysv-memory" => Some(objects::decode::<SysvMemory>(file.version, &file.payload).ok()?.content),
        "memory-file" => Some(objects::decode::<MemoryFile>(file.version, &file.payload).ok()?.content),
        "path-file" => match objects::decode::<PathFile>(file.version, &file.payload).ok()?.restore {
            FileRestore::Content(id) => Some(id),
            _ => None,
        },
        _ => None,
    }
}

/// What has become of a thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Stayed,
    Appeared,
    Gone,
}

#[derive(Debug)]
struct Change {
    node: String,
    pid: i32,
    name: String,
    fate: Fate,
    pages: PageDiff,
    /// With `+` or `-` in front.
    mappings: Vec<(char, String)>,
    descriptors: Vec<(char, String)>,
}

#[derive(Debug, Default)]
struct Difference {
    changes: Vec<Change>,
    /// Bytes of chunks that only the second uses.
    stored: u64,
}

fn compare(old: &Side, new: &Side) -> Result<Difference, Failed> {
    let mut difference = Difference::default();
    for (old_thing, new_thing) in pairs(&old.things, &new.things) {
        let Some(thing) = new_thing.or(old_thing) else { continue };
        let fate = match (old_thing, new_thing) {
            (None, _) => Fate::Appeared,
            (_, None) => Fate::Gone,
            _ => Fate::Stayed,
        };
        let pages = compare_pages(old.object(old_thing), new.object(new_thing))?;
        let (mappings, descriptors) = match (old_thing, new_thing) {
            (Some(old), Some(new)) => {
                (delta(&old.mappings, &new.mappings), delta(&old.descriptors, &new.descriptors))
            }
            // All of them: that says nothing.
            _ => Default::default(),
        };
        let (node, name) = (thing.node.clone(), thing.name.clone());
        difference.changes.push(Change { node, pid: thing.pid, name, fate, pages, mappings, descriptors });
    }
    let [old, new] = [old, new].map(|side| side.parts.iter().collect::<Vec<_>>());
    difference.stored = stored_anew(&old, &new)?;
    Ok(difference)
}

/// Which belong together: first those on the same node, then those that are left.
fn pairs<'a>(old: &'a [Thing], new: &'a [Thing]) -> Vec<(Option<&'a Thing>, Option<&'a Thing>)> {
    let mut partners: Vec<Option<usize>> = vec![None; new.len()];
    let mut taken = vec![false; old.len()];
    for same_node in [true, false] {
        for (thing, partner) in new.iter().zip(&mut partners).filter(|(_, partner)| partner.is_none()) {
            let fits = |candidate: &Thing| {
                let same = candidate.pid == thing.pid && (thing.pid != 0 || candidate.name == thing.name);
                same && (!same_node || candidate.node == thing.node)
            };
            let found = (0..old.len()).find(|&index| !taken[index] && fits(&old[index]));
            if let Some(index) = found {
                taken[index] = true;
                *partner = Some(index);
            }
        }
    }
    let mut pairs: Vec<_> = new
        .iter()
        .zip(&partners)
        .map(|(thing, partner)| (partner.map(|index| &old[index]), Some(thing)))
        .collect();
    pairs.extend(old.iter().zip(taken).filter(|(_, taken)| !taken).map(|(thing, _)| (Some(thing), None)));
    pairs
}

fn delta(old: &BTreeSet<String>, new: &BTreeSet<String>) -> Vec<(char, String)> {
    let gone = old.difference(new).map(|text| ('-', text.clone()));
    gone.chain(new.difference(old).map(|text| ('+', text.clone()))).collect()
}

fn size(pages: u64) -> String {
    bytes(pages * PAGE_SIZE as u64)
}

fn text(old: &Checkpoint, new: &Checkpoint, difference: &Difference) -> String {
    let count =
        |fate| difference.changes.iter().filter(|change| change.pid != 0 && change.fate == fate).count();
    let mut text = format!(
        "{} -> {}: {} in both, {} appeared, {} gone; {} stored anew\n\n",
        old.name(),
        new.name(),
        plural(count(Fate::Stayed), "process"),
        count(Fate::Appeared),
        count(Fate::Gone),
        bytes(difference.stored),
    );
    let mut table = Table::new(&[
        "NODE",
        ">PID",
        "NAME",
        ">CHANGED",
        ">ADDED",
        ">REMOVED",
        ">SAME",
        ">MAPPINGS",
        ">FDS",
        "",
    ]);
    let signs = |list: &[(char, String)]| {
        let count = |sign| list.iter().filter(|(found, _)| *found == sign).count();
        format!("+{} -{}", count('+'), count('-'))
    };
    for change in &difference.changes {
        let fate = match change.fate {
            Fate::Stayed => "",
            Fate::Appeared => "appeared",
            Fate::Gone => "gone",
        };
        let process = change.pid != 0;
        table.row([
            change.node.clone(),
            if process { change.pid.to_string() } else { "-".into() },
            shortened(&change.name, 40),
            size(change.pages.changed),
            size(change.pages.added),
            size(change.pages.removed),
            size(change.pages.same),
            if process { signs(&change.mappings) } else { "-".into() },
            if process { signs(&change.descriptors) } else { "-".into() },
            fate.to_owned(),
        ]);
    }
    text.push_str(&table.text());
    for change in &difference.changes {
        if change.mappings.is_empty() && change.descriptors.is_empty() {
            continue;
        }
        text.push_str(&format!(
            "\nprocess {} ({}) on {}\n",
            change.pid,
            shortened(&change.name, 40),
            change.node
        ));
        let lines = |what: &str, list: &[(char, String)]| -> String {
            list.iter().map(|(sign, line)| format!("  {sign} {what} {}\n", shortened(line, 120))).collect()
        };
        text.push_str(&lines("mapping", &change.mappings));
        text.push_str(&lines("fd", &change.descriptors));
    }
    text
}

fn document(old: &Checkpoint, new: &Checkpoint, difference: &Difference) -> Value {
    let side = |list: &[(char, String)], sign: char| -> Vec<String> {
        list.iter().filter(|(found, _)| *found == sign).map(|(_, text)| text.clone()).collect()
    };
    let change = |change: &Change| {
        let PageDiff { added, removed, changed, same } = change.pages;
        let fate = match change.fate {
            Fate::Stayed => "stayed",
            Fate::Appeared => "appeared",
            Fate::Gone => "gone",
        };
        let mut value = json!({
            "node": change.node,
            "name": change.name,
            "fate": fate,
            "pages": {"changed": changed, "added": added, "removed": removed, "same": same},
        });
        if change.pid != 0 {
            value["pid"] = json!(change.pid);
            for (name, list) in [("mappings", &change.mappings), ("fds", &change.descriptors)] {
                value[name] = json!({"added": side(list, '+'), "removed": side(list, '-')});
            }
        }
        value
    };
    let some = |processes: bool| -> Vec<_> {
        difference.changes.iter().filter(|change| (change.pid != 0) == processes).map(change).collect()
    };
    json!({
        "type": "diff",
        "old": {"checkpoint": old.name(), "id": old.id},
        "new": {"checkpoint": new.name(), "id": new.id},
        "stored_anew_bytes": difference.stored,
        "page_bytes": PAGE_SIZE,
        "processes": some(true),
        "objects": some(false),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::show::tests::sample;

    fn thing(node: &str, pid: i32, name: &str) -> Thing {
        let (node, name) = (node.to_owned(), name.to_owned());
        let (mappings, descriptors) = Default::default();
        Thing { node, pid, name, memory: None, mappings, descriptors }
    }

    #[test]
    fn who_belongs_to_whom() {
        let old =
            [thing("n1", 7, "a"), thing("n1", 8, "b"), thing("n2", 7, "c"), thing("n1", 0, "/dev/shm/x")];
        let new =
            [thing("n2", 7, "c"), thing("n3", 8, "b"), thing("n1", 0, "/dev/shm/y"), thing("n3", 9, "d")];
        let pairs: Vec<_> = pairs(&old, &new)
            .into_iter()
            .map(|(old, new)| [old, new].map(|thing| thing.map_or("", |thing| thing.name.as_str())))
            .collect();
        let wanted = [["c", "c"], ["b", "b"], ["", "/dev/shm/y"], ["", "d"], ["a", ""], ["/dev/shm/x", ""]];
        assert_eq!(pairs, wanted);
    }

    #[test]
    fn what_a_person_reads() {
        let change = |pid, name: &str, fate, changed| Change {
            node: "node1".into(),
            pid,
            name: name.into(),
            fate,
            pages: PageDiff { changed, added: 3, removed: 0, same: 10_000 },
            mappings: Vec::new(),
            descriptors: Vec::new(),
        };
        let mut first = change(4242, "redis-server", Fate::Stayed, 800);
        first.mappings = vec![('-', "1000-2000 rw-p".into()), ('+', "1000-3000 rw-p".into())];
        first.descriptors = vec![('+', "7 pipe pipe:[99]".into())];
        let changes = vec![
            first,
            change(4300, "helper", Fate::Appeared, 0),
            change(0, "/memfd:x (deleted)", Fate::Stayed, 1),
        ];
        let difference = Difference { changes, stored: 3 << 20 };
        let (old, mut new) = (sample(), sample());
        new.manifest.number = 4;
        let text = text(&old, &new, &difference);
        insta::assert_snapshot!(format!("{text}\n{}", document(&old, &new, &difference)));
    }
}
