//! `lint` and `test`.

use crate::command::{cargo, run, shown};
use crate::{demo, ebpf, setup};
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

/// All tests; with `fast` only what needs no root; with `ebpf` the kernel programs are built, too.
/// Otherwise it is only checked that the committed ones are of this source: their compiler and
/// linker take minutes and two hundred megabytes to get.
///
/// # Errors
/// Any step failed. The later steps run all the same, except after a failed build.
pub(crate) fn test(fast: bool, ebpf: bool) -> Result<()> {
    setup::packages()?;
    let (mut steps, mut closing) = (Steps::default(), Vec::new());
    steps.step("lint", lint());
    run(cargo().args(["build", "--workspace", "--all-targets"]))?;
    steps.step("unit tests", tests(cargo().args(["test", "--no-fail-fast"]), &mut closing));
    steps.step("kernel programs", if ebpf { ebpf::build(true) } else { ebpf::up_to_date() });
    if !fast {
        let mut root = cargo();
        // Each test uses a processor or two, and has its own idea of how long something may take.
        root.args(["test", "--package", "ckpt-tests", "--no-fail-fast", "--", "--test-threads=2"]);
        if !nix::unistd::geteuid().is_root() {
            // Only the tests run as root: what cargo builds belongs to the user.
            root.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", "sudo --preserve-env");
        }
        steps.step("tests as root", tests(&mut root, &mut closing));
        steps.step("demo", demo::run());
    }
    println!("\nsummary");
    for line in &closing {
        println!("{line}");
    }
    println!("steps passed: {}", steps.done.join(", "));
    if steps.failed.is_empty() {
        return Ok(());
    }
    bail!("failed: {}", steps.failed.join(", "))
}

/// What has been done so far.
#[derive(Default)]
struct Steps {
    done: Vec<&'static str>,
    failed: Vec<&'static str>,
}

impl Steps {
    fn step(&mut self, name: &'static str, result: Result<()>) {
        match result {
            Ok(()) => self.done.push(name),
            Err(error) => {
                eprintln!("error: {name}: {error:#}");
                self.failed.push(name);
            }
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
