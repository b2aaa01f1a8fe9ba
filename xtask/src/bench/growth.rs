//! How pause and time of a dump grow with the program.

use super::memory::Run;
use super::program::{Order, Pages, Writer};
use super::{median, ms};
use anyhow::{Context, Result};
use serde_json::Value;
use std::time::Duration;

impl Run {
    /// With its memory, with what it modifies, with its threads.
    pub(super) fn growth(&mut self) -> Result<()> {
        let (first, last) = (self.sizes[0], self.sizes[self.sizes.len() - 1]);
        self.report.section("growth with resident memory (full dumps of an idle program)");
        for mib in [256, 1024, 4096].into_iter().filter(|mib| *mib <= last) {
            let writer = Writer::start(&self.bench, mib, Pages::Small, 1)?;
            self.dumps(format!("{mib} MiB"), writer, |_| Ok(()), &["--full"])?;
        }
        self.report.section(&format!("growth with what was modified ({first} MiB)"));
        for percent in [1, 10, 100] {
            let writer = Writer::start(&self.bench, first, Pages::Small, 1)?;
            let modify = |writer: &mut Writer| {
                let pages = writer.pages() * percent / 100;
                writer.order(Order::Modify(pages)).map(drop)
            };
            self.dumps(format!("{percent}%"), writer, modify, &[])?;
        }
        self.report.section("growth with resident memory, of increments (1% modified, a heap that grows)");
        for mib in [256, 1024, 4096].into_iter().filter(|mib| *mib <= last) {
            let mut writer = Writer::start(&self.bench, mib, Pages::Small, 1)?;
            writer.order(Order::Grow)?;
            let modify = |writer: &mut Writer| writer.order(Order::Modify(writer.pages() / 100)).map(drop);
            self.dumps(format!("{mib} MiB"), writer, modify, &[])?;
        }
        self.report.section("growth with threads (256 MiB, 1% modified)");
        for threads in [1, 16, 64, 256] {
            let writer = Writer::start(&self.bench, 256, Pages::Small, threads)?;
            let modify = |writer: &mut Writer| writer.order(Order::Modify(writer.pages() / 100)).map(drop);
            self.dumps(format!("{threads} threads"), writer, modify, &[])?;
        }
        Ok(())
    }

    /// Dumps of a program to which something happens before each.
    fn dumps(
        &mut self,
        name: String,
        mut writer: Writer,
        before: impl Fn(&mut Writer) -> Result<()>,
        options: &[&str],
    ) -> Result<()> {
        self.bench.dump(&writer, "growing", &["--full"])?;
        let (mut pauses, mut times) = (Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            before(&mut writer)?;
            let (document, took) = self.bench.dump(&writer, "growing", options)?;
            pauses.push(paused(&document)?);
            times.push(ms(took));
        }
        self.report.row(name, &[("pause ms", median(pauses)), ("took ms", median(times))]);
        Ok(())
    }
}

/// The pause in ckpt's own words, ms.
fn paused(document: &Value) -> Result<f64> {
    Ok(ms(Duration::from_micros(document["paused_us"].as_u64().context("no pause")?)))
}
