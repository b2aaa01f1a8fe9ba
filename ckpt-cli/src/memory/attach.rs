//! A userfaultfd for a program that knows nothing of it.
//!
//! It must be made by a thread of the program, because it belongs to the caller's address space; and the program may
//! lack the right to make one. So the thread is sent our `/dev/userfaultfd` through a socket, makes the userfaultfd
//! with it, and we take that out of its table before the thread closes everything again, all in one remote batch.
//! Should we be killed in the middle, the thread goes on to the closing.

use crate::sys::pidfd;
use crate::sys::userfaultfd::{self, IOC_NEW, Userfaultfd, feature};
use crate::tracee::{Arena, Batch, Stopped};
use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::collections::BTreeSet;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// What a tracker needs of the kernel: asynchronous write protection.
pub const TRACKING: u64 = feature::PAGEFAULT_FLAG_WP | feature::WP_UNPOPULATED | feature::WP_ASYNC;
/// What the kernel must have to let write faults wait for us.
pub const ASKING: u64 = feature::PAGEFAULT_FLAG_WP;
/// Descriptors that the thread has for a moment: two of the socket pair, the device, the userfaultfd.
const NUMBERS: usize = 4;

/// Makes a userfaultfd for the address space of a stopped thread, with these features.
///
/// All threads of the process must be stopped: descriptors are made under numbers that are known beforehand.
///
/// # Errors
/// The kernel has no userfaultfd for this, or the process has no descriptors left. It is as it was.
pub fn userfaultfd(thread: &mut Stopped, arena: Arena, features: u64) -> Result<Userfaultfd> {
    let made = make(thread, arena)?;
    made.enable(features).context("write protection by userfaultfd (asynchronous: Linux 6.7)")?;
    Ok(made)
}

fn make(thread: &mut Stopped, arena: Arena) -> Result<Userfaultfd> {
    let device = userfaultfd::device().context("opening /dev/userfaultfd")?;
    let process = pidfd::open(thread.pid).context("opening a pidfd")?;
    let [ours, its, given, wanted] = free_numbers(thread.pid)?;

    let mut batch = Batch::new(arena);
    let pair = batch.bytes(&[0; 8]);
    let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
    batch.call("socketpair", libc::SYS_socketpair, &[libc::AF_UNIX as u64, kind, 0, pair]);
    batch.pause();
    // struct msghdr: name, its length, vector, its length, control, its length, flags
    let (byte, control) = (batch.bytes(&[0; 8]), batch.bytes(&[0; 24]));
    let piece = batch.bytes(&words(&[byte, 1]));
    let message = batch.bytes(&words(&[0, 0, piece, 1, control, 24, 0]));
    let flags = (libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) as u64;
    batch.call("recvmsg", libc::SYS_recvmsg, &[its, message, flags]);
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let new = batch.call("USERFAULTFD_IOC_NEW", libc::SYS_ioctl, &[given, IOC_NEW, flags]);
    batch.pause();
    for number in [wanted, given, its, ours] {
        batch.call("close", libc::SYS_close, &[number]);
    }

    let mut made = Err(anyhow::anyhow!("the batch did not come so far"));
    let mut sent = Ok(());
    let done = thread.run_with_pauses(batch, true, |pause| match pause {
        0 => sent = send(&process, ours, device.as_fd()),
        _ => made = pidfd::getfd(process.as_fd(), wanted as i32).context("taking the userfaultfd"),
    })?;
    sent?;
    let number = done.result(new).context("making a userfaultfd")?;
    ensure!(number as u64 == wanted, "descriptor {number} instead of {wanted}");
    Ok(made?.into())
}

fn send(process: &OwnedFd, number: u64, device: BorrowedFd<'_>) -> Result<()> {
    let socket = pidfd::getfd(process.as_fd(), number as i32).context("taking the socket")?;
    let rights = [device.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&rights)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&[0])], &control, MsgFlags::MSG_NOSIGNAL, None)
        .context("handing /dev/userfaultfd over")?;
    Ok(())
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The numbers that the process's next descriptors will have: the lowest that are free.
fn free_numbers(pid: i32) -> Result<[u64; NUMBERS]> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).context("listing descriptors")?;
    let used: BTreeSet<u64> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    let mut free = (0..).filter(|number| !used.contains(number));
    Ok(std::array::from_fn(|_| free.next().unwrap_or_default()))
}
