//! Single pages of a part, in any order.

use super::{
    PartReader, Result,
    pack_reader::{PackReader, Unpacker},
};
use ckpt_common::image::PAGE_SIZE;
use std::{collections::VecDeque, sync::Arc};

/// Unpacked chunks that are kept.
const KEPT: usize = 16;

/// Where a page is: pack, chunk, page in the chunk.
pub(super) type Place = (u32, u32, u16);

/// Reads pages, and keeps the chunks that were unpacked last.
pub(super) struct PageReader {
    part: PartReader,
    kept: VecDeque<((u32, u32), Vec<u8>)>,
    unpacker: Unpacker,
    last: Option<(u32, Arc<PackReader>)>,
}

impl PageReader {
    pub(super) fn new(part: PartReader) -> Result<Self> {
        Ok(Self { part, kept: VecDeque::new(), unpacker: Unpacker::new()?, last: None })
    }

    /// The pack of a page, after a check that it has that page.
    pub(super) fn pack(&mut self, (pack, chunk, page): Place) -> Result<Arc<PackReader>> {
        if let Some((number, reader)) = &self.last
            && *number == pack
            && reader.check(chunk, page, 1).is_ok()
        {
            return Ok(reader.clone());
        }
        let reader = self.part.pack_of(pack, chunk, page, 1)?;
        self.last = Some((pack, reader.clone()));
        Ok(reader)
    }

    /// Content of a page.
    pub(super) fn page(&mut self, place: Place) -> Result<&[u8]> {
        let (pack, chunk, page) = place;
        let reader = self.pack(place)?;
        let position = match self.kept.iter().rposition(|(key, _)| *key == (pack, chunk)) {
            Some(position) => position,
            None => {
                let buffer = match self.kept.len() {
                    KEPT.. => self.kept.pop_front().map_or_else(Vec::new, |(_, buffer)| buffer),
                    _ => Vec::new(),
                };
                let content = reader.read(chunk as usize, &mut self.unpacker, buffer, false)?;
                self.kept.push_back(((pack, chunk), content));
                self.kept.len() - 1
            }
        };
        let start = usize::from(page) * PAGE_SIZE;
        Ok(&self.kept[position].1[start..start + PAGE_SIZE])
    }
}
