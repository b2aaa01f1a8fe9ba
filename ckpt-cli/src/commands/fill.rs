//! `ckpt fill`: fills the memory of processes that `ckpt restore --lazy` has let go.

use super::log_to_stderr;
use crate::{memory::lazy::server, ui::Failed};

/// Fill the memory of a restored job
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(super) struct Arguments {}

pub(super) fn run(_: &Arguments) -> Result<(), Failed> {
    log_to_stderr("warn");
    let filled = server::first_client().and_then(server::run);
    filled
        .map_err(|error| Failed::other(format!("filling the job's memory: {error:#}")).note("it was killed"))
}
