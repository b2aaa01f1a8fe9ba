//! Bars, on terminals only.

use super::{Ui, bytes};
use crate::cluster::coordinator::Observer;
use ckpt_common::wire::Phase;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;

/// Shows how a dump or restore goes on; gone when dropped.
pub struct Progress {
    ui: Ui,
    bar: ProgressBar,
}

impl Progress {
    pub(super) fn new(ui: Ui) -> Self {
        let target = match ui.progress {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(None, target);
        bar.set_style(ProgressStyle::default_spinner());
        if ui.progress {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Self { ui, bar }
    }
}

impl Observer for Progress {
    fn phase(&self, phase: Phase) {
        self.bar.set_message(match phase {
            Phase::Plan => "looking at the job",
            Phase::Arm => "getting ready",
            Phase::Cut | Phase::Settle => "freezing the job",
            Phase::Run => "letting the job run on",
            Phase::Save => "saving",
            Phase::Commit => "committing",
            Phase::Build => "building processes",
            Phase::Connect => "connecting",
            Phase::Release => "letting the job run",
            Phase::Abort => "undoing",
        });
    }

    fn saved(&self, done: u64, of: u64) {
        self.bar.set_message(format!("saving {} of {}", bytes(done), bytes(of)));
    }

    fn warn(&self, text: &str) {
        self.bar.suspend(|| self.ui.warn(text));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
