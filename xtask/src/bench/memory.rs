//! `bench memory`: what a dump costs the program while it runs, and what dump and restore cost the machine.

use super::program::{Cost, Order, Pages, Writer, middle};
use super::report::Report;
use super::snapshot::{Taken, WAYS, Way};
use super::{Bench, median};
use crate::setup;
use anyhow::Result;
use clap::ValueEnum as _;

/// Pages per second of the random writer.
const RANDOM: u64 = 80_000;
/// Pages whose first write is timed.
const TOUCHED: u64 = 16_384;
/// Part of the memory that is modified between two dumps, as one of so many.
const MODIFIED: u64 = 10;

/// What is measured, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Section {
    /// What a copy costs the program, in every way
    Copies,
    /// The first write to each page
    FirstWrites,
    /// Dumps at intervals
    Overhead,
    /// Dumps against dd and zstd
    Throughput,
    /// Restores against reading the raw bytes
    Restores,
    /// With memory, modified memory and threads
    Growth,
}

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// A short run with little memory: is everything in order?
    #[arg(long)]
    quick: bool,
    /// Medians of so many rounds [default: 5, with --quick 1]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Most memory of the program, in MiB [default: 4096, with --quick 256]
    #[arg(long, value_name = "MIB")]
    most: Option<u64>,
    /// Only these sections, separated by commas
    #[arg(long, value_name = "SECTIONS", value_delimiter = ',')]
    only: Vec<Section>,
}

/// The parts of a run share this.
pub(super) struct Run {
    pub(super) bench: Bench,
    pub(super) report: Report,
    pub(super) rounds: usize,
    /// MiB of the program, the smaller size first.
    pub(super) sizes: Vec<u64>,
}

/// The costs of memory.
///
/// # Errors
/// Something cannot be built, dumped or restored.
pub(crate) fn memory(options: Options) -> Result<()> {
    setup::packages()?;
    let bench = Bench::new("writer.c")?;
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { 5 }).max(1);
    let most = options.most.unwrap_or(if options.quick { 256 } else { 4096 });
    let mut sizes = vec![most.min(1024)];
    sizes.extend((most > 1024).then_some(most));
    let mut run = Run { bench, report: Report::new(rounds, options.json)?, rounds, sizes };
    for section in
        Section::value_variants().iter().filter(|s| options.only.is_empty() || options.only.contains(s))
    {
        match section {
            Section::Copies => run.all_copies()?,
            Section::FirstWrites => run.first_writes()?,
            Section::Overhead => run.overhead()?,
            Section::Throughput => run.throughput()?,
            Section::Restores => run.restores()?,
            Section::Growth => run.growth()?,
        }
    }
    run.report.finish();
    Ok(())
}

impl Run {
    fn all_copies(&mut self) -> Result<()> {
        for mib in self.sizes.clone() {
            for pages in [Pages::Small, Pages::Huge] {
                self.copies(mib, pages)?;
            }
        }
        Ok(())
    }

    /// Of both writers, a copy in every way, one after the other in each round.
    fn copies(&mut self, mib: u64, pages: Pages) -> Result<()> {
        let writers = [("random writer", Order::Rate(RANDOM)), ("full-speed writer", Order::FullSpeed)];
        for (name, order) in writers {
            self.report.section(&format!("{mib} MiB of {} pages, {name}", pages.name()));
            let mut writer = Writer::start(&self.bench, mib, pages, 1)?;
            let mut taken: Vec<Vec<Taken>> = WAYS.map(|_| Vec::new()).into();
            writer.order(order)?;
            // The first dump makes everything ready that later ones find.
            self.bench.dump(&writer, "writer", &[])?;
            for _ in 0..self.rounds {
                for (way, taken) in WAYS.into_iter().zip(&mut taken) {
                    if pages == Pages::Huge {
                        writer.order(Order::Refresh)?;
                    }
                    if matches!(way, Way::Ckpt(_)) {
                        // All ways find the same: everything modified since the dump before.
                        writer.order(Order::Modify(writer.pages()))?;
                    }
                    taken.push(self.bench.take(&mut writer, way)?);
                }
            }
            let costs: Vec<Cost> = taken
                .iter()
                .map(|taken| middle(&taken.iter().map(|taken| taken.cost).collect::<Vec<_>>()))
                .collect();
            let of = |way: Way| &costs[WAYS.iter().position(|other| *other == way).unwrap_or_default()];
            let (frozen, fork) = (*of(Way::Frozen), *of(Way::Fork));
            for ((way, taken), cost) in WAYS.iter().zip(&taken).zip(&costs) {
                let own = median(taken.iter().map(|taken| taken.frozen));
                let took = median(taken.iter().map(|taken| taken.took));
                let fell_back = taken.iter().filter(|taken| taken.fell_back).count() as f64;
                self.report.row(
                    way.name(),
                    &[
                        ("pause ms", cost.pause),
                        ("by own clock", own),
                        ("/ frozen copy", cost.pause / frozen.pause),
                        ("lost ms", cost.lost),
                        ("/ fork, read", cost.lost / fork.lost),
                        ("ns per write", cost.write),
                        ("took ms", took),
                        ("fell back", fell_back),
                    ],
                );
            }
            if mib > 1024 || pages == Pages::Huge {
                continue;
            }
            let best = of(Way::Ckpt("bpf"));
            if matches!(order, Order::Rate(_)) {
                self.report.target(format!("pause, {mib} MiB, random writer"), 15.0, best.pause, "ms");
            } else {
                let of_frozen = best.pause / frozen.pause;
                self.report.target(
                    "pause, full-speed writer, of the frozen copy",
                    1.0 / 25.0,
                    of_frozen,
                    "x",
                );
            }
            let of_fork = best.lost / fork.lost;
            self.report.target(format!("compute lost, {name}, of a fork that reads"), 1.0, of_fork, "x");
            let of_fork = best.lost / of(Way::ForkAndSave).lost;
            self.report.target(format!("compute lost, {name}, of a fork that saves"), 1.0, of_fork, "x");
        }
        Ok(())
    }

    /// What the first write to a page costs with and without tracking. What it costs while it is guarded, or after
    /// a fork, the full-speed writer has shown.
    fn first_writes(&mut self) -> Result<()> {
        self.report.section("first write to each page");
        let (free, tracked) = self.write_costs()?;
        self.report.row("not tracked", &[("ns", free), ("x", 1.0)]);
        self.report.row("tracked", &[("ns", tracked), ("x", tracked / free)]);
        Ok(())
    }

    /// Ns of a first write to a page: not tracked, and tracked.
    fn write_costs(&mut self) -> Result<(f64, f64)> {
        let (mut free, mut tracked) = (Vec::new(), Vec::new());
        let pages = TOUCHED.min(self.sizes[0] << 7);
        for _ in 0..self.rounds {
            let mut writer = Writer::start(&self.bench, self.sizes[0], Pages::Small, 1)?;
            free.push(writer.order(Order::Touch(pages))? as f64 / pages as f64);
            self.bench.dump(&writer, "touched", &["--full"])?;
            tracked.push(writer.order(Order::Touch(pages))? as f64 / pages as f64);
        }
        Ok((median(free), median(tracked)))
    }

    /// What checkpoints at an interval cost a program that modifies a tenth of its memory in between. Not waited for but
    /// computed: what a dump costs it, and what its first writes cost more than without tracking, by the interval.
    fn overhead(&mut self) -> Result<()> {
        let (mib, few) = (self.sizes[0], self.sizes[0] * 256 / MODIFIED);
        self.report
            .section(&format!("overhead, a {MODIFIED}th of {mib} MiB modified between dumps (computed)"));
        let (free, tracked) = self.write_costs()?;
        let mut writer = Writer::start(&self.bench, mib, Pages::Small, 1)?;
        self.bench.dump(&writer, "writer", &[])?;
        let mut lost = Vec::new();
        for _ in 0..self.rounds {
            writer.order(Order::Modify(few))?;
            writer.order(Order::Rate(few / 60))?;
            lost.push(self.bench.take(&mut writer, Way::Ckpt("auto"))?.cost.lost);
            writer.order(Order::Rate(0))?;
        }
        let writes = few as f64 * (tracked - free) / 1e6;
        let lost = median(lost);
        for seconds in [10.0, 60.0] {
            let percent = (lost + writes) / (seconds * 1e3) * 100.0;
            let values = [("lost ms", lost), ("writes ms", writes), ("overhead %", percent)];
            self.report.row(format!("every {seconds} s"), &values);
            if seconds > 10.0 {
                self.report.target("overhead at 60 s, a tenth modified between dumps", 1.0, percent, "%");
            }
        }
        Ok(())
    }
}
