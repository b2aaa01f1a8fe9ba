//! Silence is counted only while we ourselves run.
//!
//! On a node that is stopped for seconds (a virtual machine that is moved, a scheduler that favours others), the side
//! that wakes up first must not take the other's silence for its end.

use std::time::{Duration, Instant};

/// Looks between which more than this passes were held up.
const USUAL: Duration = Duration::from_millis(500);

/// Tells for how long the caller did not run, from look to look.
#[derive(Debug)]
pub(super) struct Awake(Instant);

impl Awake {
    /// Begins now.
    pub(super) fn new() -> Self {
        Self(Instant::now())
    }

    /// How long we were held up since the last look; zero where the looks follow each other as they should.
    pub(super) fn held_up(&mut self) -> Duration {
        let now = Instant::now();
        let between = now - std::mem::replace(&mut self.0, now);
        if between > USUAL { between } else { Duration::ZERO }
    }
}
