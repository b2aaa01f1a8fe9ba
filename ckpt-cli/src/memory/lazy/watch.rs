//! What happens to the job when the process that fills its memory dies too early.
//!
//! A userfaultfd that nobody holds any more is as if it had never been: pages that are missing become zero, and the job
//! computes on with wrong memory. So a second process, the watcher, holds the same userfaultfds. While it lives, whoever
//! needs a missing page waits. It reads from a pipe that ends when the filler dies, and then kills the job. Where the
//! watcher itself dies, the filler starts another one. Only who kills both within that moment defeats it.

use crate::sys::{fork, pidfd, unix_socket};
use crate::tracee::proc;
use anyhow::{Context as _, Result};
use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, pipe2, read, setsid, write};
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Looks for processes of the job after the first that kills them: one may be forking just then.
const ROUNDS: u32 = 5;

/// The second process. Dropping it without [`Watcher::dismiss`] is as the filler's death.
pub(super) struct Watcher {
    pid: i32,
    ours: OwnedFd,
}

impl Watcher {
    /// Starts a watcher for these processes and their descendants. It holds all descriptors that we hold now.
    pub(super) fn start(pids: &[i32]) -> Result<Self> {
        let processes: Vec<(i32, OwnedFd)> =
            pids.iter().filter_map(|pid| Some((*pid, pidfd::open(*pid).ok()?))).collect();
        let (its, ours) = pipe2(OFlag::O_CLOEXEC).context("making a pipe for the watcher")?;
        use std::os::fd::AsRawFd;
        let number = ours.as_raw_fd();
        let pid = fork::fork(|| {
            // Our copy of the end that is the filler's, or its death would not be seen.
            drop(unix_socket::own(number));
            watch(&its, &processes);
            0
        });
        Ok(Self { pid: pid.context("starting a watcher")?, ours })
    }

    /// Has it died?
    pub(super) fn is_gone(&self) -> bool {
        !matches!(
            waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG)),
            Ok(nix::sys::wait::WaitStatus::StillAlive)
        )
    }

    /// Lets it end without killing anything.
    pub(super) fn dismiss(self) {
        // Fails only if it is dead already.
        let _ = write(&self.ours, b"d");
        let _ = waitpid(Pid::from_raw(self.pid), None);
    }
}

fn watch(pipe: &OwnedFd, processes: &[(i32, OwnedFd)]) {
    // Neither a terminal nor the end of a session ends it.
    let _ = setsid();
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None);
    let _ = nix::sys::prctl::set_name(c"ckpt-watch");
    let mut byte = [0];
    loop {
        match read(pipe, &mut byte) {
            Err(nix::Error::EINTR) => {}
            Ok(1) => return,
            _ => break,
        }
    }
    let mut killed = BTreeSet::new();
    for _ in 0..ROUNDS {
        // Descendants first: when a parent is gone, nothing leads to its children any more.
        let alive = processes.iter().filter(|(_, process)| pidfd::send_signal(process.as_fd(), 0).is_ok());
        for pid in alive.flat_map(|(pid, _)| proc::tree(*pid).into_iter().skip(1)) {
            if killed.insert(pid) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        for (_, process) in processes {
            let _ = pidfd::send_signal(process.as_fd(), libc::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
