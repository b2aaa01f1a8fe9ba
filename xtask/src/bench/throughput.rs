//! How fast a dump is, against writing and compressing the same bytes with other programs.

use super::memory::Run;
use super::program::{Order, Pages, Writer};
use super::snapshot::read_all;
use super::{median, ms, timed};
use anyhow::{Context, Result};
use std::fs;
use std::process::Command;

impl Run {
    /// Full dumps against dd and zstd, and an increment against a full dump.
    pub(super) fn throughput(&mut self) -> Result<()> {
        let mib = self.sizes[0];
        self.report.section(&format!("{mib} MiB saved"));
        let mut writer = Writer::start(&self.bench, mib, Pages::Small, 1)?;
        let raw = self.bench.path("raw");
        {
            let mut copy = vec![0; (mib as usize) << 20];
            read_all(&writer, &mut copy)?;
            fs::write(&raw, copy).context("writing the program's memory to a file")?;
        }
        let (from, to) = (raw.display().to_string(), self.bench.path("written"));
        let (mut dd, mut zstd, mut full, mut increment) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut stored, mut packed) = (0.0, 0.0);
        for _ in 0..self.rounds {
            let of = format!("of={}", to.display());
            let flags = ["bs=1M", "oflag=direct", "conv=fsync"];
            dd.push(ms(timed(Command::new("dd").arg(format!("if={from}")).arg(of).args(flags))?));
            fs::remove_file(&to)?;
            zstd.push(ms(timed(
                Command::new("zstd").args(["-1", "-T0", "-q", "-f", "-o"]).arg(&to).arg(&raw),
            )?));
            packed = fs::metadata(&to)?.len() as f64;
            fs::remove_file(&to)?;
            let (document, took) = self.bench.dump(&writer, "saved", &["--full"])?;
            stored = document["stored_bytes"].as_f64().context("no size")?;
            full.push(ms(took));
            writer.order(Order::Modify(mib * 256 / 100))?;
            increment.push(ms(self.bench.dump(&writer, "saved", &[])?.1));
        }
        let (dd, zstd, full, increment) = (median(dd), median(zstd), median(full), median(increment));
        let bytes = (mib << 20) as f64;
        let mut row = |name: &str, took: f64, size: f64| {
            let rate = bytes / 1048.576 / took;
            let values =
                [("ms", took), ("MiB/s", rate), ("/ dd", took / dd), ("/ zstd", took / zstd), ("size", size)];
            self.report.row(name, &values);
        };
        row("dd, direct", dd, 1.0);
        row("zstd -1, all cores", zstd, packed / bytes);
        row("dump --full", full, stored / bytes);
        self.report.row("dump, 1% modified", &[("ms", increment), ("/ full", increment / full)]);
        self.report.target("image, of resident memory", 0.55, stored / bytes, "x");
        self.report.target("increment of 1%, of a full dump's time", 0.05, increment / full, "x");
        fs::remove_file(&raw)?;
        Ok(())
    }
}
