//! A pack in the making, as a file.

use super::{Result, StoreError, files};
use crate::sys::write_behind;
use ckpt_common::image::{
    Digest,
    pack::{self, ChunkEntry, Header, MAX_CHUNKS},
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::{fs::File, io::Write, path::PathBuf};
use zerocopy::IntoBytes;

/// Bytes after which writing out begins.
const STEP: u64 = 8 << 20;
/// Bytes that may be on their way to the disk.
const BEHIND: u64 = 32 << 20;

/// A pack that is complete and flushed, under a temporary name.
pub(super) struct FinishedPack {
    pub(super) path: PathBuf,
    pub(super) id: Digest,
    pub(super) bytes: u64,
}

/// A pack in the making.
///
/// What is written is sent to the disk all the while, and then dropped from the page cache: a dump
/// must not push out what the job needs there, and the flush at the end has little to wait for.
pub(super) struct PackFile {
    path: PathBuf,
    file: File,
    header: Header,
    chunks: Vec<ChunkEntry>,
    offset: u64,
    /// Writing out has begun up to here, and is complete up to there; `None` where the file system
    /// cannot be asked for it.
    sent: Option<(u64, u64)>,
}

impl PackFile {
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        let header = Header::new(files::nonce()?);
        let mut file = files::create_new(&path)?;
        file.write_all(header.as_bytes()).map_err(StoreError::io("write", &path))?;
        let (chunks, offset) = (Vec::new(), Header::SIZE as u64);
        Ok(Self { path, file, header, chunks, offset, sent: Some((0, 0)) })
    }

    /// Appends a chunk; gives its number.
    pub(super) fn append(&mut self, entry: ChunkEntry, stored: &[u8]) -> Result<u32> {
        self.file.write_all(stored).map_err(StoreError::io("write", &self.path))?;
        self.chunks.push(entry.at(self.offset));
        self.offset += stored.len() as u64;
        self.send()?;
        Ok(self.chunks.len() as u32 - 1)
    }

    /// Is there no room for another chunk?
    pub(super) fn is_full(&self) -> bool {
        self.chunks.len() as u32 == MAX_CHUNKS
    }

    fn send(&mut self) -> Result<()> {
        let Some((begun, done)) = self.sent else { return Ok(()) };
        if self.offset - begun < STEP {
            return Ok(());
        }
        let mut sent = (self.offset, done);
        let mut result = write_behind::start(&self.file, begun, self.offset - begun);
        if result.is_ok() && begun - done >= BEHIND - STEP {
            result = write_behind::wait(&self.file, done, STEP);
            sent.1 = done + STEP;
            self.forget(done, STEP);
        }
        self.sent = match result {
            Ok(()) => Some(sent),
            // File systems that cannot do it. Any other error is one of the disk, which would not
            // be reported a second time.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ESPIPE | libc::ENOSYS)) =>
            {
                None
            }
            Err(error) => return Err(StoreError::io("write", &self.path)(error)),
        };
        Ok(())
    }

    /// Drops written pages from the page cache. A file system that keeps them does no harm.
    fn forget(&self, offset: u64, length: u64) {
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        let _ = posix_fadvise(&self.file, offset as i64, length as i64, advice);
    }

    /// Writes the index and makes everything durable.
    pub(super) fn finish(mut self) -> Result<FinishedPack> {
        let (tail, id) = pack::finish(&self.header, &self.chunks);
        self.file.write_all(&tail).map_err(StoreError::io("write", &self.path))?;
        self.file.sync_all().map_err(StoreError::io("flush", &self.path))?;
        self.forget(0, 0);
        Ok(FinishedPack { path: self.path, id, bytes: self.offset + tail.len() as u64 })
    }
}
