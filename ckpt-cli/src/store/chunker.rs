//! From pages to chunks: which pages are stored together.
//!
//! Pages of one *window*, [`WINDOW`] neighbours that begin at a multiple of that number, become a
//! chunk of their own if there are [`DENSE`] or more of them. So the same content gives the same
//! chunk in every checkpoint, whatever came before it. Where only a few pages of a window come,
//! they are gathered with others, since chunks of a page or two compress badly.

use super::{
    Compress, Result,
    pack_writer::{Base, PackWriter, Written},
    page_table::{PageTable, Place, Target},
};
use ckpt_common::image::{PAGE_SIZE, pack::CHUNK_SIZE};
use std::path::PathBuf;

/// Pages of a window: as many as fit a chunk.
const WINDOW: u64 = (CHUNK_SIZE / PAGE_SIZE) as u64;
/// With so many pages a window becomes a chunk.
const DENSE: u32 = 8;
/// A chunk of gathered pages ends where the next page is in another block of so many pages, if it
/// is half full: after a change the chunks soon begin at the same pages again as before.
const BLOCK: u64 = 1024;

static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// The window that pages come from now.
struct Window {
    to: Target,
    /// First page.
    first: u64,
    /// Bit n: page `first + n` is in `content`.
    pages: u16,
    /// First page that can follow without contradicting what was noted.
    next: u64,
    content: Vec<u8>,
}

/// A chunk of pages from anywhere.
struct Gathered {
    ticket: u64,
    content: Vec<u8>,
    last: (Target, u64),
}

/// Cuts pages into chunks, and notes where they are.
pub(super) struct Chunker {
    prefix: PathBuf,
    compress: Compress,
    base: Option<Base>,
    packs: Option<PackWriter>,
    window: Option<Window>,
    gathered: Option<Gathered>,
}

impl Chunker {
    /// Files are made at `prefix` with a running number and `.pack`. Chunks that are in `base` already are not
    /// written again: what it has is read from now on, beside everything else.
    pub(super) fn new(prefix: PathBuf, compress: Compress, base: Option<Base>) -> Self {
        let mut chunker = Self { prefix, compress, base, packs: None, window: None, gathered: None };
        if chunker.base.is_some() {
            chunker.packs();
        }
        chunker
    }

    fn packs(&mut self) -> &mut PackWriter {
        self.packs
            .get_or_insert_with(|| PackWriter::start(self.prefix.clone(), self.compress, self.base.clone()))
    }

    /// Takes whole pages of an object from page number `first` on.
    pub(super) fn pages(&mut self, table: &mut PageTable, to: Target, first: u64, data: &[u8]) -> Result<()> {
        let mut zeros = 0;
        for (page, content) in (first..).zip(data.chunks_exact(PAGE_SIZE)) {
            if content == ZERO_PAGE {
                zeros += 1;
                continue;
            }
            if zeros > 0 {
                self.note(table, to, page - u64::from(zeros), zeros, Place::Zero)?;
                zeros = 0;
            }
            self.page(table, to, page, content)?;
        }
        let end = first + (data.len() / PAGE_SIZE) as u64;
        self.note(table, to, end - u64::from(zeros), zeros, Place::Zero)
    }

    /// Notes pages whose content is not to be stored.
    pub(super) fn note(
        &mut self,
        table: &mut PageTable,
        to: Target,
        first: u64,
        count: u32,
        place: Place,
    ) -> Result<()> {
        // Pages of the window are noted when it ends, which must not undo this.
        if let Some(window) = self.window.as_mut().filter(|window| window.to == to) {
            if first < window.next {
                self.end_window(table)?;
            } else {
                window.next = first + u64::from(count);
            }
        }
        Ok(table.note(to, first, count, place)?)
    }

    fn page(&mut self, table: &mut PageTable, to: Target, page: u64, content: &[u8]) -> Result<()> {
        let first = page / WINDOW * WINDOW;
        if self
            .window
            .as_ref()
            .is_some_and(|window| (window.to, window.first) != (to, first) || page < window.next)
        {
            self.end_window(table)?;
        }
        let window = match &mut self.window {
            Some(window) => window,
            None => {
                let content = self.packs().buffer()?;
                self.window.insert(Window { to, first, pages: 0, next: page, content })
            }
        };
        window.content.extend_from_slice(content);
        window.pages |= 1 << (page - first);
        window.next = page + 1;
        if window.next == first + WINDOW {
            self.end_window(table)?;
        }
        Ok(())
    }

    fn end_window(&mut self, table: &mut PageTable) -> Result<()> {
        let Some(Window { to, first, pages, content, .. }) = self.window.take() else { return Ok(()) };
        let numbers = (0..WINDOW).filter(|n| pages & (1 << n) != 0).map(|n| first + n);
        if pages.count_ones() >= DENSE {
            let ticket = self.packs().ticket();
            for (at, page) in (0..).zip(numbers) {
                table.note(to, page, 1, Place::Ticket { ticket, page: at })?;
            }
            return self.packs().put(ticket, content);
        }
        for (page, content) in numbers.zip(content.chunks_exact(PAGE_SIZE)) {
            self.gather(table, to, page, content)?;
        }
        self.packs().give_back(content);
        Ok(())
    }

    fn gather(&mut self, table: &mut PageTable, to: Target, page: u64, content: &[u8]) -> Result<()> {
        let block = (to, page / BLOCK);
        let ended = |gathered: &Gathered| gathered.last != block && gathered.content.len() >= CHUNK_SIZE / 2;
        if self.gathered.as_ref().is_some_and(ended) {
            self.end_gathered()?;
        }
        let gathered = match &mut self.gathered {
            Some(gathered) => gathered,
            None => {
                let (ticket, content) = (self.packs().ticket(), self.packs().buffer()?);
                self.gathered.insert(Gathered { ticket, content, last: block })
            }
        };
        let at = (gathered.content.len() / PAGE_SIZE) as u16;
        table.note(to, page, 1, Place::Ticket { ticket: gathered.ticket, page: at })?;
        gathered.content.extend_from_slice(content);
        gathered.last = block;
        if gathered.content.len() == CHUNK_SIZE {
            self.end_gathered()?;
        }
        Ok(())
    }

    fn end_gathered(&mut self) -> Result<()> {
        match self.gathered.take() {
            Some(gathered) => self.packs().put(gathered.ticket, gathered.content),
            None => Ok(()),
        }
    }

    /// Waits until everything is on storage. Gives the packs, and for each ticket where it is.
    pub(super) fn finish(&mut self, table: &mut PageTable) -> Result<Written> {
        self.end_window(table)?;
        self.end_gathered()?;
        self.packs.take().map_or_else(|| Ok(Default::default()), PackWriter::finish)
    }
}
