//! The guard: no socket of a live job stays in repair mode, not even if we are killed.

use super::repair::{OFF_WITHOUT_PROBE, TCP_REPAIR};
use crate::sys::{guard, socket};
use anyhow::{Context, Result};
use libc::{IPPROTO_TCP, SO_REUSEADDR, SOL_SOCKET};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// A process that holds descriptors of sockets while they are captured. When this value is dropped or this process
/// dies, it turns repair mode off for all of them.
#[derive(Debug)]
pub struct Guard {
    socket: Option<OwnedFd>,
    process: Pid,
}

impl Guard {
    /// Starts a guard, in less than a millisecond where this process is small: before the freeze.
    ///
    /// # Errors
    /// No more processes.
    pub fn start() -> Result<Self> {
        let off = (IPPROTO_TCP, TCP_REPAIR, OFF_WITHOUT_PROBE);
        // By the value of SO_REUSEADDR, which turning repair mode off clears.
        let lists = [[off, (SOL_SOCKET, SO_REUSEADDR, 0)], [off, (SOL_SOCKET, SO_REUSEADDR, 1)]];
        let (socket, process) = guard::spawn(&lists).context("start the guard of TCP sockets")?;
        Ok(Self { socket: Some(socket), process: Pid::from_raw(process) })
    }

    /// Hands a socket to the guard, in microseconds: before it is captured.
    ///
    /// # Errors
    /// Not a TCP socket, or the guard is gone.
    pub fn watch(&self, fd: BorrowedFd<'_>) -> Result<()> {
        let reuse: i32 = socket::get(fd, SOL_SOCKET, SO_REUSEADDR).context("SO_REUSEADDR")?;
        // In flight or received, the guard has it: it reads everything before it sees our end.
        self.send(u8::from(reuse == 1), &[ControlMessage::ScmRights(&[fd.as_raw_fd()])])
            .context("hand a TCP socket to its guard")
    }

    /// No socket is in repair mode any more: the guard ends without touching any.
    ///
    /// # Errors
    /// The guard is gone.
    pub fn dismiss(mut self) -> Result<()> {
        self.send(0, &[]).context("dismiss the guard of TCP sockets")?;
        self.socket = None;
        match waitpid(self.process, None) {
            // Whoever waits for any child may have been told of its end.
            Ok(_) | Err(Errno::ECHILD) => Ok(()),
            Err(error) => Err(error).context("wait for the guard of TCP sockets"),
        }
    }

    fn send(&self, byte: u8, control: &[ControlMessage<'_>]) -> Result<()> {
        let socket = self.socket.as_ref().context("dismissed already")?;
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&[byte])], control, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(socket) = self.socket.take() {
            drop(socket);
            // It acts now; nothing could be done about a failure.
            let _ = waitpid(self.process, None);
        }
    }
}
