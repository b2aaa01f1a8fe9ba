//! Reading packs.

use super::{Result, Store, StoreError, files};
use ckpt_common::image::{
    Digest, FormatError,
    pack::{self, ChunkEntry, Encoding, Footer, Header},
};
use std::{fs::File, os::unix::fs::FileExt, path::PathBuf};

/// An open pack whose index has been checked against its name.
pub(super) struct PackReader {
    path: PathBuf,
    file: File,
    chunks: Vec<ChunkEntry>,
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
    pub(super) fn open_pack(&self, id: Digest) -> Result<PackReader> {
        let path = self.pack_path(id);
        let file = files::open(&path)?;
        let length = file.metadata().map_err(StoreError::io("read", &path))?.len();
        let read = |offset: u64, size: usize| {
            let mut bytes = vec![0; size];
            file.read_exact_at(&mut bytes, offset).map_err(StoreError::io("read", &path))?;
            Ok::<_, StoreError>(bytes)
        };
        if length < (Header::SIZE + Footer::SIZE) as u64 {
            let why = format!("it has only {length} bytes");
            return Err(StoreError::damaged(&path)(FormatError::damaged("pack", why)));
        }
        let header = read(0, Header::SIZE)?;
        let footer = read(length - Footer::SIZE as u64, Footer::SIZE)?;
        let (index, size) = Footer::parse(&footer, length).map_err(StoreError::damaged(&path))?;
        let tail = read(index, size + Footer::SIZE)?;
        let (chunks, name) = pack::parse(&header, &tail, length).map_err(StoreError::damaged(&path))?;
        if name != id {
            let why = format!("its index has the hash {}, which is not its name", name.short());
            return Err(StoreError::damaged(&path)(FormatError::damaged("pack", why)));
        }
        Ok(PackReader { path, file, chunks })
    }
}

impl PackReader {
    pub(super) fn chunks(&self) -> &[ChunkEntry] {
        &self.chunks
    }

    pub(super) fn damaged(&self, chunk: usize, why: &str) -> StoreError {
        let why = format!("chunk {chunk} {why}");
        StoreError::damaged(&self.path)(FormatError::damaged("pack", why))
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
        let chunk = self.chunks.get(number).copied().ok_or_else(|| self.damaged(number, "does not exist"))?;
        let stored = match chunk.encoding() {
            Encoding::Plain => &mut buffer,
            Encoding::Zstd => &mut with.stored,
        };
        stored.resize(chunk.stored(), 0);
        self.file.read_exact_at(stored, chunk.offset()).map_err(StoreError::io("read", &self.path))?;
        if crc32c::crc32c(stored) != chunk.crc() {
            return Err(self.damaged(number, "has a wrong checksum"));
        }
        if thorough && Digest::of(&[stored]) != chunk.hash() {
            return Err(self.damaged(number, "has a wrong hash"));
        }
        if chunk.encoding() == Encoding::Zstd {
            buffer.clear();
            buffer.reserve_exact(chunk.raw());
            let unpacked = with.zstd.decompress_to_buffer(&with.stored, &mut buffer);
            unpacked.map_err(|error| self.damaged(number, &format!("does not unpack: {error}")))?;
        }
        if buffer.len() != chunk.raw() {
            return Err(self.damaged(number, &format!("unpacks to {} bytes", buffer.len())));
        }
        Ok(buffer)
    }
}
