//! What was measured: tables for people, one document for programs.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::fs;
use std::thread::available_parallelism;

/// One line of a table.
#[derive(Clone, Debug)]
struct Row {
    case: String,
    values: Vec<(&'static str, f64)>,
}

/// A target of the project and what was measured.
#[derive(Clone, Debug)]
struct Target {
    what: String,
    limit: f64,
    measured: f64,
    unit: &'static str,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Report {
    machine: Value,
    sections: Vec<(String, Vec<Row>)>,
    targets: Vec<Target>,
    quiet: bool,
}

impl Report {
    /// Notes the machine as it is before the first measurement.
    pub(super) fn new(rounds: usize, quiet: bool) -> Result<Self> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("kernel release")?;
        let load = fs::read_to_string("/proc/loadavg").context("load average")?;
        let load: f64 = load.split(' ').next().and_then(|load| load.parse().ok()).context("load average")?;
        let cores = available_parallelism()?.get();
        let loaded = load > cores as f64 / 2.0;
        let kernel = kernel.trim();
        if !quiet {
            println!(
                "{cores} cores, Linux {kernel}, load average {load:.1} before the run, medians of {rounds}"
            );
        }
        if loaded {
            eprintln!(
                "warning: others use this machine; times are larger than they would be, ratios less sure"
            );
        }
        let machine =
            json!({"cores": cores, "kernel": kernel, "load": load, "loaded": loaded, "rounds": rounds});
        Ok(Self { machine, sections: Vec::new(), targets: Vec::new(), quiet })
    }

    /// A new table.
    pub(super) fn section(&mut self, name: &str) {
        if !self.quiet {
            println!("\n{name}");
        }
        self.sections.push((name.to_owned(), Vec::new()));
    }

    /// A line of the table.
    pub(super) fn row(&mut self, case: impl Into<String>, values: &[(&'static str, f64)]) {
        let Some((_, rows)) = self.sections.last_mut() else { return };
        let row = Row { case: case.into(), values: values.to_vec() };
        if !self.quiet {
            let names = |row: &Row| row.values.iter().map(|(name, _)| *name).collect::<Vec<_>>();
            if rows.last().map(names) != Some(names(&row)) {
                println!(
                    "  {:<34}{}",
                    "",
                    row.values.iter().map(|(n, _)| format!("{n:>15}")).collect::<String>()
                );
            }
            println!(
                "  {:<34}{}",
                row.case,
                row.values.iter().map(|(_, value)| format!("{:>15}", number(*value))).collect::<String>()
            );
        }
        rows.push(row);
    }

    /// A target: what was measured is to be at most `limit`.
    pub(super) fn target(&mut self, what: impl Into<String>, limit: f64, measured: f64, unit: &'static str) {
        self.targets.push(Target { what: what.into(), limit, measured, unit });
    }

    /// The table of targets, or the document.
    pub(super) fn finish(&self) {
        if self.quiet {
            println!("{}", self.document());
            return;
        }
        println!("\n{:<62} {:>14} {:>14}  met?", "target", "at most", "measured");
        for Target { what, limit, measured, unit } in &self.targets {
            let met = if measured <= limit { "yes" } else { "no" };
            let cell = |value| format!("{} {unit}", number(value));
            println!("{what:<62} {:>14} {:>14}  {met}", cell(*limit), cell(*measured));
        }
    }

    fn document(&self) -> Value {
        let row = |row: &Row| {
            let values = row.values.iter().map(|(name, value)| ((*name).to_owned(), json!(value)));
            json!({"case": row.case, "values": values.collect::<serde_json::Map<_, _>>()})
        };
        let section = |(name, rows): &(String, Vec<Row>)| json!({"name": name, "rows": rows.iter().map(row).collect::<Vec<_>>()});
        let target = |target: &Target| {
            let Target { what, limit, measured, unit } = target;
            json!({"target": what, "limit": limit, "measured": measured, "unit": unit, "met": measured <= limit})
        };
        json!({
            "machine": self.machine,
            "sections": self.sections.iter().map(section).collect::<Vec<_>>(),
            "targets": self.targets.iter().map(target).collect::<Vec<_>>(),
        })
    }
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        small if small < 0.1 => format!("{value:.3}"),
        small if small < 10.0 => format!("{value:.2}"),
        small if small < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_met_up_to_its_limit() {
        let mut report = Report::new(1, true).unwrap();
        report.section("one");
        report.row("case", &[("ms", 1.5)]);
        report.target("a", 2.0, 2.0, "ms");
        report.target("b", 2.0, 2.1, "ms");
        let document = report.document();
        assert_eq!(document["sections"][0]["rows"][0]["values"]["ms"], 1.5);
        assert_eq!(document["targets"][0]["met"], true);
        assert_eq!(document["targets"][1]["met"], false);
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([0.04, 1.234, 12.34, 1234.5].map(number), ["0.040", "1.23", "12.3", "1234"]);
    }
}
