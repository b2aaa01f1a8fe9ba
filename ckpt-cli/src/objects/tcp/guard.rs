//! The guard: no socket of a live job stays in repair mode, not even if we are killed.

use super::repair::{OFF_WITHOUT_PROBE, TCP_REPAIR};
use crate::sys::{guard, socket};
use anyhow::{Context, Result};
use libc::{IPPROTO_TCP, SO_REUSEADDR, SOL_SOCKET};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// A process that watches over sockets while they are captured.
#[derive(Debug)]
pub struct Guard {
    pipe: Option<OwnedFd>,
    process: Pid,
}

impl Guard {
    /// Starts to watch over TCP sockets, in a fraction of a millisecond. To be called before the first
    /// of them is captured, after all descriptors were taken: it sees the ones that are open now.
    ///
    /// # Errors
    /// A descriptor that is not a TCP socket, or no more processes.
    pub fn watch<'a>(sockets: impl IntoIterator<Item = BorrowedFd<'a>>) -> Result<Self> {
        let one = |fd: BorrowedFd<'a>| -> Result<_> {
            let reuse: i32 = socket::get(fd, SOL_SOCKET, SO_REUSEADDR).context("SO_REUSEADDR")?;
            let off = (IPPROTO_TCP, TCP_REPAIR, OFF_WITHOUT_PROBE);
            Ok((fd.as_raw_fd(), [off, (SOL_SOCKET, SO_REUSEADDR, i32::from(reuse == 1))]))
        };
        let sockets = sockets.into_iter().map(one).collect::<Result<Vec<_>>>()?;
        let (pipe, process) = guard::spawn(&sockets).context("start the guard of TCP sockets")?;
        Ok(Self { pipe: Some(pipe), process: Pid::from_raw(process) })
    }

    /// No socket is in repair mode any more: the guard ends without touching any.
    ///
    /// # Errors
    /// The guard is gone.
    pub fn dismiss(mut self) -> Result<()> {
        let pipe = self.pipe.take().context("dismissed already")?;
        nix::unistd::write(&pipe, &[1]).context("dismiss the guard of TCP sockets")?;
        waitpid(self.process, None).context("wait for the guard of TCP sockets")?;
        Ok(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(pipe) = self.pipe.take() {
            drop(pipe);
            // It acts now; nothing could be done about a failure.
            let _ = waitpid(self.process, None);
        }
    }
}
