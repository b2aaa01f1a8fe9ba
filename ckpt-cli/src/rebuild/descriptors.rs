//! The descriptor table of a stub: descriptors taken from our table, and registrations that depend on their numbers.

use super::files::Files;
use super::tree::Stub;
use crate::tracee::Batch;
use anyhow::{Context as _, Result};
use ckpt_common::image::process::Process;
use std::collections::BTreeSet;

// io_uring_register(2)
const IORING_REGISTER_BUFFERS: u64 = 0;
// fcntl(2)
const F_SETOWN_EX: u64 = 15;
const F_SETSIG: u64 = 10;

/// Takes every description to its numbers.
pub(super) fn rebuild(stub: &mut Stub, process: &Process, files: &Files) -> Result<()> {
    let inheritance = stub.inheritance.clone();
    let restorer = inheritance.restorer as u64;
    let leader = stub.leader()?;
    let mut batch = Batch::new(inheritance.layout.arena);
    let mut used = BTreeSet::new();
    for descriptor in &process.fds {
        let ours = files.number(descriptor.file)? as u64;
        // The kernel gives the lowest free number, so what each call returns is known beforehand.
        let lowest = (0..).find(|n| !used.contains(n)).unwrap_or(0);
        let (got, wanted) = (lowest as u64, descriptor.fd as u64);
        batch.call(format!("taking fd {wanted} (pidfd_getfd)"), libc::SYS_pidfd_getfd, &[restorer, ours, 0]);
        if got == wanted {
            if !descriptor.cloexec {
                batch.call(format!("fd {wanted}"), libc::SYS_fcntl, &[wanted, libc::F_SETFD as u64, 0]);
            }
        } else {
            let flags = if descriptor.cloexec { libc::O_CLOEXEC as u64 } else { 0 };
            batch.call(format!("placing fd {wanted}"), libc::SYS_dup3, &[got, wanted, flags]);
            batch.call("closing a descriptor", libc::SYS_close, &[got]);
        }
        used.insert(descriptor.fd);
        leader.flush(&mut batch)?;
    }
    for descriptor in &process.fds {
        for target in files.epoll(descriptor.file, process).context("rebuilding an epoll")? {
            let mut event = target.events.to_ne_bytes().to_vec(); // struct epoll_event is packed on x86-64
            event.extend_from_slice(&target.data.to_ne_bytes());
            let at = batch.bytes(&event);
            let (fd, watched) = (descriptor.fd as u64, target.fd as u64);
            batch.call(
                format!("epoll fd {fd} watching fd {watched}"),
                libc::SYS_epoll_ctl,
                &[fd, libc::EPOLL_CTL_ADD as u64, watched, at],
            );
            leader.flush(&mut batch)?;
        }
    }
    let mut registered = BTreeSet::new();
    for descriptor in process.fds.iter().filter(|descriptor| registered.insert(descriptor.file)) {
        // struct iovec: address, length
        let buffers = files.buffers(descriptor.file, process);
        let words = buffers.iter().flat_map(|(start, len)| [start.to_ne_bytes(), len.to_ne_bytes()]);
        let words: Vec<u8> = words.flatten().collect();
        if words.is_empty() {
            continue;
        }
        leader.flush_for(&mut batch, words.len())?;
        let (fd, at) = (descriptor.fd as u64, batch.bytes(&words));
        let args = [fd, IORING_REGISTER_BUFFERS, at, buffers.len() as u64];
        batch.call(format!("the buffers of io_uring fd {fd}"), libc::SYS_io_uring_register, &args);
        leader.flush(&mut batch)?;
    }
    for descriptor in &process.fds {
        let Some((kind, pid, signal)) = files.owner(descriptor.file) else { continue };
        let fd = descriptor.fd as u64;
        // A process that has ended since it was named gets nothing, as before.
        if pid != 0 && files.is_process(pid) {
            let at = batch.bytes(&[kind.to_ne_bytes(), pid.to_ne_bytes()].concat());
            batch.call(format!("the owner of fd {fd}"), libc::SYS_fcntl, &[fd, F_SETOWN_EX, at]);
        }
        batch.call(format!("the signal of fd {fd}"), libc::SYS_fcntl, &[fd, F_SETSIG, signal as u64]);
        leader.flush(&mut batch)?;
    }
    for (fd, lock) in files.locks(process) {
        // struct flock: type, whence, start, length, pid
        let mut bytes = (lock.kind as i16).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&[0; 6]);
        bytes.extend_from_slice(&lock.start.to_ne_bytes());
        bytes.extend_from_slice(&lock.length.to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        let at = batch.bytes(&bytes);
        batch.call(format!("locking fd {fd}"), libc::SYS_fcntl, &[fd as u64, libc::F_SETLK as u64, at]);
        leader.flush(&mut batch)?;
    }
    batch.call("closing the way to our table", libc::SYS_close, &[restorer]);
    leader.run(batch, false)?.all_ok()?;
    Ok(())
}
