//! Before anything is made: what stands in the way of the restore on this node.

use super::{Options, Pids};
use crate::objects::{self, path_file, sysv};
use crate::tracee::proc;
use anyhow::Result;
use ckpt_common::image::Kind;
use ckpt_common::image::file::OpenFile;
use ckpt_common::image::objects::{FileRestore, PathFile};
use ckpt_common::image::process::Process;
use std::collections::{BTreeSet, HashSet};
use std::time::{Duration, Instant};

/// How long zombies with a PID of the job are waited for.
const REAPING: Duration = Duration::from_secs(5);

/// Something that must be put right before the restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// PID and name of the process, where it concerns one.
    pub pid: Option<i32>,
    /// What it is.
    pub what: String,
    /// Why it stands in the way.
    pub reason: String,
}

/// Lists the obstacles, and decides whether the job gets a PID namespace of its own.
pub(super) fn plan(
    processes: &[Process],
    files: &[OpenFile],
    options: &Options,
) -> Result<(Vec<Obstacle>, bool)> {
    let mut obstacles = Vec::new();
    let namespace = match options.pids {
        Pids::Namespace => true,
        Pids::Same | Pids::Auto => {
            let taken = taken(processes);
            let segments = segments(files)?;
            let free = taken.is_empty() && segments.is_empty();
            if options.pids == Pids::Same {
                for pid in &taken {
                    obstacles.push(Obstacle {
                        pid: Some(*pid),
                        what: format!("PID {pid}"),
                        reason: "it is in use on this node; use --pids namespace".into(),
                    });
                }
                obstacles.extend(segments);
            }
            !free && options.pids == Pids::Auto
        }
    };
    let here = crate::sys::cpu::xstate_features();
    for process in processes {
        let missing = process.threads.iter().map(|t| features(&t.xstate)).fold(0, |a, b| a | b) & !here;
        if missing != 0 {
            obstacles.push(Obstacle {
                pid: Some(process.pid),
                what: "CPU".into(),
                reason: format!(
                    "the process uses register sets that this CPU does not have (XCR0 bits {missing:#x})"
                ),
            });
        }
        for (what, path) in [("working directory", &process.cwd), ("root directory", &process.root)] {
            if process.zombie.is_none() && !std::path::Path::new(path).is_dir() {
                let reason = format!("{path} is not a directory on this node");
                obstacles.push(Obstacle { pid: Some(process.pid), what: what.into(), reason });
            }
        }
    }
    let mut paths = Vec::new();
    for file in files.iter().filter(|f| f.kind == PathFile::KIND) {
        paths.push(objects::decode::<PathFile>(file.version, &file.payload)?);
    }
    // What one description rewrites, another may read.
    let rewritten: HashSet<u64> = paths
        .iter()
        .filter(|f| matches!(f.restore, FileRestore::Content(_) | FileRestore::Length))
        .map(|f| f.inode)
        .collect();
    let mut seen = HashSet::new();
    for file in &paths {
        if file.restore == FileRestore::Unchanged && rewritten.contains(&file.inode) {
            continue;
        }
        if let Some(reason) = path_file::obstacle(file)
            && seen.insert(file.path.clone())
        {
            obstacles.push(Obstacle { pid: None, what: format!("file {}", file.path), reason });
        }
    }
    Ok((obstacles, namespace))
}

/// System V segments of the job whose id or key is in use here.
fn segments(files: &[OpenFile]) -> Result<Vec<Obstacle>> {
    let (segments, others) = (sysv::records(files)?, sysv::list()?);
    let found = segments.iter().filter_map(|segment| sysv::obstacle(segment, &others));
    Ok(found.map(|(what, reason)| Obstacle { pid: None, what, reason }).collect())
}

/// PIDs and TIDs that the processes have to get.
pub(super) fn numbers(processes: &[Process]) -> BTreeSet<i32> {
    let wanted = processes.iter().filter(|p| p.zombie.is_none() || p.ppid != 0);
    wanted.flat_map(|p| p.threads.iter().map(|t| t.tid).chain([p.pid])).collect()
}

/// PIDs and TIDs of the job that are in use here.
fn taken(processes: &[Process]) -> Vec<i32> {
    let wanted = numbers(processes);
    let start = Instant::now();
    loop {
        let (dead, alive): (Vec<i32>, Vec<i32>) = wanted
            .iter()
            .copied()
            .filter(|tid| std::path::Path::new(&format!("/proc/{tid}")).exists())
            .partition(|tid| proc::state(*tid).is_none_or(|state| state == 'Z'));
        // A process that was just killed is there until its parent has seen it.
        if dead.is_empty() || start.elapsed() > REAPING {
            return [alive, dead].concat();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// XSTATE_BV of a saved area: the components that are not in their initial state.
fn features(xstate: &[u8]) -> u64 {
    xstate.get(512..520).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
}
