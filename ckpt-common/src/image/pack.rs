//! Packs: immutable files of independently compressed chunks.
//!
//! ```text
//! pack   = header | chunk 0 | chunk 1 | ... | index | footer
//! header = "CKPTPACK" | version u16 | 6 zero bytes | nonce, 16 bytes            (32 bytes)
//! index  = per chunk: offset u64 | stored u32 | raw u32 | crc32c u32 | encoding u8 | 3 zero bytes
//!          | blake3 of the stored bytes, 32 bytes                                (56 bytes)
//! footer = index offset u64 | chunks u32 | crc32c of the index u32 | "KCAPTPKC"  (24 bytes)
//! ```
//! The name of a pack is the blake3 hash of header, index and footer; since the index has the hash
//! of every chunk, the name vouches for every byte. Chunks lie without gaps. The nonce makes each
//! pack unique, so whoever wrote one that was never committed may delete it.

use super::{Digest, FormatError, PAGE_SIZE};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// Largest content of a chunk in bytes: 16 pages, which need not be neighbours.
pub const CHUNK_SIZE: usize = 64 << 10;
/// Most chunks in one pack (1 GiB of content).
pub const MAX_CHUNKS: u32 = 1 << 14;
/// Version of packs that this code writes, and the newest that it reads.
pub const VERSION: u16 = 1;

const MAGIC: [u8; 8] = *b"CKPTPACK";
const END_MAGIC: [u8; 8] = *b"KCAPTPKC";
const WHAT: &str = "pack";

/// First bytes of a pack.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    magic: [u8; 8],
    version: U16,
    reserved: [u8; 6],
    nonce: [u8; 16],
}

impl Header {
    /// Size in bytes.
    pub const SIZE: usize = 32;

    /// The header of a new pack.
    pub fn new(nonce: [u8; 16]) -> Self {
        Self { magic: MAGIC, version: VERSION.into(), reserved: [0; 6], nonce }
    }
}

/// How a chunk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// As it is.
    Plain,
    /// One zstd frame.
    Zstd,
}

/// Index entry of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkEntry {
    offset: U64,
    stored: U32,
    raw: U32,
    crc: U32,
    encoding: u8,
    reserved: [u8; 3],
    hash: [u8; 32],
}

impl ChunkEntry {
    /// Size in bytes.
    pub const SIZE: usize = 56;

    /// Entry of a chunk that is stored at `offset`, with `raw` bytes of content.
    pub fn new(offset: u64, stored: u32, raw: u32, encoding: Encoding, crc: u32, hash: Digest) -> Self {
        Self {
            offset: offset.into(),
            stored: stored.into(),
            raw: raw.into(),
            crc: crc.into(),
            encoding: match encoding {
                Encoding::Plain => 0,
                Encoding::Zstd => 1,
            },
            reserved: [0; 3],
            hash: hash.0,
        }
    }

    /// The same, stored at `offset`.
    pub fn at(self, offset: u64) -> Self {
        Self { offset: offset.into(), ..self }
    }

    /// Where its stored bytes begin in the file.
    pub fn offset(&self) -> u64 {
        self.offset.get()
    }

    /// Number of stored bytes.
    pub fn stored(&self) -> usize {
        self.stored.get() as usize
    }

    /// Size of its content in bytes: a multiple of the page size, at most [`CHUNK_SIZE`].
    pub fn raw(&self) -> usize {
        self.raw.get() as usize
    }

    /// How it is stored.
    pub fn encoding(&self) -> Encoding {
        if self.encoding == 0 { Encoding::Plain } else { Encoding::Zstd }
    }

    /// crc32c of the stored bytes: the quick check of every read.
    pub fn crc(&self) -> u32 {
        self.crc.get()
    }

    /// blake3 of the stored bytes: the thorough check of `ckpt verify`.
    pub fn hash(&self) -> Digest {
        Digest(self.hash)
    }
}

/// Last bytes of a pack.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Footer {
    index: U64,
    chunks: U32,
    crc: U32,
    magic: [u8; 8],
}

impl Footer {
    /// Size in bytes.
    pub const SIZE: usize = 24;

    /// Looks at the last bytes of a file of `length` bytes. Gives offset and size of the index.
    pub fn parse(bytes: &[u8], length: u64) -> Result<(u64, usize), FormatError> {
        let damaged = |why: &str| FormatError::damaged(WHAT, why);
        let footer = Self::ref_from_bytes(bytes).map_err(|_| damaged("footer is cut off"))?;
        if footer.magic != END_MAGIC {
            return Err(damaged("it does not end like a pack: cut off, or overwritten"));
        }
        if footer.chunks.get() > MAX_CHUNKS {
            return Err(damaged("more chunks than a pack can have"));
        }
        let size = footer.chunks.get() as usize * ChunkEntry::SIZE;
        let end = footer.index.get().checked_add((size + Self::SIZE) as u64);
        if end != Some(length) || footer.index.get() < Header::SIZE as u64 {
            return Err(damaged("index and file size contradict each other"));
        }
        Ok((footer.index.get(), size))
    }
}

/// Index and footer of a pack, and its name.
pub fn finish(header: &Header, chunks: &[ChunkEntry]) -> (Vec<u8>, Digest) {
    let mut tail = chunks.as_bytes().to_vec();
    let index = chunks.last().map_or(Header::SIZE as u64, |chunk| chunk.offset() + chunk.stored() as u64);
    let footer = Footer {
        index: index.into(),
        chunks: (chunks.len() as u32).into(),
        crc: crc32c::crc32c(&tail).into(),
        magic: END_MAGIC,
    };
    tail.extend_from_slice(footer.as_bytes());
    let name = Digest::of(&[header.as_bytes(), &tail]);
    (tail, name)
}

/// Checks everything but the chunks: `header` are the first [`Header::SIZE`] bytes of the file,
/// `tail` is everything from the index on, `length` the size of the file. Gives the index and the
/// name that the pack must have.
pub fn parse(header: &[u8], tail: &[u8], length: u64) -> Result<(Vec<ChunkEntry>, Digest), FormatError> {
    let damaged = |why: String| FormatError::damaged(WHAT, why);
    let name = Digest::of(&[header, tail]);
    let header = Header::ref_from_bytes(header).map_err(|_| damaged("header is cut off".into()))?;
    if header.magic != MAGIC {
        return Err(damaged("it does not begin like a pack".into()));
    }
    if header.version.get() > VERSION {
        let (found, supported) = (header.version.get().into(), VERSION.into());
        return Err(FormatError::Newer { what: WHAT.into(), found, supported });
    }
    if header.version.get() == 0 || header.reserved != [0; 6] {
        return Err(damaged("header has impossible fields".into()));
    }
    let split = tail.len().checked_sub(Footer::SIZE).ok_or_else(|| damaged("footer is cut off".into()))?;
    let (index, footer) = tail.split_at(split);
    let (end, size) = Footer::parse(footer, length)?;
    let crc = Footer::ref_from_bytes(footer).map(|footer| footer.crc.get()).unwrap_or_default();
    if index.len() != size || crc32c::crc32c(index) != crc {
        return Err(damaged("checksum of the index is wrong".into()));
    }
    let chunks =
        <[ChunkEntry]>::ref_from_bytes(index).map_err(|_| damaged("index has no whole entries".into()))?;
    let mut offset = Header::SIZE as u64;
    for (number, chunk) in chunks.iter().enumerate() {
        let bad = |why: &str| damaged(format!("index of chunk {number}: {why}"));
        if chunk.offset() != offset {
            return Err(bad("not behind the chunk before"));
        }
        if chunk.raw() == 0 || chunk.raw() > CHUNK_SIZE || chunk.raw() % PAGE_SIZE != 0 {
            return Err(bad("impossible size"));
        }
        let fits = match chunk.encoding {
            0 => chunk.stored() == chunk.raw(),
            1 => chunk.stored() > 0 && chunk.stored() < chunk.raw(),
            _ => false,
        };
        if !fits || chunk.reserved != [0; 3] {
            return Err(bad("impossible encoding"));
        }
        offset += chunk.stored() as u64;
    }
    if offset != end {
        return Err(damaged("chunks do not end where the index begins".into()));
    }
    Ok((chunks.to_vec(), name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (Header, Vec<u8>, u64, Digest) {
        let header = Header::new([7; 16]);
        let hash = Digest::of(&[b"x"]);
        let chunks = [
            ChunkEntry::new(32, 100, 8192, Encoding::Zstd, 1, hash),
            ChunkEntry::new(132, 4096, 4096, Encoding::Plain, 2, hash),
        ];
        let (tail, name) = finish(&header, &chunks);
        let length = (32 + 100 + 4096 + tail.len()) as u64;
        (header, tail, length, name)
    }

    #[test]
    fn round_trip_keeps_the_name() {
        let (header, tail, length, name) = sample();
        let (chunks, found) = parse(header.as_bytes(), &tail, length).unwrap();
        assert_eq!((chunks.len(), found), (2, name));
    }

    #[test]
    fn every_flipped_byte_is_found_or_changes_the_name() {
        let (header, tail, length, name) = sample();
        for position in 0..Header::SIZE + tail.len() {
            for bit in 0..8 {
                let (mut header, mut tail) = (header.as_bytes().to_vec(), tail.clone());
                let byte = match position.checked_sub(Header::SIZE) {
                    None => &mut header[position],
                    Some(position) => &mut tail[position],
                };
                *byte ^= 1 << bit;
                let found = parse(&header, &tail, length).map(|(_, name)| name);
                assert_ne!(found, Ok(name), "byte {position} bit {bit}");
            }
        }
    }

    #[test]
    fn newer_packs_are_refused_by_version() {
        let (header, tail, length, _) = sample();
        let header = Header { version: 2.into(), ..header };
        let error = parse(header.as_bytes(), &tail, length).unwrap_err();
        assert_eq!(error.to_string(), "pack has version 2, but this ckpt reads only up to version 1");
    }
}
