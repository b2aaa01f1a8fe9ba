//! `cluster`: builds what the test nodes need and passes the command on to `ckpt-cluster`.

use crate::command::{as_root, cargo, repository, run};
use crate::setup;
use anyhow::{Context, Result};
use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{ExitStatus, exit};

/// Runs `ckpt-cluster` as root.
///
/// # Errors
/// The build fails, or the program cannot be started. Its own failure ends this process with its
/// exit code.
pub(crate) fn pass_on(arguments: &[OsString]) -> Result<()> {
    if arguments.first().is_some_and(|word| word == "up") {
        setup::packages()?;
        run(cargo().args(["build", "--quiet", "--package", "ckpt-cli", "--package", "ckpt-tests"]))?;
    }
    let tool = target().join("debug/ckpt-cluster");
    let mut command = as_root(tool.to_str().context("path of the build folder")?);
    let status: ExitStatus = command.args(arguments).status().context("cannot start ckpt-cluster")?;
    match status.code() {
        Some(0) => Ok(()),
        code => exit(code.unwrap_or(1)),
    }
}

/// Cargo's build folder.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from)
}
