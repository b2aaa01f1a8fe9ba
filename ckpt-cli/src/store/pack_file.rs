//! A pack in the making, as a file.

use super::{Result, StoreError, files};
use crate::sys::{arena::Arena, write_behind};
use ckpt_common::image::{
    Digest,
    pack::{self, ChunkEntry, Header, MAX_CHUNKS},
};
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};
use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf};
use zerocopy::IntoBytes;

/// Bytes that are written at a time. A multiple of every block size.
const STEP: usize = 4 << 20;
/// Bytes that may be on their way to the disk, where they go through the page cache.
const BEHIND: u64 = 32 << 20;

/// A pack that is complete and flushed, under a temporary name.
pub(super) struct FinishedPack {
    pub(super) path: PathBuf,
    pub(super) id: Digest,
    pub(super) bytes: u64,
}

/// How the bytes get to the disk.
#[derive(Clone, Copy)]
enum Way {
    /// From our memory (`O_DIRECT`): the page cache has no part in it.
    Direct,
    /// Through the page cache, but sent on and dropped from there all the while: a dump must not
    /// push out what the job needs, and the flush at the end has little to wait for. `done` is
    /// how far that is complete.
    Behind { done: u64 },
    /// Through the page cache, where the file system offers nothing else.
    Cached,
}

/// A pack in the making.
pub(super) struct PackFile {
    path: PathBuf,
    file: File,
    header: Header,
    chunks: Vec<ChunkEntry>,
    way: Way,
    /// What comes behind `written`, in the first `filled` bytes.
    buffer: Arena,
    filled: usize,
    written: u64,
}

impl PackFile {
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        let header = Header::new(files::nonce()?);
        let file = files::create_new(&path)?;
        let way = match set_direct(&file, true) {
            Ok(()) => Way::Direct,
            Err(_) => Way::Behind { done: 0 },
        };
        let buffer = Arena::new(STEP).map_err(StoreError::io("get memory to write", &path))?;
        let mut pack = Self { path, file, header, chunks: Vec::new(), way, buffer, filled: 0, written: 0 };
        pack.push(header.as_bytes())?;
        Ok(pack)
    }

    /// Appends a chunk; gives its number.
    pub(super) fn append(&mut self, entry: ChunkEntry, stored: &[u8]) -> Result<u32> {
        self.chunks.push(entry.at(self.written + self.filled as u64));
        self.push(stored)?;
        Ok(self.chunks.len() as u32 - 1)
    }

    /// Is there no room for another chunk?
    pub(super) fn is_full(&self) -> bool {
        self.chunks.len() as u32 == MAX_CHUNKS
    }

    fn push(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let count = bytes.len().min(STEP - self.filled);
            let (now, later) = bytes.split_at(count);
            self.buffer.bytes_mut()[self.filled..self.filled + count].copy_from_slice(now);
            (self.filled, bytes) = (self.filled + count, later);
            if self.filled == STEP {
                self.write().map_err(StoreError::io("write", &self.path))?;
            }
        }
        Ok(())
    }

    /// Writes what is in the buffer.
    fn write(&mut self) -> io::Result<()> {
        let bytes = &self.buffer.bytes()[..self.filled];
        match self.file.write_all_at(bytes, self.written) {
            // Some file systems refuse only now.
            Err(error) if matches!(self.way, Way::Direct) && error.raw_os_error() == Some(libc::EINVAL) => {
                set_direct(&self.file, false)?;
                self.way = Way::Behind { done: self.written };
                self.file.write_all_at(bytes, self.written)?;
            }
            result => result?,
        }
        self.written += self.filled as u64;
        self.filled = 0;
        if let Way::Behind { done } = self.way {
            self.way = self.send(done)?;
        }
        Ok(())
    }

    /// Sends on what was written last, and waits for what was sent long ago.
    fn send(&self, done: u64) -> io::Result<Way> {
        let step = STEP as u64;
        let mut result = write_behind::start(&self.file, self.written.saturating_sub(step), step);
        let mut sent = done;
        if result.is_ok() && self.written - done > BEHIND {
            result = write_behind::wait(&self.file, done, step);
            self.forget(done, step);
            sent += step;
        }
        match result {
            Ok(()) => Ok(Way::Behind { done: sent }),
            // File systems that cannot do it. Any other error is one of the disk, which would not
            // be reported a second time.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ESPIPE | libc::ENOSYS)) =>
            {
                Ok(Way::Cached)
            }
            Err(error) => Err(error),
        }
    }

    /// Drops written pages from the page cache. A file system that keeps them does no harm.
    fn forget(&self, offset: u64, length: u64) {
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        let _ = posix_fadvise(&self.file, offset as i64, length as i64, advice);
    }

    /// Writes the index and makes everything durable.
    pub(super) fn finish(mut self) -> Result<FinishedPack> {
        let (tail, id) = pack::finish(&self.header, &self.chunks);
        self.push(&tail)?;
        if matches!(self.way, Way::Direct) {
            // The end is no whole block.
            set_direct(&self.file, false).map_err(StoreError::io("write", &self.path))?;
            self.way = Way::Cached;
        }
        self.write().map_err(StoreError::io("write", &self.path))?;
        self.file.sync_all().map_err(StoreError::io("flush", &self.path))?;
        self.forget(0, 0);
        Ok(FinishedPack { path: self.path, id, bytes: self.written })
    }
}

/// Sets or clears `O_DIRECT`; EINVAL where the file system has no such thing.
fn set_direct(file: &File, on: bool) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    let flags = if on { flags | OFlag::O_DIRECT } else { flags - OFlag::O_DIRECT };
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_common::image::pack::Encoding;
    use tempfile::TempDir;

    /// Whatever the way, and wherever the buffer's ends fall, the file has the same bytes.
    #[test]
    fn every_way_writes_the_same() {
        let directory = TempDir::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let content: Vec<u8> = (0..65_536_u32).map(|n| (n / 3) as u8).collect();
        let ways = [None, Some(Way::Behind { done: 0 }), Some(Way::Cached)];
        for (number, way) in ways.into_iter().enumerate() {
            let mut pack = PackFile::create(directory.path().join(number.to_string())).unwrap();
            if let Some(way) = way {
                set_direct(&pack.file, false).unwrap();
                pack.way = way;
            }
            let (mut wanted, mut n) = (pack.header.as_bytes().to_vec(), 0);
            while wanted.len() < STEP + BEHIND as usize + 3 * STEP {
                n = (n * 7 + 4099) % 65_536;
                let stored = &content[..n + 1];
                let entry =
                    ChunkEntry::new(0, stored.len() as u32, 65_536, Encoding::Zstd, 0, Digest::default());
                let place = pack.append(entry, stored).unwrap();
                assert_eq!(pack.chunks[place as usize].offset(), wanted.len() as u64);
                wanted.extend_from_slice(stored);
            }
            wanted.extend_from_slice(&pack::finish(&pack.header, &pack.chunks).0);
            let finished = pack.finish().unwrap();
            assert_eq!(finished.bytes, wanted.len() as u64);
            assert!(std::fs::read(finished.path).unwrap() == wanted);
        }
    }
}
