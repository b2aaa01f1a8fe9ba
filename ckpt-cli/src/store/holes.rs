//! Freeing what nobody uses any more in the middle of a pack.
//!
//! The name of a pack is the hash of header, index and footer, so a chunk that no part points into
//! can go without a change of the name: a hole takes its place.

use super::{Result, StoreError, files, live::ChunkSet};
use ckpt_common::image::pack::ChunkEntry;
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    unistd::{Whence, lseek},
};
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
    path::Path,
};

/// File systems free whole blocks of this size; smaller ones lie inside.
const BLOCK: u64 = 4096;

/// Whole blocks of a file that only dead chunks are in.
pub(super) fn dead_blocks(chunks: &[ChunkEntry], live: &ChunkSet) -> Vec<Range<u64>> {
    let mut dead: Vec<Range<u64>> = Vec::new();
    for (_, chunk) in (0..).zip(chunks).filter(|(number, _)| !live.contains(*number)) {
        let (start, end) = (chunk.offset(), chunk.offset() + chunk.stored() as u64);
        match dead.last_mut().filter(|last| last.end == start) {
            Some(last) => last.end = end,
            None => dead.push(start..end),
        }
    }
    let whole = |dead: Range<u64>| dead.start.next_multiple_of(BLOCK)..dead.end / BLOCK * BLOCK;
    dead.into_iter().map(whole).filter(|dead| !dead.is_empty()).collect()
}

/// Of these ranges, what holds data.
pub(super) fn with_data(file: &File, ranges: &[Range<u64>]) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let data = match lseek(file, at as i64, Whence::SeekData) {
                Ok(data) => data as u64,
                Err(Errno::ENXIO) => break,
                Err(error) => return Err(error.into()),
            };
            if data >= range.end {
                break;
            }
            at = (lseek(file, data as i64, Whence::SeekHole)? as u64).min(range.end);
            found.push(data..at);
        }
    }
    Ok(found)
}

/// Makes holes in a file; `false` where the file system has no such thing.
pub(super) fn punch(path: &Path, ranges: &[Range<u64>]) -> Result<bool> {
    let file = OpenOptions::new().write(true).open(path).map_err(StoreError::io("open", path))?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for range in ranges {
        match fallocate(&file, flags, range.start as i64, (range.end - range.start) as i64) {
            Ok(()) => {}
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(false),
            Err(error) => return Err(StoreError::io("free space in", path)(error.into())),
        }
    }
    Ok(true)
}

/// Puts a copy in the place of a file that has nothing in these ranges (ascending), by way of
/// `temporary`.
pub(super) fn rewrite(path: &Path, ranges: &[Range<u64>], temporary: &Path) -> Result<()> {
    let from = files::open(path)?;
    let mut to = files::create_new(temporary)?;
    let length = from.metadata().map_err(StoreError::io("read", path))?.len();
    let mut copy = || -> io::Result<()> {
        let mut at = 0;
        for hole in ranges.iter().cloned().chain(std::iter::once(length..length)) {
            (&from).seek(SeekFrom::Start(at))?;
            to.seek(SeekFrom::Start(at))?;
            io::copy(&mut (&from).take(hole.start - at), &mut to)?;
            at = hole.end;
        }
        to.set_len(length)?;
        to.sync_all()
    };
    copy().map_err(StoreError::io("copy", path))?;
    files::rename(temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_common::image::{Digest, pack::Encoding};
    use std::{fs, os::unix::fs::MetadataExt};

    #[test]
    fn only_whole_blocks_between_live_chunks_are_dead() {
        let sizes = [5000, 3000, 9000, 4096, 20_000, 100];
        let (mut chunks, mut offset) = (Vec::new(), 32);
        for size in sizes {
            chunks.push(ChunkEntry::new(offset, size, 65536, Encoding::Zstd, 0, Digest::default()));
            offset += u64::from(size);
        }
        let dead = |live: &ChunkSet| -> Vec<_> {
            dead_blocks(&chunks, live).into_iter().map(|range| (range.start, range.end)).collect()
        };
        let mut live = ChunkSet::default();
        // All but the last live one: from 32 to 41128 without the ends.
        live.insert(5);
        assert_eq!(dead(&live), [(4096, 40960)]);
        live.insert(2);
        // 32..8032 has no whole block, 17032..41128 has.
        assert_eq!(dead(&live), [(20480, 40960)]);
        live.insert(4);
        assert_eq!(dead(&live), []);
    }

    #[test]
    fn a_hole_and_a_copy_with_holes_are_the_same() {
        let directory = tempfile::TempDir::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let content: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8 | 1).collect();
        let holes = [4096..16_384, 40_960..81_920];
        let mut wanted = content.clone();
        holes.iter().for_each(|hole| wanted[hole.start as usize..hole.end as usize].fill(0));
        let [punched, copied] = ["punched", "copied"].map(|name| directory.path().join(name));
        for path in [&punched, &copied] {
            fs::write(path, &content).unwrap();
            File::open(path).unwrap().sync_all().unwrap();
            assert_eq!(with_data(&File::open(path).unwrap(), &holes).unwrap(), holes);
        }
        rewrite(&copied, &holes, &directory.path().join("temporary")).unwrap();
        assert!(fs::read(&copied).unwrap() == wanted);
        if punch(&punched, &holes).unwrap() {
            assert!(fs::read(&punched).unwrap() == wanted);
            for path in [&punched, &copied] {
                assert_eq!(with_data(&File::open(path).unwrap(), &holes).unwrap(), []);
                let blocks = fs::metadata(path).unwrap().blocks() * 512;
                assert!(blocks < 60_000, "{blocks} bytes in blocks");
            }
        }
    }
}
