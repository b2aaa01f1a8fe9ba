//! What a person (or a script) sees. The only room that prints.
//!
//! stdout is the result, stderr is progress, hints and errors. With `--json`, stdout has one
//! document, and a fatal error is one, too.

mod failure;
mod format;
mod progress;

pub use failure::{ExitCode, Failed};
pub use format::{bytes, date, duration, plural};
pub use progress::Progress;

use serde::Serialize;
use std::io::{self, ErrorKind, IsTerminal, Write};

/// When to use colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Color {
    /// On a terminal, unless `NO_COLOR` is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// How to talk.
#[derive(Clone, Copy, Debug)]
pub struct Ui {
    json: bool,
    quiet: bool,
    color: bool,
    progress: bool,
}

impl Ui {
    /// From the global options.
    pub fn new(json: bool, quiet: bool, color: Color) -> Self {
        let terminal = io::stderr().is_terminal();
        let color = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        };
        Self { json, quiet, color, progress: terminal && !json && !quiet }
    }

    /// Is the result to be JSON?
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Bars for a long operation; on a terminal only.
    pub fn progress(&self) -> Progress {
        Progress::new(*self)
    }

    /// The result: `text` for people, or `document` for programs.
    pub fn result(&self, text: &str, document: &impl Serialize) -> Result<(), Failed> {
        if self.json {
            let document = serde_json::to_string(document);
            let document = document.map_err(|error| Failed::other(format!("writing JSON: {error}")))?;
            return self.out(&format!("{document}\n"));
        }
        self.out(text)
    }

    /// As [`Self::result`], but not if `--quiet`: for commands whose exit code says it all.
    pub fn summary(&self, text: &str, document: &impl Serialize) -> Result<(), Failed> {
        if self.quiet && !self.json {
            return Ok(());
        }
        self.result(text, document)
    }

    /// Raw bytes to stdout.
    pub fn raw(&self, bytes: &[u8]) -> Result<(), Failed> {
        let mut stdout = io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            // Whoever read it has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            result => result.map_err(|error| Failed::other(format!("writing the result: {error}"))),
        }
    }

    fn out(&self, text: &str) -> Result<(), Failed> {
        self.raw(text.as_bytes())
    }

    /// Something that did not stop us.
    pub fn warn(&self, text: &str) {
        if !self.quiet {
            self.line("warning", "33", text);
        }
    }

    /// Something to know.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            self.line("note", "36", text);
        }
    }

    /// Why it ended.
    pub fn failed(&self, failed: &Failed) {
        if self.json {
            let _ = self.out(&format!("{}\n", failed.json()));
            return;
        }
        if failed.message.is_empty() {
            return;
        }
        self.line("error", "31;1", &failed.message);
        let mut rest = failed.details.iter().map(|(line, _)| format!("  {line}\n")).collect::<String>();
        rest.extend(failed.hints.iter().map(|hint| self.labelled("hint", "36", hint)));
        rest.extend(failed.notes.iter().map(|note| self.labelled("note", "36", note)));
        // Nobody to tell when stderr is closed.
        let _ = io::stderr().lock().write_all(rest.as_bytes());
    }

    fn line(&self, label: &str, color: &str, text: &str) {
        let _ = io::stderr().lock().write_all(self.labelled(label, color, text).as_bytes());
    }

    fn labelled(&self, label: &str, color: &str, text: &str) -> String {
        match self.color {
            true => format!("\x1b[{color}m{label}:\x1b[0m {text}\n"),
            false => format!("{label}: {text}\n"),
        }
    }
}

/// A table for people: columns with headings, no lines.
pub struct Table(comfy_table::Table);

impl Table {
    /// A table with these headings. Those that begin with `>` are columns of numbers.
    pub fn new(headings: &[&str]) -> Self {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.set_header(headings.iter().map(|heading| heading.trim_start_matches('>')));
        for (column, heading) in table.column_iter_mut().zip(headings) {
            column.set_padding((0, 2));
            if heading.starts_with('>') {
                column.set_cell_alignment(comfy_table::CellAlignment::Right);
            }
        }
        Self(table)
    }

    /// Appends a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.add_row(cells);
    }

    /// Its text, without blanks at the ends of lines.
    pub fn text(&self) -> String {
        self.0.lines().map(|line| format!("{}\n", line.trim_end())).collect()
    }
}
