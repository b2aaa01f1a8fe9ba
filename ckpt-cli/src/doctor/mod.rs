//! What this node offers. Each feature is probed by itself, by using it on something harmless, and
//! no probe depends on another feature than the one it is about.

mod features;

use crate::store::{Store, StoreError};
use ckpt_common::wire::{Probe, ProbeState};
use std::{fs, os::unix::fs::MetadataExt, path::Path};

/// What a probe found: a detail, or why it does not work.
type Found = Result<String, String>;

/// Looks at everything.
pub fn probe(store: &Path) -> Vec<Probe> {
    use ProbeState::{Degraded, Missing};
    let probes: [(&str, ProbeState, &str, Found); 14] = [
        ("machine", Missing, "anything", features::machine()),
        ("privileges", Missing, "anything", features::privileges()),
        ("ptrace", Missing, "freezing and rebuilding processes", features::ptrace()),
        ("pidfd_getfd", Missing, "looking at open files", features::pidfd_getfd()),
        ("kcmp", Missing, "finding what processes share", features::kcmp()),
        (
            "checkpoint/restore",
            Missing,
            "rebuilding address spaces and timers",
            features::checkpoint_restore(),
        ),
        ("clone3 set_tid", Missing, "the same PIDs after a restore", features::set_tid()),
        ("PAGEMAP_SCAN", Missing, "finding the pages to save", features::pagemap_scan()),
        ("TCP_REPAIR", Missing, "connections", features::tcp_repair()),
        ("BPF on cgroups", Missing, "connections", features::hold()),
        ("BPF on page faults", Degraded, "saving memory behind a short freeze", features::page_faults()),
        ("BPF on mappings", Degraded, "freezes that do not grow with memory", features::mappings()),
        ("userfaultfd", Degraded, "saving only what was modified", features::userfaultfd()),
        ("store", Missing, "checkpoints", store_state(store)),
    ];
    let probe = |(name, worst, needed_for, found): (&str, ProbeState, &str, Found)| {
        let (state, detail) = match found {
            Ok(detail) => (ProbeState::Works, detail),
            Err(detail) => (worst, detail),
        };
        Probe { name: name.to_owned(), state, detail, needed_for: needed_for.to_owned() }
    };
    probes.into_iter().map(probe).collect()
}

/// Have we the privileges that dump and restore need? If not: what is missing.
pub fn privileges() -> Result<(), String> {
    features::privileges().map(drop)
}

/// Can checkpoints be written here?
fn store_state(path: &Path) -> Found {
    let directory = match Store::open(path) {
        Ok(_) => path.join("tmp"),
        // It would be made by the first dump.
        Err(StoreError::NoStore { .. }) if !path.exists() => {
            let above = path.ancestors().find(|path| path.is_dir()).ok_or("no directory above it exists")?;
            above.to_owned()
        }
        Err(error) => return Err(error.to_string()),
    };
    let file = directory.join(format!(".ckpt-doctor-{}", std::process::id()));
    let tried = fs::File::create_new(&file).and_then(|file| file.sync_all());
    let _ = fs::remove_file(&file);
    tried.map_err(|error| format!("cannot write in {}: {error}", directory.display()))?;
    let space = nix::sys::statvfs::statvfs(&directory).map_err(|error| error.to_string())?;
    let free = space.blocks_available() * space.fragment_size();
    let state = if directory.starts_with(path) { "" } else { ", to be made by the first dump" };
    let mode = fs::metadata(path).map(|meta| meta.mode() & 0o077).unwrap_or_default();
    if mode != 0 {
        return Err(format!("{} can be entered by others (chmod 700 it)", path.display()));
    }
    Ok(format!("{}{state}, {} MiB free", path.display(), free >> 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_probe_has_something_to_say() {
        let directory = tempfile::TempDir::new().unwrap();
        let probes = probe(&directory.path().join("store"));
        assert_eq!(probes.len(), 14);
        assert!(probes.iter().all(|probe| !probe.detail.is_empty() && !probe.needed_for.is_empty()));
        // These need neither privileges nor special kernels.
        for name in ["pidfd_getfd", "store"] {
            let probe = probes.iter().find(|probe| probe.name == name).unwrap();
            assert_eq!(probe.state, ProbeState::Works, "{probe:?}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "a probe left a file behind");
    }

    #[test]
    fn a_store_that_is_none_is_reported() {
        let directory = tempfile::TempDir::new().unwrap();
        fs::write(directory.path().join("thesis.tex"), "x").unwrap();
        assert!(store_state(directory.path()).unwrap_err().contains("no checkpoint store"));
        let store = directory.path().join("store");
        Store::create(&store).unwrap();
        assert!(store_state(&store).unwrap().contains("MiB free"));
    }
}
