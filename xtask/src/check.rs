//! `lint` and `test`.

use crate::command::{cargo, run, shown};
use crate::{ebpf, setup};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// Formatting and clippy, warnings as errors.
///
/// # Errors
/// Something is not formatted, or clippy has a remark.
pub(crate) fn lint() -> Result<()> {
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["fmt", "--manifest-path", "ckpt-ebpf/Cargo.toml", "--check"]))?;
    run(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

/// All tests; with `fast` only what needs no root.
///
/// # Errors
/// Any step failed. The later steps run all the same, except after a failed build.
pub(crate) fn test(fast: bool) -> Result<()> {
    setup::packages()?;
    let (mut steps, mut closing) = (Steps::default(), Vec::new());
    steps.step("lint", lint());
    run(cargo().args(["build", "--workspace", "--all-targets"]))?;
    steps.step("unit tests", tests(cargo().args(["test", "--no-fail-fast"]), &mut closing));
    if !fast {
        steps.step("kernel programs", ebpf::build(true));
        let mut root = cargo();
        root.args(["test", "--package", "ckpt-tests", "--no-fail-fast"]);
        if !nix::unistd::geteuid().is_root() {
            // Only the tests run as root: what cargo builds belongs to the user.
            root.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", "sudo --preserve-env");
        }
        steps.step("tests as root", tests(&mut root, &mut closing));
    }
    for line in &closing {
        println!("{line}");
    }
    if steps.failed.is_empty() {
        return Ok(());
    }
    bail!("failed: {}", steps.failed.join(", "))
}

/// What has been done so far.
#[derive(Default)]
struct Steps {
    failed: Vec<&'static str>,
}

impl Steps {
    fn step(&mut self, name: &'static str, result: Result<()>) {
        if let Err(error) = result {
            eprintln!("error: {name}: {error:#}");
            self.failed.push(name);
        }
    }
}

/// Runs a test command, shows its output as it comes, and keeps the runners' closing lines.
fn tests(command: &mut Command, closing: &mut Vec<String>) -> Result<()> {
    let text = shown(command);
    eprintln!("+ {text}");
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {text}"))?;
    let lines = BufReader::new(child.stdout.take().context("no standard output")?).split(b'\n');
    for line in lines {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{line}");
        if line.starts_with("test result:") {
            closing.push(line);
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{text}: {status}");
    }
    Ok(())
}
