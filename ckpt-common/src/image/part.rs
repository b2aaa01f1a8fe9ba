//! Parts: what one node contributes to a checkpoint.
//!
//! ```text
//! part    = header | section table | section 0 | section 1 | ...
//! header  = "CKPTPART" | version u16 | 2 zero bytes | sections u32 | crc32c of the table u32
//!           | 4 zero bytes | nonce, 16 bytes                                       (40 bytes)
//! section = kind u16 | flags u16 (bit 0: required) | memory id u32 | length u64
//!           | crc32c of the section u32 | 4 zero bytes                             (24 bytes)
//! ```
//! Sections follow the table without gaps, in its order. The name of a part is the blake3 hash of
//! all its bytes.
//!
//! | kind | content |
//! |---|---|
//! | 1 | records, see [`super::record`]; exactly one section |
//! | 2 | names of the packs that the page maps point into, 32 bytes each; exactly one section |
//! | 3 | page map of the memory object with that id, see [`super::pages`] |

use super::{Digest, FormatError, MemoryId, pages, record};
use std::{collections::BTreeMap, ops::Range};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// Version of parts that this code writes, and the newest that it reads.
pub const VERSION: u16 = 1;
/// Largest part in bytes (page maps of some 20 TiB).
pub const MAX_SIZE: u64 = 8 << 30;

const MAGIC: [u8; 8] = *b"CKPTPART";
const WHAT: &str = "part";
const REQUIRED: u16 = 1;
const RECORDS: u16 = 1;
const PACKS: u16 = 2;
const PAGE_MAP: u16 = 3;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U16,
    reserved: [u8; 2],
    sections: U32,
    crc: U32,
    reserved2: [u8; 4],
    nonce: [u8; 16],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Section {
    kind: U16,
    flags: U16,
    memory: U32,
    length: U64,
    crc: U32,
    reserved: [u8; 4],
}

/// What goes into a part.
#[derive(Default)]
pub struct PartBuilder {
    /// Encoded records.
    pub records: Vec<u8>,
    /// Names of the packs.
    pub packs: Vec<Digest>,
    /// Page maps.
    pub maps: BTreeMap<MemoryId, pages::PageMapBuilder>,
}

impl PartBuilder {
    /// The bytes of the part, in pieces to be written one after the other, and its name.
    pub fn encode(&self, nonce: [u8; 16]) -> (Vec<Vec<u8>>, Digest) {
        let packs: Vec<u8> = self.packs.iter().flat_map(|pack| pack.0).collect();
        let mut sections = vec![(RECORDS, MemoryId(0), &self.records[..]), (PACKS, MemoryId(0), &packs[..])];
        sections.extend(self.maps.iter().map(|(&id, map)| (PAGE_MAP, id, map.as_bytes())));
        let mut table = Vec::new();
        for &(kind, memory, bytes) in &sections {
            let section = Section {
                kind: kind.into(),
                flags: REQUIRED.into(),
                memory: memory.0.into(),
                length: (bytes.len() as u64).into(),
                crc: crc32c::crc32c(bytes).into(),
                reserved: [0; 4],
            };
            table.extend_from_slice(section.as_bytes());
        }
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            reserved: [0; 2],
            sections: (sections.len() as u32).into(),
            crc: crc32c::crc32c(&table).into(),
            reserved2: [0; 4],
            nonce,
        };
        let mut pieces = vec![header.as_bytes().to_vec(), table];
        pieces.extend(sections.iter().map(|(_, _, bytes)| bytes.to_vec()));
        let name = Digest::of(&pieces.iter().map(Vec::as_slice).collect::<Vec<_>>());
        (pieces, name)
    }
}

/// A part whose structure has been checked.
#[derive(Clone, Debug)]
pub struct PartLayout {
    records: Range<usize>,
    packs: Vec<Digest>,
    maps: BTreeMap<MemoryId, Range<usize>>,
}

impl PartLayout {
    /// Checks header, table, the checksum of every section, every record frame and every page map.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let damaged = |why: String| FormatError::damaged(WHAT, why);
        let (header, rest) =
            Header::ref_from_prefix(bytes).map_err(|_| damaged("header is cut off".into()))?;
        if header.magic != MAGIC {
            return Err(damaged("it does not begin like a part".into()));
        }
        if header.version.get() > VERSION {
            let (found, supported) = (header.version.get().into(), VERSION.into());
            return Err(FormatError::Newer { what: WHAT.into(), found, supported });
        }
        if header.version.get() == 0 || header.reserved != [0; 2] || header.reserved2 != [0; 4] {
            return Err(damaged("header has impossible fields".into()));
        }
        let size = header.sections.get() as usize * size_of::<Section>();
        let table = rest.get(..size).ok_or_else(|| damaged("section table is cut off".into()))?;
        if crc32c::crc32c(table) != header.crc.get() {
            return Err(damaged("checksum of the section table is wrong".into()));
        }
        let sections =
            <[Section]>::ref_from_bytes(table).map_err(|_| damaged("section table is cut off".into()))?;
        let mut offset = size_of::<Header>() + size;
        let (mut records, mut packs, mut maps) = (None, None, BTreeMap::new());
        for (number, section) in sections.iter().enumerate() {
            let bad = |why: &str| damaged(format!("section {number}: {why}"));
            let end = usize::try_from(section.length.get()).ok().and_then(|len| offset.checked_add(len));
            let end = end.filter(|&end| end <= bytes.len()).ok_or_else(|| bad("it is cut off"))?;
            let range = offset..end;
            offset = end;
            if crc32c::crc32c(&bytes[range.clone()]) != section.crc.get() {
                return Err(bad("its checksum is wrong"));
            }
            let old = match section.kind.get() {
                RECORDS => records.replace(range).is_some(),
                PACKS => packs.replace(range).is_some(),
                PAGE_MAP => maps.insert(MemoryId(section.memory.get()), range).is_some(),
                kind if section.flags.get() & REQUIRED != 0 => {
                    return Err(FormatError::UnknownKind(format!("section {kind}")));
                }
                _ => false,
            };
            if old {
                return Err(bad("it is there twice"));
            }
        }
        if offset != bytes.len() {
            return Err(damaged(format!("{} bytes behind the last section", bytes.len() - offset)));
        }
        let records = records.ok_or_else(|| damaged("records are missing".into()))?;
        let packs = packs.ok_or_else(|| damaged("list of packs is missing".into()))?;
        let packs = <[[u8; 32]]>::ref_from_bytes(&bytes[packs])
            .map_err(|_| damaged("list of packs is cut off".into()))?;
        let packs: Vec<_> = packs.iter().copied().map(Digest).collect();
        record::parse(&bytes[records.clone()])?;
        for range in maps.values() {
            pages::parse(&bytes[range.clone()], packs.len())?;
        }
        Ok(Self { records, packs, maps })
    }

    /// The packs that page maps point into.
    pub fn packs(&self) -> &[Digest] {
        &self.packs
    }

    /// Memory objects with a page map.
    pub fn memories(&self) -> impl Iterator<Item = MemoryId> {
        self.maps.keys().copied()
    }

    /// The records; `bytes` are those that were parsed.
    pub fn records<'a>(&self, bytes: &'a [u8]) -> Result<Vec<record::RawRecord<'a>>, FormatError> {
        record::parse(bytes.get(self.records.clone()).unwrap_or_default())
    }

    /// A page map; `bytes` are those that were parsed.
    pub fn page_map<'a>(
        &self,
        bytes: &'a [u8],
        id: MemoryId,
    ) -> Result<Option<&'a [pages::PageRun]>, FormatError> {
        let Some(range) = self.maps.get(&id) else { return Ok(None) };
        pages::parse(bytes.get(range.clone()).unwrap_or_default(), self.packs.len()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::pages::Source, *};

    fn sample() -> (Vec<u8>, Digest) {
        let mut part = PartBuilder { packs: vec![Digest([9; 32])], ..Default::default() };
        record::RawRecord { kind: "process", version: 1, required: true, payload: b"abc" }
            .encode(&mut part.records)
            .unwrap();
        let map = part.maps.entry(MemoryId(5)).or_default();
        map.push(0x10, 3, Source::Zero).unwrap();
        map.push(0x20, 2, Source::Chunk { pack: 0, chunk: 1, page: 4 }).unwrap();
        let (pieces, name) = part.encode([3; 16]);
        (pieces.concat(), name)
    }

    #[test]
    fn round_trip() {
        let (bytes, name) = sample();
        assert_eq!(Digest::of(&[&bytes]), name);
        let layout = PartLayout::parse(&bytes).unwrap();
        assert_eq!(layout.records(&bytes).unwrap()[0].payload, b"abc");
        assert_eq!(layout.memories().collect::<Vec<_>>(), [MemoryId(5)]);
        assert_eq!(layout.page_map(&bytes, MemoryId(5)).unwrap().unwrap().len(), 2);
        assert_eq!(layout.page_map(&bytes, MemoryId(6)).unwrap(), None);
    }

    #[test]
    fn every_flipped_byte_but_the_nonce_is_found_without_the_name() {
        let (bytes, _) = sample();
        for position in (0..bytes.len()).filter(|position| !(24..40).contains(position)) {
            let mut bytes = bytes.clone();
            bytes[position] ^= 0x10;
            assert!(PartLayout::parse(&bytes).is_err(), "byte {position}");
        }
        for length in 0..bytes.len() {
            assert!(PartLayout::parse(&bytes[..length]).is_err(), "cut at {length}");
        }
    }
}
