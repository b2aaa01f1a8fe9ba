//! From a selector to the processes of this node.

use super::{JobError, MARK, scheduler};
use ckpt_common::wire::Selector;
use procfs::process::{Process, all_processes};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Processes of this node that belong to the job, descendants included, in ascending order. Empty
/// where the job is not on this node; ckpt itself and what started it are never part of it.
///
/// # Errors
/// [`JobError::NoProcess`] where a process or control group was named that does not exist.
pub fn find(selector: &Selector) -> Result<Vec<i32>, JobError> {
    let parents = parents();
    let roots: BTreeSet<i32> = match selector {
        Selector::Job(id) => parents.keys().copied().filter(|&pid| is_marked(pid, id)).collect(),
        Selector::Pids(pids) => {
            if let Some(pid) = pids.iter().find(|pid| !parents.contains_key(pid)) {
                return Err(JobError::NoProcess(format!("there is no process {pid} on this node")));
            }
            pids.iter().copied().collect()
        }
        Selector::Cgroup(path) => in_cgroup(path)?,
    };
    let mut all = with_descendants(&roots, &parents);
    if matches!(selector, Selector::Job(_)) {
        // `ckpt dump` may well be started from a shell that carries the mark.
        for pid in ancestors(std::process::id() as i32, &parents) {
            all.remove(&pid);
        }
    }
    Ok(all.into_iter().collect())
}

/// Runs the process, or can it again? A zombie cannot, nor one that is just going (`Z` and `X`, proc_pid_stat(5)).
pub fn is_alive(pid: i32) -> bool {
    Process::new(pid).and_then(|process| process.stat()).is_ok_and(|stat| !matches!(stat.state, 'Z' | 'X'))
}

/// Parent of every process that can be seen.
fn parents() -> BTreeMap<i32, i32> {
    let stats = all_processes().into_iter().flatten().flatten().filter_map(|process| process.stat().ok());
    stats.map(|stat| (stat.pid, stat.ppid)).collect()
}

fn with_descendants(roots: &BTreeSet<i32>, parents: &BTreeMap<i32, i32>) -> BTreeSet<i32> {
    let belongs = |pid: &i32| ancestors(*pid, parents).iter().any(|pid| roots.contains(pid));
    parents.keys().copied().filter(belongs).collect()
}

/// The process and its ancestors.
fn ancestors(pid: i32, parents: &BTreeMap<i32, i32>) -> Vec<i32> {
    let mut all = vec![pid];
    let mut pid = pid;
    while let Some(&parent) = parents.get(&pid) {
        // A PID that was reused between two reads could close a circle.
        if parent == 0 || all.contains(&parent) {
            break;
        }
        all.push(parent);
        pid = parent;
    }
    all
}

/// Does the environment that the process was started with carry the job's mark?
fn is_marked(pid: i32, id: &str) -> bool {
    let Ok(environment) = Process::new(pid).and_then(|process| process.environ()) else { return false };
    let has = |name: &str| environment.get(std::ffi::OsStr::new(name)).is_some_and(|value| value == id);
    has(MARK) || scheduler::MARKS.into_iter().any(has)
}

/// Processes in a control group and those below it. A path that is not absolute, or not there, is
/// looked for below where cgroup file systems are mounted.
fn in_cgroup(path: &str) -> Result<BTreeSet<i32>, JobError> {
    let missing = || JobError::NoProcess(format!("there is no control group {path} on this node"));
    let directory = cgroup_directory(path).ok_or_else(missing)?;
    let (mut pids, mut todo) = (BTreeSet::new(), vec![directory]);
    while let Some(directory) = todo.pop() {
        let procs = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        pids.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()));
        let below = fs::read_dir(&directory).into_iter().flatten().flatten();
        todo.extend(
            below.filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir())).map(|entry| entry.path()),
        );
    }
    Ok(pids)
}

fn cgroup_directory(path: &str) -> Option<PathBuf> {
    let is_cgroup = |path: &Path| path.join("cgroup.procs").is_file();
    let absolute = Path::new(path);
    if absolute.is_absolute() && is_cgroup(absolute) {
        return Some(absolute.to_owned());
    }
    let relative = path.trim_start_matches('/');
    let mounts = procfs::process::Process::myself().and_then(|process| process.mountinfo()).ok()?;
    let cgroups = mounts.into_iter().filter(|mount| mount.fs_type == "cgroup2" || mount.fs_type == "cgroup");
    cgroups.map(|mount| mount.mount_point.join(relative)).find(|path| is_cgroup(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    struct Running(Child);

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn pid(child: &Running) -> i32 {
        child.0.id() as i32
    }

    /// Waits until the shell has started its child and the child has become what it will be.
    fn settle(child: &Running, selector: &Selector, expected: usize) -> Vec<i32> {
        for _ in 0..500 {
            let found = find(selector).unwrap();
            if found.len() == expected && found.contains(&pid(child)) {
                return found;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        panic!("{selector:?} found {:?}", find(selector));
    }

    #[test]
    fn marks_and_descendants() {
        let id = format!("test-{}", std::process::id());
        let script = "unset CKPT_JOB; env -u CKPT_JOB sleep 100 & wait";
        let child = Command::new("sh").args(["-c", script]).env(MARK, &id).spawn().unwrap();
        let child = Running(child);
        let found = settle(&child, &Selector::Job(id), 2);
        let by_pid = find(&Selector::Pids(vec![pid(&child)])).unwrap();
        assert_eq!(by_pid, found);
        // The shell's own child outlives it otherwise.
        for pid in found {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
        }
    }

    #[test]
    fn schedulers_mark_too() {
        let id = format!("{}", 4_000_000_000u64 + u64::from(std::process::id()));
        let child = Running(Command::new("sleep").arg("100").env("SLURM_JOB_ID", &id).spawn().unwrap());
        settle(&child, &Selector::Job(id), 1);
    }

    #[test]
    fn what_does_not_exist_is_named() {
        assert_eq!(find(&Selector::Job("no such job".into())), Ok(Vec::new()));
        let error = find(&Selector::Pids(vec![i32::MAX])).unwrap_err().to_string();
        assert_eq!(error, "there is no process 2147483647 on this node");
        let error = find(&Selector::Cgroup("/no/such".into())).unwrap_err().to_string();
        assert_eq!(error, "there is no control group /no/such on this node");
    }

    #[test]
    fn circles_end() {
        let parents = BTreeMap::from([(5, 6), (6, 5), (7, 5)]);
        assert_eq!(with_descendants(&BTreeSet::from([6]), &parents), BTreeSet::from([5, 6, 7]));
    }
}
