//! `bench`: what a dump and a restore cost, as times and as ratios to what the machine itself takes.
//! Nothing here passes or fails by its time.

use crate::cluster::target;
use crate::command::{as_root, cargo, output, repository, run};
use crate::setup;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Of each number the median of so many runs is shown.
const RUNS: usize = 3;
/// The large process, in MiB.
const MEMORY: usize = 1024;
/// Kinds of state whose fixed costs are measured, and how much of it.
const FIXED: [(&str, usize); 6] = [
    ("nothing", 0),
    ("threads", 200),
    ("mappings", 5_000),
    ("descriptors", 1_000),
    ("children", 100),
    ("connections", 50),
];

/// The costs of dump and restore.
///
/// # Errors
/// Something cannot be built, dumped or restored.
pub(crate) fn dump() -> Result<()> {
    setup::packages()?;
    run(cargo().args(["build", "--release", "--package", "ckpt-cli"]))?;
    let bench = Bench::new()?;
    let program = bench.program();
    let source = repository().join("xtask/workloads/bench.c");
    run(Command::new("cc").args(["-O2", "-pthread", "-o"]).arg(&program).arg(source))?;

    println!("medians of {RUNS} runs");
    let copy = median((0..RUNS).map(|_| copy(MEMORY << 20)));
    println!("baseline: memcpy of {MEMORY} MiB {}", ms(copy));
    let costs = bench.measure("memory", MEMORY)?;
    let write = bench.write(costs.stored)?;
    println!("baseline: dd of {} MiB with fsync {}", costs.stored >> 20, ms(write));
    let ratio = |time: Duration, to: Duration| time.as_secs_f64() / to.as_secs_f64();
    println!("\na process with {MEMORY} MiB, half of it incompressible");
    println!("  pause    {:>10}  {:.2} x memcpy", ms(costs.pause), ratio(costs.pause, copy));
    println!("  dump     {:>10}  {:.2} x dd of the image", ms(costs.dump), ratio(costs.dump, write));
    println!(
        "  image    {:>6} MiB  {:.2} x its memory",
        costs.stored >> 20,
        costs.stored as f64 / (MEMORY << 20) as f64
    );
    println!("  restore  {:>10}  {:.2} x memcpy", ms(costs.restore), ratio(costs.restore, copy));

    println!(
        "\nfixed costs                  pause            dump         restore   (x: an almost empty process)"
    );
    let mut base: Option<Costs> = None;
    for (kind, count) in FIXED {
        let costs = bench.measure(kind, count)?;
        let base = base.get_or_insert(costs);
        let cell = |time: Duration, to: Duration| format!("{:>10} {:>4.1}x", ms(time), ratio(time, to));
        println!(
            "{:<18} {} {} {}",
            if count == 0 { kind.to_owned() } else { format!("{count} {kind}") },
            cell(costs.pause, base.pause),
            cell(costs.dump, base.dump),
            cell(costs.restore, base.restore),
        );
    }
    Ok(())
}

/// What one kind of process costs.
#[derive(Clone, Copy)]
struct Costs {
    /// Time frozen, of a dump that leaves it running.
    pause: Duration,
    /// Time of the whole command.
    dump: Duration,
    /// Time of the whole command.
    restore: Duration,
    /// Size of the image.
    stored: u64,
}

/// A folder for store and workloads.
struct Bench {
    folder: PathBuf,
}

impl Bench {
    fn new() -> Result<Self> {
        let folder = target().join(format!("bench-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        Ok(Self { folder })
    }

    fn program(&self) -> PathBuf {
        self.folder.join("workload")
    }

    fn measure(&self, kind: &str, count: usize) -> Result<Costs> {
        let mut job = Job::start(self, kind, count)?;
        let (mut pauses, mut dumps, mut restores, mut stored) = (Vec::new(), Vec::new(), Vec::new(), 0);
        let (pid, name) = (job.pid.to_string(), format!("bench-{kind}"));
        for _ in 0..RUNS {
            let (document, took) = self.ckpt(&["dump", "--pid", &pid, "--name", &name])?;
            pauses.push(Duration::from_micros(document["paused_us"].as_u64().context("no pause")?));
            stored = document["stored_bytes"].as_u64().context("no size")?;
            dumps.push(took);
            self.ckpt(&["dump", "--pid", &pid, "--name", &name, "--stop"])?;
            job.gone()?;
            let (_, took) = self.ckpt(&["restore", &name, "--pids", "same"])?;
            restores.push(took);
            ensure!(job.is_there(), "{kind}: the restored process is not there");
        }
        Ok(Costs { pause: median(pauses), dump: median(dumps), restore: median(restores), stored })
    }

    /// Runs `ckpt --json`; gives its document and the time it took.
    fn ckpt(&self, arguments: &[&str]) -> Result<(Value, Duration)> {
        let mut command =
            as_root(target().join("release/ckpt").to_str().context("path of the build folder")?);
        command.arg("--json").arg("--store").arg(self.folder.join("store")).args(arguments);
        let start = Instant::now();
        let text = output(command.stdin(Stdio::null()))?;
        let took = start.elapsed();
        Ok((serde_json::from_str(&text).with_context(|| format!("output of ckpt: {text}"))?, took))
    }

    /// Writing so many bytes next to the store.
    fn write(&self, bytes: u64) -> Result<Duration> {
        let file = self.folder.join("written");
        let mut times = Vec::new();
        for _ in 0..RUNS {
            let start = Instant::now();
            let target = format!("of={}", file.display());
            let count = format!("count={}", bytes >> 20);
            output(Command::new("dd").args(["if=/dev/zero", &target, "bs=1M", &count, "conv=fsync"]))?;
            times.push(start.elapsed());
            fs::remove_file(&file)?;
        }
        Ok(median(times))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // The store belongs to root. What cannot be removed stays in the build folder.
        let _ = output(as_root("rm").arg("-rf").arg(&self.folder));
    }
}

/// A running workload, the leader of a session of its own. It ends with this value.
struct Job {
    pid: u32,
}

impl Job {
    fn start(bench: &Bench, kind: &str, count: usize) -> Result<Self> {
        let ready = bench.folder.join(format!("ready-{kind}"));
        let mut command = Command::new("setsid");
        command.arg(bench.program()).args([kind, &count.to_string()]).arg(&ready);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        let mut child = command.spawn().context("cannot start a workload")?;
        let job = Self { pid: child.id() };
        // Reaped whenever it ends: its PID must be free for the restored process.
        std::thread::spawn(move || child.wait());
        job.wait("is ready", || ready.exists())?;
        Ok(job)
    }

    fn is_there(&self) -> bool {
        Path::new("/proc").join(self.pid.to_string()).exists()
    }

    fn gone(&mut self) -> Result<()> {
        self.wait("has ended", || !self.is_there())
    }

    fn wait(&self, what: &str, condition: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !condition() {
            ensure!(Instant::now() < deadline, "the workload is to say that it {what}, and does not");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = output(as_root("kill").args(["-9", "--", &format!("-{}", self.pid)]));
    }
}

/// One copy between two places that are in memory.
fn copy(bytes: usize) -> Duration {
    let (from, mut to) = (vec![1_u8; bytes], vec![2_u8; bytes]);
    let start = Instant::now();
    to.copy_from_slice(&from);
    std::hint::black_box(&to);
    start.elapsed()
}

fn median(times: impl IntoIterator<Item = Duration>) -> Duration {
    let mut times: Vec<Duration> = times.into_iter().collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}
