//! The program that measures itself (`xtask/workloads/writer.c`), seen from outside: orders go into its memory, what it
//! noted about each millisecond comes out of it.

use super::{Bench, Job, median, wait};
use anyhow::{Context, Result, ensure};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use std::fs::{File, OpenOptions};
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Fields of `struct board`, in bytes.
const ORDER: u64 = 0;
const NUMBER: u64 = 16;
const DONE: u64 = 24;
const RESULT: u64 = 32;
const START: u64 = 40;
const MEMORY: u64 = 48;
const SAMPLES: u64 = 56;
/// Milliseconds behind a pause in which the cost of writes is looked at.
const BEHIND: usize = 50;

/// What it is told to do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    /// Pages per second at random places; 0: nothing
    Rate(u64),
    /// Rewrites all pages in order, as fast as it can
    FullSpeed,
    /// The first word of so many pages; gives ns
    Touch(u64),
    /// So many pages, evenly spread
    Modify(u64),
    /// A snapshot by fork(2); gives the PID. `save`: compressed and written, else only read
    Fork { save: bool },
    /// Its memory anew: huge pages that were split are whole again
    Refresh,
    /// Its heap grows and shrinks all the time
    Grow,
}

/// Kind of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    Small,
    Huge,
}

impl Pages {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Small => "4K",
            Self::Huge => "huge",
        }
    }
}

/// A running writer.
pub(super) struct Writer {
    pub(super) job: Job,
    pub(super) mib: u64,
    board: u64,
    file: File,
    orders: u64,
}

impl Writer {
    pub(super) fn start(bench: &Bench, mib: u64, pages: Pages, threads: usize) -> Result<Self> {
        let ready = bench.path("ready");
        let _ = std::fs::remove_file(&ready);
        let huge = if pages == Pages::Huge { "huge" } else { "small" };
        let arguments =
            [mib.to_string(), huge.to_owned(), threads.to_string(), std::process::id().to_string()];
        let job = Job::start(bench, &arguments, &ready, &[&bench.path("saved")])?;
        wait("the writer says where its board is", || {
            text_of(&ready).is_some_and(|found| found.ends_with('\n'))
        })?;
        let text = text_of(&ready).unwrap_or_default();
        let board = text.trim().parse().context("address of the board")?;
        let file = memory(job.pid)?;
        Ok(Self { job, mib, board, file, orders: 0 })
    }

    /// After a restore it is another process with the same PID.
    pub(super) fn reopen(&mut self) -> Result<()> {
        self.file = memory(self.job.pid)?;
        Ok(())
    }

    pub(super) fn pages(&self) -> u64 {
        self.mib << 8
    }

    /// Reads its memory. Unlike /proc/PID/mem this waits for pages that follow in a lazy restore.
    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        let (pid, len) = (Pid::from_raw(self.job.pid as i32), into.len());
        let from = RemoteIoVec { base: at as usize, len };
        let read = process_vm_readv(pid, &mut [IoSliceMut::new(into)], &[from]);
        ensure!(read.context("reading the writer's memory")? == len, "the writer's memory is not all there");
        Ok(())
    }

    fn word(&self, field: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.read(self.board + field, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// Address of the memory that it writes to.
    pub(super) fn address(&self) -> Result<u64> {
        self.word(MEMORY)
    }

    /// Has an order carried out; gives its result.
    pub(super) fn order(&mut self, order: Order) -> Result<u64> {
        let (what, argument): (u64, u64) = match order {
            Order::Rate(pages) => (1, pages),
            Order::FullSpeed => (1, u64::MAX),
            Order::Touch(pages) => (2, pages),
            Order::Modify(pages) => (3, pages),
            Order::Fork { save: false } => (4, 0),
            Order::Fork { save: true } => (5, 0),
            Order::Refresh => (6, 0),
            Order::Grow => (7, 1),
        };
        self.orders += 1;
        let words = [what, argument].map(u64::to_ne_bytes).concat();
        let write = |field, bytes: &[u8]| {
            self.file.write_all_at(bytes, self.board + field).context("giving the writer an order")
        };
        write(ORDER, &words)?;
        write(NUMBER, &self.orders.to_ne_bytes())?;
        wait("the writer has done what it was told", || {
            self.word(DONE).is_ok_and(|done| done == self.orders)
        })?;
        self.word(RESULT)
    }

    /// What it noted between two times.
    pub(super) fn window(&self, from: Duration, to: Duration) -> Result<Window> {
        let start = Duration::from_nanos(self.word(START)?);
        let index = |time: Duration| time.saturating_sub(start).as_millis() as u64;
        let (first, last) = (index(from), index(to));
        ensure!(first < last && last < 1 << 20, "the writer has no notes of that time");
        let mut bytes = vec![0; ((last - first) * 8) as usize];
        self.read(self.board + SAMPLES + first * 8, &mut bytes)?;
        let number = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().expect("four bytes"));
        let samples = bytes.chunks_exact(8).map(|s| Sample { work: number(&s[..4]), gap: number(&s[4..]) });
        Ok(Window { samples: samples.collect() })
    }

    /// How long it took from a time to its first work since.
    pub(super) fn first_work(&self, since: Duration) -> Result<Duration> {
        let window = self.window(since, now() + Duration::from_millis(1))?;
        let first = window.samples.iter().position(|sample| sample.work > 0);
        Ok(Duration::from_millis(first.context("it has not done anything")? as u64 + 1))
    }
}

fn text_of(path: &std::path::Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

fn memory(pid: u32) -> Result<File> {
    let path = format!("/proc/{pid}/mem");
    OpenOptions::new().write(true).open(&path).with_context(|| format!("opening {path}"))
}

/// The clock of the writer.
pub(super) fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every kernel has this clock").into()
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    work: u32,
    gap: u32,
}

/// What the writer noted about some time, by millisecond.
#[derive(Debug)]
pub(super) struct Window {
    samples: Vec<Sample>,
}

/// What something has cost the program.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// The longest time in which it did nothing, ms.
    pub(super) pause: f64,
    /// Work that it did not do, in ms of its undisturbed work.
    pub(super) lost: f64,
    /// Ns that a write of a page took longer just behind the pause; only at full speed.
    pub(super) write: f64,
}

impl Window {
    fn rate(&self) -> f64 {
        self.samples.iter().map(|sample| f64::from(sample.work)).sum::<f64>() / self.samples.len() as f64
    }

    /// Longest time between two looks at the clock, ms.
    pub(super) fn gap(&self) -> f64 {
        self.samples.iter().map(|sample| sample.gap).max().map_or(0.0, |gap| f64::from(gap) / 1e3)
    }

    /// Compared with an undisturbed time.
    pub(super) fn cost(&self, undisturbed: &Window) -> Cost {
        let rate = undisturbed.rate();
        let longest = self.samples.iter().enumerate().max_by_key(|(_, sample)| sample.gap);
        let behind = longest.map_or(0, |(at, _)| at + 1);
        let some = Window { samples: self.samples.iter().skip(behind).take(BEHIND).copied().collect() };
        Cost {
            pause: self.gap(),
            lost: self.samples.len() as f64 * (1.0 - self.rate() / rate),
            write: 1e6 / some.rate() - 1e6 / rate,
        }
    }
}

/// The medians of several.
pub(super) fn middle(costs: &[Cost]) -> Cost {
    let of = |field: fn(&Cost) -> f64| median(costs.iter().map(field));
    Cost { pause: of(|c| c.pause), lost: of(|c| c.lost), write: of(|c| c.write) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_work_and_the_pause_are_found() {
        let window = |samples: &[(u32, u32)]| Window {
            samples: samples.iter().map(|&(work, gap)| Sample { work, gap }).collect(),
        };
        let undisturbed = window(&[(100, 10); 200]);
        // Ten milliseconds of nothing, then half as fast for fifty.
        let mut samples = vec![(100, 10); 20];
        samples.extend([(0, 0); 9]);
        samples.push((0, 10_000));
        samples.extend([(50, 20); 50]);
        samples.extend([(100, 10); 20]);
        let cost = window(&samples).cost(&undisturbed);
        assert!((cost.pause - 10.0).abs() < 1e-9);
        assert!((cost.lost - 35.0).abs() < 1e-9);
        assert!((cost.write - 10_000.0).abs() < 1e-9);
    }
}
