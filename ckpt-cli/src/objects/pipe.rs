//! Pipes and FIFOs, with what was written and not yet read.

use super::{Captured, Probe, RebuildContext, open_flags};
use anyhow::{Context as _, Result};
use ckpt_common::image::objects::Pipe;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use std::collections::HashSet;
use std::collections::hash_map::Entry;
use std::os::fd::{AsRawFd, OwnedFd};

/// Key of a pipe: its inode number. FIFOs lie on other file systems than pipes, so the device counts too.
pub fn key(probe: &Probe) -> u64 {
    probe.stat.st_ino ^ probe.stat.st_dev.rotate_left(40)
}

/// Captures one end; `seen` holds the pipes whose content was taken already.
pub fn capture(probe: &Probe, seen: &mut HashSet<u64>) -> Result<Captured> {
    let inode = key(probe);
    let capacity =
        fcntl(&probe.file, FcntlArg::F_GETPIPE_SZ).context("asking for the pipe's capacity")? as u32;
    let data = seen.insert(inode).then(|| peek(probe, capacity)).transpose()?;
    // A FIFO without a name is a pipe like any other.
    let named = !probe.link.starts_with("pipe:") && probe.stat.st_nlink > 0;
    let path = named.then(|| probe.link.clone());
    Captured::new(&Pipe { inode, path, capacity, data })
}

/// Reads the content without taking it: tee(2) into a pipe of ours.
fn peek(probe: &Probe, capacity: u32) -> Result<Vec<u8>> {
    // A second description, for reading and without blocking: the flags of the program's own stay as they are.
    let source =
        RebuildContext::reopen(&probe.file, libc::O_RDONLY | libc::O_NONBLOCK).context("opening the pipe")?;
    let waiting = crate::sys::ioctl::readable(std::os::fd::AsFd::as_fd(&source))?;
    if waiting == 0 {
        return Ok(Vec::new());
    }
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(capacity as i32)).context("sizing the pipe that takes the copy")?;
    let copied = nix::fcntl::tee(&source, &write, waiting, nix::fcntl::SpliceFFlags::SPLICE_F_NONBLOCK)
        .context("copying the content of a pipe")?;
    anyhow::ensure!(copied == waiting, "copied {copied} of {waiting} bytes of a pipe");
    let mut data = vec![0u8; copied];
    let mut done = 0;
    while done < copied {
        done += nix::unistd::read(&read, &mut data[done..])?;
    }
    Ok(data)
}

/// Makes one end. The first end made of a pipe makes the pipe and puts its content in.
pub fn rebuild(pipe: &Pipe, flags: i32, context: &mut RebuildContext<'_>) -> Result<OwnedFd> {
    let handle = match context.by_inode.entry(pipe.inode) {
        Entry::Occupied(made) => made.into_mut(),
        Entry::Vacant(place) => place.insert(make(pipe)?),
    };
    let mut rest = pipe.data.as_deref().unwrap_or_default();
    while !rest.is_empty() {
        let n = nix::unistd::write(&*handle, rest).context("filling a pipe")?;
        rest = &rest[n..];
    }
    let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
    nix::fcntl::open(path.as_str(), open_flags(flags), Mode::empty()).context("opening an end of a pipe")
}

/// A handle on the pipe for both directions, which never blocks for the other end (fifo(7)).
fn make(pipe: &Pipe) -> Result<OwnedFd> {
    let handle = match &pipe.path {
        Some(path) => {
            if !std::path::Path::new(path).exists() {
                nix::unistd::mkfifo(path.as_str(), Mode::from_bits_truncate(0o600))
                    .with_context(|| format!("creating FIFO {path}"))?;
            }
            let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            nix::fcntl::open(path.as_str(), flags, Mode::empty())
                .with_context(|| format!("opening FIFO {path}"))?
        }
        None => {
            let (read, _write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
            RebuildContext::reopen(&read, libc::O_RDWR | libc::O_NONBLOCK)?
        }
    };
    fcntl(&handle, FcntlArg::F_SETPIPE_SZ(pipe.capacity as i32)).context("setting the pipe's capacity")?;
    Ok(handle)
}
