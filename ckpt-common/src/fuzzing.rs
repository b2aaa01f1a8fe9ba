//! Entry points for fuzzing: every reader of bytes that come from elsewhere.
//!
//! Each takes arbitrary bytes and must return without panicking, without allocating much more than
//! it was given, and with an error unless the bytes are what they claim to be. `fuzz/` calls them
//! under libFuzzer; the tests below call them with damaged versions of good input.

use crate::{
    image::{manifest::Checkpoint, pack, pages, part::PartLayout, record},
    wire,
};

/// A manifest.
pub fn manifest(data: &[u8]) {
    if let Ok(checkpoint) = Checkpoint::decode(data) {
        let _ = checkpoint.manifest.encode();
        checkpoint.manifest.channels.iter().for_each(|channel| drop(channel.check()));
    }
}

/// A pack: header, index and footer, without the chunks in between.
pub fn pack(data: &[u8]) {
    let Some((header, tail)) = data.split_at_checked(pack::Header::SIZE) else { return };
    let length = tail.len() as u64;
    if let Some(footer) = tail.len().checked_sub(pack::Footer::SIZE) {
        let _ = pack::Footer::parse(&tail[footer..], length);
        // As if the chunks had the size that the footer says.
        let index = tail.get(footer..footer + 8).and_then(|bytes| bytes.try_into().ok());
        let index = u64::from_le_bytes(index.unwrap_or_default());
        let _ = pack::parse(header, tail, index.saturating_add(length));
    }
    let _ = pack::parse(header, tail, data.len() as u64);
}

/// A part, with its records and page maps.
pub fn part(data: &[u8]) {
    if let Ok(runs) = pages::parse(data, 3) {
        slices(runs);
    }
    let Ok(layout) = PartLayout::parse(data) else { return };
    for record in layout.records(data).unwrap_or_default() {
        let _ = record.check_known();
    }
    for id in layout.memories() {
        if let Ok(Some(runs)) = layout.page_map(data, id) {
            slices(runs);
        }
    }
}

/// Pieces of a page map that has been looked at: each page of it is in exactly one.
fn slices(runs: &[pages::PageRun]) {
    let count = |runs: &mut dyn Iterator<Item = pages::PageRun>| -> u64 {
        runs.map(|run| u64::from(run.count.get())).sum()
    };
    let middle = runs.get(runs.len() / 2).map_or(0, |run| run.page.get() + u64::from(run.count.get()) / 2);
    let halves = [(0, middle), (middle, u64::MAX)].map(|(from, to)| count(&mut pages::slice(runs, from, to)));
    assert_eq!(halves.iter().sum::<u64>(), count(&mut runs.iter().copied()));
}

/// A sequence of records, each decoded as what it may be.
pub fn records(data: &[u8]) {
    for record in record::parse(data).unwrap_or_default() {
        let _ = record.decode::<crate::image::process::Process>();
        let _ = record.decode::<crate::image::file::OpenFile>();
    }
}

/// What comes over the wire.
pub fn frame(data: &[u8]) {
    if let Some(preamble) = data.first_chunk() {
        let _ = wire::check_preamble(preamble);
    }
    let Some((header, payload)) = data.split_first_chunk() else { return };
    let _ = wire::payload_length(header);
    let _ = wire::decode::<wire::Request>(header, payload);
    let _ = wire::decode::<wire::Response>(header, payload);
    // The checksum keeps random bytes from the decoder: try it without.
    let mut header = *header;
    header[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    header[4..].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    let _ = wire::decode::<wire::Request>(&header, payload);
    let _ = wire::decode::<wire::Response>(&header, payload);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{
        Digest, MemoryId,
        file::{FileId, OpenFile},
        manifest::Manifest,
        pages::{PageMapBuilder, Source},
        part::PartBuilder,
    };
    use zerocopy::IntoBytes;

    /// xorshift64: the same inputs in every run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % limit.max(1) as u64) as usize
        }

        fn damage(&mut self, bytes: &mut Vec<u8>) {
            for _ in 0..=self.below(4) {
                let at = self.below(bytes.len());
                match self.below(6) {
                    0 => bytes.truncate(at),
                    1 => bytes.extend((0..self.below(40)).map(|n| n as u8).collect::<Vec<_>>()),
                    2 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                    3 if !bytes.is_empty() => bytes[at] = self.below(256) as u8,
                    // Lengths and counts at their limits.
                    4 if at + 4 <= bytes.len() => bytes[at..at + 4].fill([0, 0x7f, 0xff][self.below(3)]),
                    5 if !bytes.is_empty() => {
                        let piece = bytes[at..(at + self.below(30)).min(bytes.len())].to_vec();
                        let to = self.below(bytes.len());
                        bytes.splice(to..to, piece);
                    }
                    _ => {}
                }
            }
        }
    }

    fn part_bytes() -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let mut part = PartBuilder { packs: vec![Digest([9; 32])], ..Default::default() };
        let file = OpenFile {
            id: FileId(7),
            flags: 2,
            owner: (0, 0, 0),
            label: "/tmp/x".into(),
            kind: "pipe".into(),
            version: 1,
            payload: vec![1; 40],
        };
        record::encode(&file, &mut part.records).unwrap();
        let mut map = PageMapBuilder::default();
        map.push(1, 3, Source::Zero).unwrap();
        map.push(9, 4, Source::Chunk { pack: 0, chunk: 1, page: 2 }).unwrap();
        let (records, pages) = (part.records.clone(), map.as_bytes().to_vec());
        part.maps.insert(MemoryId(1), map);
        (part.encode([1; 16]).0.concat(), records, pages)
    }

    fn pack_bytes() -> Vec<u8> {
        let header = pack::Header::new([1; 16]);
        let hash = Digest([2; 32]);
        let chunk = pack::ChunkEntry::new(32, 100, 4096, pack::Encoding::Zstd, 1, hash);
        [header.as_bytes(), &pack::finish(&header, &[chunk]).0].concat()
    }

    #[test]
    fn damaged_input_never_panics() {
        let (part_bytes, record_bytes, page_bytes) = part_bytes();
        assert!(PartLayout::parse(&part_bytes).is_ok() && !record::parse(&record_bytes).unwrap().is_empty());
        let manifest_bytes = Manifest { job: "shop".into(), ..Default::default() }.encode().unwrap().0;
        let frame_bytes = wire::encode(&wire::Response::Released(vec![1, 2, 3])).unwrap();
        type Target = fn(&[u8]);
        let targets: [(Target, Vec<u8>); 6] = [
            (part, part_bytes),
            (part, page_bytes),
            (records, record_bytes),
            (pack, pack_bytes()),
            (manifest, manifest_bytes),
            (frame, frame_bytes),
        ];
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for (target, good) in &targets {
            target(good);
            for _ in 0..5_000 {
                let mut bytes = good.clone();
                random.damage(&mut bytes);
                target(&bytes);
            }
        }
    }
}
