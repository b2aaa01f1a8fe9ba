//! Reading packs.

use super::{Result, Store, StoreError, files};
use ckpt_common::image::{
    Digest, FormatError, PAGE_SIZE,
    pack::{self, ChunkEntry, Encoding, Footer, Header},
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::{fs::File, ops::Range, os::unix::fs::FileExt, path::PathBuf, sync::OnceLock};

/// An open pack. Its index is read, and checked against its name, when it is needed for the first time.
pub(super) struct PackReader {
    path: PathBuf,
    file: File,
    id: Digest,
    length: u64,
    index: OnceLock<Vec<ChunkEntry>>,
}

/// What a thread needs to unpack chunks, used again for each.
pub(super) struct Unpacker {
    zstd: zstd::bulk::Decompressor<'static>,
    stored: Vec<u8>,
}

impl Unpacker {
    pub(super) fn new() -> Result<Self> {
        let zstd = zstd::bulk::Decompressor::new().map_err(StoreError::io("start decompression of", ""))?;
        Ok(Self { zstd, stored: Vec::new() })
    }
}

impl Store {
    /// Opens a pack: from then on it does not matter whether it is removed.
    ///
    /// # Errors
    /// It is missing, or too short for one.
    pub(super) fn open_pack(&self, id: Digest) -> Result<PackReader> {
        let path = self.pack_path(id);
        let file = files::open(&path)?;
        let length = file.metadata().map_err(StoreError::io("read", &path))?.len();
        if length < (Header::SIZE + Footer::SIZE) as u64 {
            let why = format!("it has only {length} bytes");
            return Err(StoreError::damaged(&path)(FormatError::damaged("pack", why)));
        }
        Ok(PackReader { path, file, id, length, index: OnceLock::new() })
    }
}

impl PackReader {
    /// Its chunks.
    ///
    /// # Errors
    /// The pack is damaged.
    pub(super) fn chunks(&self) -> Result<&[ChunkEntry]> {
        if let Some(index) = self.index.get() {
            return Ok(index);
        }
        let index = self.read_index()?;
        Ok(self.index.get_or_init(|| index))
    }

    fn read_index(&self) -> Result<Vec<ChunkEntry>> {
        let (path, length) = (&self.path, self.length);
        let read = |offset: u64, size: usize| {
            let mut bytes = vec![0; size];
            self.file.read_exact_at(&mut bytes, offset).map_err(StoreError::io("read", path))?;
            Ok::<_, StoreError>(bytes)
        };
        let header = read(0, Header::SIZE)?;
        let footer = read(length - Footer::SIZE as u64, Footer::SIZE)?;
        let (index, size) = Footer::parse(&footer, length).map_err(StoreError::damaged(path))?;
        let tail = read(index, size + Footer::SIZE)?;
        let (chunks, name) = pack::parse(&header, &tail, length).map_err(StoreError::damaged(path))?;
        if name != self.id {
            let why = format!("its index has the hash {}, which is not its name", name.short());
            return Err(StoreError::damaged(path)(FormatError::damaged("pack", why)));
        }
        Ok(chunks)
    }

    pub(super) fn damaged(&self, chunk: usize, why: &str) -> StoreError {
        let why = format!("chunk {chunk} {why}");
        StoreError::damaged(&self.path)(FormatError::damaged("pack", why))
    }

    /// Where a chunk's stored bytes are in the file, and the size of its content.
    pub(super) fn extent(&self, number: usize) -> Result<(Range<u64>, usize)> {
        let chunk = self.chunk(number)?;
        Ok((chunk.offset()..chunk.offset() + chunk.stored() as u64, chunk.raw()))
    }

    /// An entry of the index.
    pub(super) fn chunk(&self, number: usize) -> Result<ChunkEntry> {
        self.chunks()?.get(number).copied().ok_or_else(|| self.damaged(number, "does not exist"))
    }

    /// Lie these pages inside the chunk?
    pub(super) fn check(&self, chunk: u32, page: u16, count: u32) -> Result<()> {
        let size = self.chunks()?.get(chunk as usize).map_or(0, |chunk| chunk.raw() / PAGE_SIZE);
        if u64::from(page) + u64::from(count) > size as u64 {
            return Err(self.damaged(chunk as usize, "is smaller than the page map says"));
        }
        Ok(())
    }

    /// Tells the kernel that these bytes will be read soon.
    pub(super) fn will_need(&self, bytes: &Range<u64>) {
        let (start, length) = (bytes.start as i64, (bytes.end - bytes.start) as i64);
        // Advice: where it is not taken, reading only takes longer.
        let _ = posix_fadvise(&self.file, start, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    }

    /// Reads bytes of the file to the front of `into`, which grows where needed.
    pub(super) fn read_span(&self, bytes: &Range<u64>, into: &mut Vec<u8>) -> Result<()> {
        let length = (bytes.end - bytes.start) as usize;
        if into.len() < length {
            into.resize(length, 0);
        }
        let read = self.file.read_exact_at(&mut into[..length], bytes.start);
        read.map_err(StoreError::io("read", &self.path))
    }

    /// The stored bytes of a chunk, of those that [`Self::read_span`] has read.
    pub(super) fn within<'a>(&self, number: usize, span: &Range<u64>, bytes: &'a [u8]) -> Result<&'a [u8]> {
        let chunk = self.chunk(number)?;
        let start = chunk.offset().checked_sub(span.start).map(|start| start as usize);
        let stored = start.and_then(|start| bytes.get(start..start + chunk.stored()));
        stored.ok_or_else(|| self.damaged(number, "was not read"))
    }

    /// Content of a chunk from its stored bytes, checked by crc32c: these bytes themselves, or unpacked to the front
    /// of `into`. Gives the content, and what is left of `into`.
    pub(super) fn unpack<'a>(
        &self,
        number: usize,
        stored: &'a [u8],
        with: &mut Unpacker,
        into: &'a mut [u8],
    ) -> Result<(&'a [u8], &'a mut [u8])> {
        let chunk = self.chunk(number)?;
        if crc32c::crc32c(stored) != chunk.crc() {
            return Err(self.damaged(number, "has a wrong checksum"));
        }
        if chunk.encoding() == Encoding::Plain {
            return Ok((stored, into));
        }
        let (place, rest) = into
            .split_at_mut_checked(chunk.raw())
            .ok_or_else(|| self.damaged(number, "is larger than a batch"))?;
        match with.zstd.decompress_to_buffer(stored, place) {
            Ok(size) if size == place.len() => Ok((place, rest)),
            Ok(size) => Err(self.damaged(number, &format!("unpacks to {size} bytes"))),
            Err(error) => Err(self.damaged(number, &format!("does not unpack: {error}"))),
        }
    }

    /// Content of a chunk, checked by crc32c, and by blake3 too if asked to be thorough. `buffer`
    /// is used for the content, whatever it holds.
    pub(super) fn read(
        &self,
        number: usize,
        with: &mut Unpacker,
        mut buffer: Vec<u8>,
        thorough: bool,
    ) -> Result<Vec<u8>> {
        let chunk = self.chunk(number)?;
        let mut stored = std::mem::take(&mut with.stored);
        stored.resize(chunk.stored(), 0);
        self.file.read_exact_at(&mut stored, chunk.offset()).map_err(StoreError::io("read", &self.path))?;
        buffer.resize(chunk.raw(), 0);
        self.unpack(number, &stored, with, &mut buffer)?;
        if thorough && Digest::of(&[&stored]) != chunk.hash() {
            return Err(self.damaged(number, "has a wrong hash"));
        }
        if chunk.encoding() == Encoding::Plain {
            std::mem::swap(&mut stored, &mut buffer);
        }
        with.stored = stored;
        Ok(buffer)
    }
}
