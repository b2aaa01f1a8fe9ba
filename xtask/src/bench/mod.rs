//! `bench`: what ckpt costs, as times and as ratios to what the machine itself takes. Nothing here passes or fails by
//! its time.

mod dump;
mod growth;
mod memory;
mod program;
mod report;
mod restore;
mod snapshot;
mod throughput;

pub(crate) use dump::dump;
pub(crate) use memory::{Options as MemoryOptions, memory};

use crate::cluster::target;
use crate::command::{as_root, cargo, output, repository, run, shown};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Folders of runs, behind it the PID.
const FOLDER: &str = "bench-";

/// A folder for store and workloads. It is removed with this value.
struct Bench {
    folder: PathBuf,
}

impl Bench {
    /// Builds the release binary and a program of `xtask/workloads`.
    fn new(source: &str) -> Result<Self> {
        run(cargo().args(["build", "--release", "--package", "ckpt-cli"]))?;
        sweep();
        let folder = target().join(format!("{FOLDER}{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let bench = Self { folder };
        let source = repository().join("xtask/workloads").join(source);
        run(Command::new("cc").args(["-O2", "-pthread", "-o"]).arg(bench.program()).arg(source))?;
        Ok(bench)
    }

    fn program(&self) -> PathBuf {
        self.folder.join("workload")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Runs `ckpt --json`; gives its document and the time it took.
    fn ckpt(&self, arguments: &[&str]) -> Result<(Value, Duration)> {
        self.ckpt_with_warnings(arguments).map(|(document, took, _)| (document, took))
    }

    /// The same, and what it wrote to standard error.
    fn ckpt_with_warnings(&self, arguments: &[&str]) -> Result<(Value, Duration, String)> {
        let mut command =
            as_root(target().join("release/ckpt").to_str().context("path of the build folder")?);
        command.arg("--json").arg("--store").arg(self.folder.join("store")).args(arguments);
        let start = Instant::now();
        let output = command.stdin(Stdio::null()).output().context("cannot start ckpt")?;
        let took = start.elapsed();
        let warnings = String::from_utf8_lossy(&output.stderr).into_owned();
        let document = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "{}: {}\n{document}{warnings}", shown(&command), output.status);
        Ok((serde_json::from_slice(&output.stdout).context("output of ckpt")?, took, warnings))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // The store belongs to root. What cannot be removed stays in the build folder.
        let _ = output(as_root("rm").arg("-rf").arg(&self.folder));
    }
}

/// Removes what runs left that were killed.
fn sweep() {
    for entry in fs::read_dir(target()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(FOLDER)?.parse().ok());
        if pid.is_some_and(|pid| !is_there(pid)) {
            let _ = output(as_root("rm").arg("-rf").arg(entry.path()));
        }
    }
}

/// A running workload, the leader of a session of its own. It ends with this value.
struct Job {
    pid: u32,
}

impl Job {
    /// Starts `program ARGUMENTS READY-FILE MORE` and waits for the file.
    fn start(bench: &Bench, arguments: &[String], ready: &Path, more: &[&Path]) -> Result<Self> {
        let mut command = Command::new("setsid");
        command.arg(bench.program()).args(arguments).arg(ready).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        let mut child = command.spawn().context("cannot start a workload")?;
        let job = Self { pid: child.id() };
        // Reaped whenever it ends: its PID must be free for the restored process.
        std::thread::spawn(move || child.wait());
        wait("the workload is ready", || ready.exists())?;
        Ok(job)
    }

    fn is_there(&self) -> bool {
        is_there(self.pid.into())
    }

    fn gone(&mut self) -> Result<()> {
        wait("the workload has ended", || !self.is_there())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = output(as_root("kill").args(["-9", "--", &format!("-{}", self.pid)]));
    }
}

fn is_there(pid: u64) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

/// Waits for a minute at most.
fn wait(what: &str, condition: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        ensure!(Instant::now() < deadline, "waited for a minute until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn median<T: PartialOrd + Copy>(values: impl IntoIterator<Item = T>) -> T {
    let mut values: Vec<T> = values.into_iter().collect();
    values.sort_unstable_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    values[values.len() / 2]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Runs a command; gives the time it took.
fn timed(command: &mut Command) -> Result<Duration> {
    let start = Instant::now();
    output(command.stdin(Stdio::null()))?;
    Ok(start.elapsed())
}
