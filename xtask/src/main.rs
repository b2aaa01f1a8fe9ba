//! `cargo xtask <task>`: everything a person does to the repository.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command for people, not a library")]

mod bench;
mod check;
mod cluster;
mod command;
mod demo;
mod ebpf;
mod mutants;
mod setup;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::process::ExitCode;

#[derive(Parser)]
#[command(bin_name = "cargo xtask", about = "Everything a person does to the repository")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the Debian packages that tests and demo need (the other tasks call this)
    Setup,
    /// Formatting and clippy, warnings as errors
    Lint,
    /// All tests: lint, unit tests, tests as root (through sudo), demo
    Test {
        /// Only what needs no root
        #[arg(long)]
        fast: bool,
        /// Build the kernel programs, too, and compare them with the committed ones (downloads a compiler)
        #[arg(long)]
        ebpf: bool,
    },
    /// A job on two of three nodes lives through a dump, and through its end and a restore elsewhere
    Demo,
    /// Are the tests worth something? Breaks the code of each kind of state on purpose, in a copy of the last commit,
    /// and runs the test that must fail then (half an hour; not part of `test`)
    Mutants {
        /// Only those whose name contains one of these words
        words: Vec<String>,
    },
    /// What a dump and a restore cost on this machine
    Bench {
        /// What is measured
        #[command(subcommand)]
        what: Measured,
    },
    /// Test nodes on one machine: up NAME --nodes N | exec NAME NODE COMMAND... | down NAME
    Cluster {
        /// What to do
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        arguments: Vec<OsString>,
    },
    /// Build the programs of the kernel and record the object under ckpt-ebpf/prebuilt
    BuildEbpf {
        /// Compare with the recorded object instead of writing it
        #[arg(long)]
        check: bool,
    },
}

#[derive(Clone, Subcommand)]
enum Measured {
    /// Pause, dump, image and restore: of a large process, and of many of each thing
    Dump,
    /// What a dump costs a program that writes, against a frozen copy and fork; speed of dump and restore; growth
    Memory(bench::MemoryOptions),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Setup => setup::packages(),
        Task::Lint => check::lint(),
        Task::Test { fast, ebpf } => check::test(fast, ebpf),
        Task::Demo => demo::run(),
        Task::Mutants { words } => mutants::mutants(&words),
        Task::Bench { what: Measured::Dump } => bench::dump(),
        Task::Bench { what: Measured::Memory(options) } => bench::memory(options),
        Task::Cluster { arguments } => cluster::pass_on(&arguments),
        Task::BuildEbpf { check } => ebpf::build(check),
    };
    finish(result)
}

fn finish(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
