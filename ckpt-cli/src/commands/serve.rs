//! `ckpt serve`: the agent on a node, with frames on its standard streams.

use super::log_to_stderr;
use crate::{
    cluster::{agent, live::LiveEngine},
    ui::Failed,
};
use nix::unistd::{dup2_stdin, dup2_stdout};
use std::{
    fs::File,
    io::{self, stderr, stdin, stdout},
    os::fd::AsFd,
};

/// Serve a coordinator on standard input and output
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(super) struct Arguments {}

pub(super) fn run(_: &Arguments) -> Result<(), Failed> {
    let (input, output) =
        streams().map_err(|error| Failed::other(format!("setting up the agent's streams: {error}")))?;
    let served = agent::serve(&LiveEngine::default(), input, output, &|hello| log_to_stderr(&hello.log));
    served.map_err(|error| Failed::other(format!("{error:#}")))
}

/// The streams that carry frames, moved away from the numbers 0 and 1: nothing that is printed by
/// mistake, and no process that inherits standard streams, can then disturb them.
fn streams() -> io::Result<(File, File)> {
    let input = stdin().as_fd().try_clone_to_owned()?;
    let output = stdout().as_fd().try_clone_to_owned()?;
    dup2_stdin(File::open("/dev/null")?)?;
    dup2_stdout(stderr())?;
    Ok((input.into(), output.into()))
}
