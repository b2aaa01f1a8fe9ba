//! `ckpt serve`: the agent on a node, with frames on its standard streams.

use super::log_to_stderr;
use crate::{
    cluster::{agent, live::LiveEngine},
    ui::Failed,
};

/// Serve a coordinator on standard input and output
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(super) struct Arguments {}

pub(super) fn run(_: &Arguments) -> Result<(), Failed> {
    let served =
        agent::serve(&LiveEngine, std::io::stdin(), std::io::stdout(), &|hello| log_to_stderr(&hello.log));
    served.map_err(|error| Failed::other(format!("{error:#}")))
}
