//! `bench dump`: pause, dump, image and restore of a large process, and of many of each thing.

use super::{Bench, Job, median, ms};
use crate::command::output;
use crate::setup;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::process::Command;
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
    let bench = Bench::new("bench.c")?;

    println!("medians of {RUNS} runs");
    let copy = median((0..RUNS).map(|_| copy(MEMORY << 20)));
    println!("baseline: memcpy of {MEMORY} MiB {}", shown(copy));
    let costs = bench.measure("memory", MEMORY)?;
    let write = bench.write(costs.stored)?;
    println!("baseline: dd of {} MiB with fsync {}", costs.stored >> 20, shown(write));
    let ratio = |time: Duration, to: Duration| time.as_secs_f64() / to.as_secs_f64();
    println!("\na process with {MEMORY} MiB, half of it incompressible");
    println!("  pause    {:>10}  {:.2} x memcpy", shown(costs.pause), ratio(costs.pause, copy));
    println!("  dump     {:>10}  {:.2} x dd of the image", shown(costs.dump), ratio(costs.dump, write));
    println!(
        "  image    {:>6} MiB  {:.2} x its memory",
        costs.stored >> 20,
        costs.stored as f64 / (MEMORY << 20) as f64
    );
    println!("  restore  {:>10}  {:.2} x memcpy", shown(costs.restore), ratio(costs.restore, copy));

    println!(
        "\nfixed costs                  pause            dump         restore   (x: an almost empty process)"
    );
    let mut base: Option<Costs> = None;
    for (kind, count) in FIXED {
        let costs = bench.measure(kind, count)?;
        let base = base.get_or_insert(costs);
        let cell = |time: Duration, to: Duration| format!("{:>10} {:>4.1}x", shown(time), ratio(time, to));
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

impl Bench {
    fn measure(&self, kind: &str, count: usize) -> Result<Costs> {
        let ready = self.path(&format!("ready-{kind}"));
        let mut job = Job::start(self, &[kind.to_owned(), count.to_string()], &ready, &[])?;
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

/// One copy between two places that are in memory.
fn copy(bytes: usize) -> Duration {
    let (from, mut to) = (vec![1_u8; bytes], vec![2_u8; bytes]);
    let start = Instant::now();
    to.copy_from_slice(&from);
    std::hint::black_box(&to);
    start.elapsed()
}

fn shown(time: Duration) -> String {
    format!("{:.1} ms", ms(time))
}
