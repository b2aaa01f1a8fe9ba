//! Ctrl-C and its like: the first asks us to end in good order, the second ends us at once.

use crate::ui::Failed;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1},
    flag,
};
use std::sync::{Arc, atomic::AtomicBool};

/// A flag that is set by SIGINT, SIGTERM and SIGHUP from now on. (Agents clean up by themselves
/// when we are gone, so the second signal harms nobody.)
pub(super) fn flag() -> Result<Arc<AtomicBool>, Failed> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // In this order: the first signal finds the flag still clear.
        flag::register_conditional_shutdown(signal, 130, interrupted.clone())
            .and_then(|_| flag::register(signal, interrupted.clone()))
            .map_err(|error| Failed::other(format!("watching for signals: {error}")))?;
    }
    Ok(interrupted)
}

/// A flag that is set by SIGUSR1 from now on.
pub(super) fn request() -> Result<Arc<AtomicBool>, Failed> {
    let requested = Arc::new(AtomicBool::new(false));
    flag::register(SIGUSR1, requested.clone())
        .map_err(|error| Failed::other(format!("watching for signals: {error}")))?;
    Ok(requested)
}
