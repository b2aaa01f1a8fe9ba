//! A copy of a running program, in several ways: ckpt's, and what they are compared with.

use super::program::{Cost, Order, Writer, now};
use super::{Bench, is_there, ms, wait};
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::time::Duration;

/// An undisturbed time before each measurement.
const UNDISTURBED: Duration = Duration::from_millis(500);
/// A copy may end before the program runs again.
const SETTLES: Duration = Duration::from_millis(50);
const PIECE: usize = 1 << 20;

/// How the copy is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// A dump with `--cow` this
    Ckpt(&'static str),
    /// SIGSTOP, all memory read, SIGCONT
    Frozen,
    /// The program forks itself, the child reads all memory
    Fork,
    /// The program forks itself, the child gives all memory to `zstd -1`
    ForkAndSave,
    /// Nothing happens
    Nothing,
}

pub(super) const WAYS: [Way; 7] = [
    Way::Nothing,
    Way::Frozen,
    Way::Fork,
    Way::ForkAndSave,
    Way::Ckpt("bpf"),
    Way::Ckpt("uffd"),
    Way::Ckpt("stop"),
];

impl Way {
    pub(super) fn name(self) -> String {
        match self {
            Self::Ckpt(way) => format!("--cow {way}"),
            Self::Frozen => "frozen copy".to_owned(),
            Self::Fork => "fork, read".to_owned(),
            Self::ForkAndSave => "fork, zstd".to_owned(),
            Self::Nothing => "nothing".to_owned(),
        }
    }
}

/// What a copy has cost.
#[derive(Clone, Debug)]
pub(super) struct Taken {
    pub(super) cost: Cost,
    /// Of the whole copy, ms.
    pub(super) took: f64,
    /// The pause in ckpt's own words, ms.
    pub(super) frozen: f64,
    /// Old content was lost, and the dump began again with `stop`.
    pub(super) fell_back: bool,
}

impl Bench {
    /// A dump of the writer; the document.
    pub(super) fn dump(&self, writer: &Writer, name: &str, more: &[&str]) -> Result<(Value, Duration)> {
        let pid = writer.job.pid.to_string();
        let done = self.ckpt(&[&["dump", "--pid", &pid, "--name", name], more].concat())?;
        self.prune()?;
        Ok(done)
    }

    /// Removes what no later dump or restore needs: the disk must hold a whole run.
    fn prune(&self) -> Result<()> {
        self.ckpt(&["prune"]).map(drop)
    }

    /// Makes a copy of the writer while it works.
    pub(super) fn take(&self, writer: &mut Writer, way: Way) -> Result<Taken> {
        let mut copy = vec![1; if way == Way::Frozen { (writer.mib as usize) << 20 } else { 0 }];
        warm_up(2 * writer.mib);
        let before = now();
        std::thread::sleep(UNDISTURBED);
        let start = now();
        let (mut frozen, mut fell_back) = (0.0, false);
        match way {
            Way::Ckpt(cow) => {
                let pid = writer.job.pid.to_string();
                let arguments = ["dump", "--pid", &pid, "--name", "writer", "--cow", cow];
                let (document, _, warnings) = self.ckpt_with_warnings(&arguments)?;
                fell_back = warnings.contains("trying again");
                frozen = document["paused_us"].as_f64().context("no pause")? / 1e3;
            }
            Way::Frozen => {
                let start = now();
                frozen_copy(writer, &mut copy)?;
                frozen = ms(now() - start);
            }
            Way::Fork | Way::ForkAndSave => {
                let child = writer.order(Order::Fork { save: way == Way::ForkAndSave })?;
                wait("the fork has ended", || !is_there(child))?;
                let _ = fs::remove_file(self.path("saved"));
            }
            Way::Nothing => std::thread::sleep(UNDISTURBED),
        }
        let end = now();
        // The next way shall not wait for what this one leaves the disk to do.
        nix::unistd::sync();
        // A pause is noted when it is over.
        std::thread::sleep(SETTLES);
        let mut cost = writer.window(start, end)?.cost(&writer.window(before, start)?);
        cost.pause = writer.window(start, now())?.gap();
        if matches!(way, Way::Ckpt(_)) {
            self.prune()?;
        }
        Ok(Taken { cost, took: ms(end - start), frozen, fell_back })
    }
}

/// Has memory at hand for whoever needs it next. In a virtual machine whose host takes unused memory back, the first
/// way would pay for that of the others, too.
fn warm_up(mib: u64) {
    std::hint::black_box(vec![1_u8; (mib as usize) << 20]);
}

/// Reads all memory while the writer is stopped.
fn frozen_copy(writer: &Writer, copy: &mut [u8]) -> Result<()> {
    let pid = Pid::from_raw(writer.job.pid as i32);
    kill(pid, Signal::SIGSTOP).context("stopping the writer")?;
    let read = read_all(writer, copy);
    kill(pid, Signal::SIGCONT).context("letting the writer run on")?;
    read
}

/// Reads all memory of the writer.
pub(super) fn read_all(writer: &Writer, copy: &mut [u8]) -> Result<()> {
    let base = writer.address()? as usize;
    for (number, piece) in copy.chunks_mut(PIECE).enumerate() {
        writer.read((base + number * PIECE) as u64, piece)?;
    }
    Ok(())
}
