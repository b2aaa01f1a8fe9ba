//! Which segments of System V shared memory belong to the job: those that it has attached, and those that it has made
//! and nobody has attached.

use super::plan;
use crate::objects::sysv::{self, Listed};
use crate::tracee::proc;
use anyhow::{Context as _, Result};
use procfs::Current as _;
use procfs::process::Process as Proc;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::SystemTime;

/// How far the clocks that a segment's age and a process's age come from may be apart, in seconds.
const CLOCKS: u64 = 2;

/// Ids of segments that processes of the job have made.
///
/// A segment outlives its creator, whose PID may be another's by now: what was made before a process began is not its.
pub(super) fn made_by(listed: &[Listed], job: &HashSet<i32>) -> Result<BTreeSet<i32>> {
    let mut made = BTreeSet::new();
    for segment in listed.iter().filter(|segment| job.contains(&segment.creator_pid)) {
        let Ok(stat) = Proc::new(segment.creator_pid).and_then(|p| p.stat()) else { continue };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).context("reading the clock")?;
        let up = procfs::Uptime::current().context("reading the time since the boot")?.uptime;
        let age = (up - stat.starttime as f64 / procfs::ticks_per_second() as f64).max(0.0);
        if segment.changed + CLOCKS >= now.as_secs().saturating_sub(age as u64) {
            made.insert(segment.id);
        }
    }
    Ok(made)
}

/// Segments of the job that processes outside have attached, too: one of the job's processes, the segment, and why it
/// stands in the way. `attached` are those that the job has attached, each with a process.
pub(super) fn leading_out(
    attached: &mut BTreeMap<i32, i32>,
    job: &HashSet<i32>,
) -> Result<Vec<(i32, String, String)>> {
    let listed = sysv::list()?;
    let made = made_by(&listed, job)?;
    for segment in listed.iter().filter(|segment| made.contains(&segment.id)) {
        attached.entry(segment.id).or_insert(segment.creator_pid);
    }
    if attached.is_empty() {
        return Ok(Vec::new());
    }
    let mut outside: BTreeMap<i32, i32> = BTreeMap::new();
    for process in procfs::process::all_processes().into_iter().flatten().flatten() {
        if job.contains(&process.pid) || process.pid == std::process::id() as i32 {
            continue;
        }
        let maps = proc::maps(process.pid).unwrap_or_default();
        let mut ids =
            maps.iter().filter_map(proc::Map::segment).filter(|id| attached.contains_key(id)).peekable();
        // Another IPC namespace has the same ids, and means other segments.
        if ids.peek().is_some() && same_namespace(process.pid) && !plan::descends(process.pid, job) {
            outside.extend(ids.map(|id| (id, process.pid)));
        }
    }
    let found = listed.iter().filter_map(|segment| {
        let (pid, other) = (attached.get(&segment.id)?, outside.get(&segment.id)?);
        let name = Proc::new(*other).and_then(|p| p.stat()).map(|stat| stat.comm).unwrap_or_default();
        let reason = format!("it leads out of the job: process {other} ({name}) has it attached, too");
        Some((*pid, segment.name(), reason))
    });
    Ok(found.collect())
}

/// Is the process in our IPC namespace?
fn same_namespace(pid: i32) -> bool {
    let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/ipc")).ok();
    of(&pid.to_string()) == of("self")
}
