//! The command line: one file per command, its arguments and what it prints.

mod completions;
mod diff;
mod doctor;
mod dump;
mod fill;
mod interrupt;
mod keep;
mod ls;
mod prune;
mod request;
mod restore;
mod serve;
mod show;
mod verify;
mod watch;
mod what;

use crate::{
    cluster::{
        coordinator::{Context, Observer},
        link::Timing,
        transport::Launcher,
    },
    job::{nodes, scheduler},
    ui::{Color, Failed, Ui},
};
use clap::{ArgAction, Parser, Subcommand};
use std::{path::PathBuf, sync::atomic::AtomicBool};

/// Checkpoint and restore running distributed jobs from the outside
#[derive(Debug, Parser)]
#[command(name = "ckpt", version, about, disable_help_subcommand = true, next_display_order = None)]
#[command(after_help = "Exit codes: 0 done; 1 failed; 2 usage; 3 done, with parts left out as allowed; \
    4 cannot be checkpointed; 5 kernel or privilege lacking; 10 no store; 11 locked; 12 damaged; \
    130 interrupted.\n\n\
    Environment: CKPT_STORE, as --store; CKPT_SSH, the command to use for ssh (with its options); \
    CKPT_REMOTE, the path of ckpt on other nodes; NO_COLOR.")]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Everywhere")]
struct Global {
    /// Directory of the checkpoints, the same on every node
    #[arg(
        long,
        global = true,
        env = "CKPT_STORE",
        hide_env_values = true,
        value_name = "DIR",
        default_value = "/var/lib/ckpt"
    )]
    store: PathBuf,
    /// Print one JSON document
    #[arg(long, global = true)]
    json: bool,
    /// Print only what is asked for, and errors
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Log what happens to stderr; twice: more of it
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Use colours
    #[arg(long, global = true, value_name = "WHEN", value_enum, default_value_t)]
    color: Color,
}

#[derive(Debug, Subcommand)]
enum Command {
    Dump(dump::Arguments),
    Restore(restore::Arguments),
    Ls(ls::Arguments),
    Show(show::Arguments),
    Diff(diff::Arguments),
    Verify(verify::Arguments),
    Prune(prune::Arguments),
    Watch(watch::Arguments),
    Request(request::Arguments),
    Doctor(doctor::Arguments),
    Completions(completions::Arguments),
    Serve(serve::Arguments),
    Fill(fill::Arguments),
    Keep(keep::Arguments),
}

/// Parses the command line and does what it says. Gives the exit code.
pub fn main() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // A closed pipe is not an error.
            let _ = error.print();
            return error.exit_code() as u8;
        }
    };
    let ui = Ui::new(cli.global.json, cli.global.quiet, cli.global.color);
    match run(&cli, &ui) {
        Ok(()) => 0,
        Err(failed) => {
            ui.failed(&failed);
            failed.code as u8
        }
    }
}

fn run(cli: &Cli, ui: &Ui) -> Result<(), Failed> {
    let global = &cli.global;
    if !matches!(cli.command, Command::Serve(_) | Command::Fill(_)) {
        log_to_stderr(log_filter(global.verbose));
    }
    match &cli.command {
        Command::Dump(arguments) => dump::run(arguments, global, ui),
        Command::Restore(arguments) => restore::run(arguments, global, ui),
        Command::Ls(arguments) => ls::run(arguments, global, ui),
        Command::Show(arguments) => show::run(arguments, global, ui),
        Command::Diff(arguments) => diff::run(arguments, global, ui),
        Command::Verify(arguments) => verify::run(arguments, global, ui),
        Command::Prune(arguments) => prune::run(arguments, global, ui),
        Command::Watch(arguments) => watch::run(arguments, global, ui),
        Command::Request(arguments) => request::run(arguments, ui),
        Command::Doctor(arguments) => doctor::run(arguments, global, ui),
        Command::Completions(arguments) => completions::run(arguments, ui),
        Command::Serve(arguments) => serve::run(arguments),
        Command::Fill(arguments) => fill::run(arguments),
        Command::Keep(arguments) => keep::run(arguments),
    }
}

fn log_filter(verbose: u8) -> &'static str {
    match verbose {
        0 => "off",
        1 => "info",
        2 => "debug",
        _ => "trace",
    }
}

/// Logs go to stderr, with the filter of `-v`.
fn log_to_stderr(filter: &str) {
    let filter = tracing_subscriber::EnvFilter::new(filter);
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Fails only if it was done before.
    let _ = subscriber.with_target(false).try_init();
}

impl Global {
    fn launcher(&self) -> Result<Launcher, Failed> {
        Launcher::from_environment().map_err(|error| Failed::other(format!("looking at this node: {error}")))
    }

    fn context<'a>(
        &self,
        launcher: &'a Launcher,
        interrupted: &'a AtomicBool,
        observer: &'a dyn Observer,
    ) -> Context<'a> {
        let log = log_filter(self.verbose).to_owned();
        Context { launcher, timing: Timing::default(), log, interrupted, observer }
    }

    /// The store's path as every node must know it.
    fn absolute_store(&self) -> Result<PathBuf, Failed> {
        std::path::absolute(&self.store).map_err(|error| Failed::usage(format!("--store: {error}")))
    }
}

/// The nodes of `--nodes`, else the scheduler's, else nothing.
fn nodes_of(list: Option<&str>) -> Result<Option<Vec<String>>, Failed> {
    match list {
        Some(list) => Ok(Some(nodes::parse(list)?)),
        None => Ok(scheduler::nodes_from(|name| std::env::var(name).ok())?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn arguments_make_sense() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_texts() {
        let mut text = String::new();
        let mut cli = Cli::command().term_width(100);
        cli.build();
        for command in cli.get_subcommands_mut().filter(|command| !command.is_hide_set()) {
            text.push_str(&format!("{}\n", command.render_long_help()));
        }
        insta::assert_snapshot!(text);
    }

    #[test]
    fn a_job_is_named_in_one_way() {
        let parse = |words: &str| Cli::try_parse_from(words.split(' '));
        assert!(parse("ckpt dump --job 17").is_ok());
        assert!(parse("ckpt dump --pid 17 --pid 18 --stop --compress none").is_ok());
        for words in [
            "ckpt dump",
            "ckpt dump --job 1 --pid 2",
            "ckpt dump --pid 0",
            "ckpt dump --pid -5",
            "ckpt dump --job 1 --compress 99",
            "ckpt dump --job 1 --allow everything",
            "ckpt restore",
            "ckpt restore x --place y",
            "ckpt verify x --sample 0",
            "ckpt prune --keep 0",
        ] {
            assert!(parse(words).is_err(), "{words}");
        }
    }
}
