//! How fast a restore is, against reading the bytes from the same disk.

use super::memory::Run;
use super::program::{Order, Pages, Writer, now};
use super::snapshot::read_all;
use super::{median, ms, timed};
use crate::command::{as_root, output};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

/// Forgets what the kernel has of files.
fn drop_caches() -> Result<()> {
    output(as_root("sh").args(["-c", "sync; echo 3 >/proc/sys/vm/drop_caches"])).map(drop)
}

impl Run {
    /// Restores with cold and warm caches, and lazy ones up to the first instruction.
    pub(super) fn restores(&mut self) -> Result<()> {
        for mib in self.sizes.clone() {
            self.report.section(&format!("{mib} MiB brought back"));
            let mut writer = Writer::start(&self.bench, mib, Pages::Small, 1)?;
            let raw = self.bench.path("raw");
            {
                let mut copy = vec![0; (mib as usize) << 20];
                read_all(&writer, &mut copy)?;
                fs::write(&raw, copy).context("writing the program's memory to a file")?;
            }
            writer.order(Order::Rate(1))?;
            for cold in [true, false] {
                let (mut reads, mut fulls, mut lazies, mut firsts) =
                    (Vec::new(), Vec::new(), Vec::new(), Vec::new());
                for _ in 0..self.rounds {
                    reads.push(ms(self.read(&raw, cold)?));
                    fulls.push(ms(self.bring_back(&mut writer, cold, false)?.0));
                    let (took, first) = self.bring_back(&mut writer, cold, true)?;
                    lazies.push(ms(took));
                    firsts.push(ms(first));
                }
                let name = if cold { "cold" } else { "warm" };
                let (read, full) = (median(reads), median(fulls));
                let (lazy, first) = (median(lazies), median(firsts));
                self.report.row(format!("reading the raw bytes, {name}"), &[("ms", read), ("x", 1.0)]);
                self.report.row(format!("restore, {name}"), &[("ms", full), ("x", full / read)]);
                self.report.row(format!("restore --lazy, {name}"), &[("ms", lazy), ("to first ms", first)]);
                if cold {
                    let what = format!("restore, {mib} MiB, cold, of reading the raw bytes");
                    self.report.target(what, 1.5, full / read, "x");
                    let what = format!("first instruction of restore --lazy, {mib} MiB, cold");
                    self.report.target(what, 50.0, first, "ms");
                }
            }
            fs::remove_file(&raw)?;
        }
        Ok(())
    }

    fn read(&self, file: &std::path::Path, cold: bool) -> Result<Duration> {
        if cold {
            drop_caches()?;
        }
        timed(Command::new("dd").arg(format!("if={}", file.display())).args(["of=/dev/null", "bs=1M"]))
    }

    /// Ends the job with a dump and restores it; gives the time of the restore, and that to the first instruction.
    fn bring_back(&self, writer: &mut Writer, cold: bool, lazy: bool) -> Result<(Duration, Duration)> {
        self.bench.dump(writer, "back", &["--stop"])?;
        writer.job.gone()?;
        if cold {
            drop_caches()?;
        }
        let (since, start) = (now(), Instant::now());
        let arguments = ["restore", "back", "--pids", "same", "--lazy"];
        self.bench.ckpt(&arguments[..if lazy { 5 } else { 4 }])?;
        let took = start.elapsed();
        ensure!(writer.job.is_there(), "the restored process is not there");
        std::thread::sleep(Duration::from_millis(20));
        writer.reopen()?;
        Ok((took, writer.first_work(since)?))
    }
}
