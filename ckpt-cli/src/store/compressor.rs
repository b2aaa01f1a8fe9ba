//! Compressing chunks, and not trying where it is of no use.

use super::Compress;
use ckpt_common::image::PAGE_SIZE;
use zstd::{bulk, zstd_safe::compress_bound};

/// A chunk that shrinks by less than this part of its size is stored as it is.
const WORTH: usize = 32;
/// A sample that shrinks by less than this part of its size is no reason to compress the chunk.
const HOPE: usize = 64;
/// Of less than this, a sample would see too little.
const WITHOUT_SAMPLE: usize = 4 * PAGE_SIZE;
/// Bytes that the sample has of each page.
const PER_PAGE: usize = 256;

/// Compresses chunks, one after the other.
pub(super) struct Compressor {
    zstd: Option<bulk::Compressor<'static>>,
    sample: Vec<u8>,
}

impl Compressor {
    pub(super) fn new(compress: Compress) -> Self {
        let zstd = match compress {
            Compress::None => None,
            // Only an impossible level fails; then chunks are stored as they are.
            Compress::Zstd(level) => bulk::Compressor::new(level).ok(),
        };
        Self { zstd, sample: Vec::new() }
    }

    /// Puts compressed content into `into`. `false` if that is not worth it.
    ///
    /// The same content always gives the same result: chunks are found again by it.
    pub(super) fn compress(&mut self, raw: &[u8], into: &mut Vec<u8>) -> bool {
        let Self { zstd: Some(zstd), sample } = self else { return false };
        let mut shrinks = |data: &[u8], by: usize| {
            into.clear();
            into.reserve(compress_bound(data.len()));
            zstd.compress_to_buffer(data, into).is_ok_and(|size| size < data.len() - data.len() / by)
        };
        // Random bytes cost as much as others, so a little of each page is tried first, each time
        // from another place in the page.
        sample.clear();
        for (number, page) in raw.chunks_exact(PAGE_SIZE).enumerate() {
            let start = number * 5 * PER_PAGE % PAGE_SIZE;
            sample.extend_from_slice(&page[start..start + PER_PAGE]);
        }
        (raw.len() < WITHOUT_SAMPLE || shrinks(sample, HOPE)) && shrinks(raw, WORTH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn one_compressible_page_of_sixteen_is_noticed_and_none_is() {
        let mut compressor = Compressor::new(Compress::Zstd(1));
        let (mut raw, mut packed) = (random(16 * PAGE_SIZE), Vec::new());
        assert!(!compressor.compress(&raw, &mut packed));
        for at in [0, 7, 15] {
            raw = random(16 * PAGE_SIZE);
            raw[at * PAGE_SIZE..(at + 1) * PAGE_SIZE].fill(7);
            assert!(compressor.compress(&raw, &mut packed), "page {at}");
            assert_eq!(zstd::bulk::decompress(&packed, raw.len()).unwrap(), raw);
        }
    }

    #[test]
    fn half_of_each_page_is_noticed_whichever_half_and_however_many_pages() {
        let mut compressor = Compressor::new(Compress::Zstd(-1));
        for pages in 1..=16 {
            for start in [0, PAGE_SIZE / 2] {
                let mut raw = random(pages * PAGE_SIZE);
                raw.chunks_exact_mut(PAGE_SIZE).for_each(|page| page[start..start + PAGE_SIZE / 2].fill(7));
                assert!(compressor.compress(&raw, &mut Vec::new()), "{pages} pages, {start}");
            }
        }
    }
}
