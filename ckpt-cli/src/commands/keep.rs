//! `ckpt keep`: holds trackers between two dumps.

use crate::{memory::keeper, ui::Failed};
use std::path::PathBuf;

/// Hold what tracks the memory of a job between two dumps
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(super) struct Arguments {
    /// Where to listen
    socket: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failed> {
    let keep = || {
        // It outlives the session that the dump was started from.
        let _ = nix::unistd::setsid();
        nix::sys::prctl::set_name(c"ckpt-keep")?;
        let client = keeper::first_client()?;
        keeper::run(&arguments.socket, client)
    };
    keep().map_err(|error| Failed::other(format!("{error:#}")))
}
