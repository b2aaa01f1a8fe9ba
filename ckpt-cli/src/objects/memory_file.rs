//! memfd_create(2) and shared anonymous memory.

use super::{CaptureContext, Captured, Probe, RebuildContext};
use anyhow::{Context as _, Result};
use ckpt_common::image::objects::MemoryFile;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek};
use std::ffi::CString;
use std::fs::File;
use std::os::fd::OwnedFd;

/// Captures the object; its content is staged once, however many descriptors and mappings show it.
pub fn capture(probe: &Probe, context: &mut dyn CaptureContext) -> Result<Captured> {
    let file =
        File::from(RebuildContext::reopen(&probe.file, libc::O_RDONLY).context("opening it for reading")?);
    let size = probe.stat.st_size as u64;
    let content = context.stage((probe.stat.st_dev, probe.stat.st_ino), &file)?;
    let name = probe.link.strip_prefix("/memfd:").map(|n| n.trim_end_matches(" (deleted)").to_owned());
    // Shared anonymous memory has no seals and answers EINVAL.
    let seals = fcntl(&probe.file, FcntlArg::F_GET_SEALS).unwrap_or(0);
    Captured::new(&MemoryFile {
        name,
        inode: probe.stat.st_ino ^ probe.stat.st_dev.rotate_left(40),
        size,
        seals,
        mode: probe.stat.st_mode & 0o7777,
        position: probe.info.pos,
        content,
    })
}

/// Makes the object, or opens it once more.
pub fn rebuild(file: &MemoryFile, flags: i32, context: &mut RebuildContext<'_>) -> Result<OwnedFd> {
    if !context.by_inode.contains_key(&file.inode) {
        let made = match &file.name {
            Some(name) => {
                let name = CString::new(name.as_str()).context("memfd name with a NUL")?;
                let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
                memfd_create(name.as_c_str(), flags).context("memfd_create")?
            }
            None => {
                crate::sys::memory::shared_anonymous(file.size).context("mapping shared anonymous memory")?
            }
        };
        let out = File::from(made);
        if file.name.is_some() {
            out.set_len(file.size).context("sizing a memfd")?;
            nix::sys::stat::fchmod(&out, nix::sys::stat::Mode::from_bits_truncate(file.mode))?;
        }
        (context.fill)(file.content, &out).context("restoring shared memory")?;
        context.by_inode.insert(file.inode, out.into());
    }
    let fd = RebuildContext::reopen(&context.by_inode[&file.inode], flags)?;
    if file.position != 0 {
        lseek(&fd, file.position as i64, Whence::SeekSet)?;
    }
    Ok(fd)
}
