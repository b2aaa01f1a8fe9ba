//! What this node offers.
use ckpt_common::wire::Probe;
use std::path::Path;
/// Probes.
pub fn probe(_store: &Path) -> Vec<Probe> {
    Vec::new()
}
