//! Writing one node's part of a checkpoint.

use super::{
    DumpId, PartReader, Result, Store, StoreError,
    chunker::Chunker,
    crowded::crowded,
    dump::Workspace,
    files,
    pack_file::FinishedPack,
    pack_writer::Base,
    page_reader::PageReader,
    page_table::{PageTable, Place, Target},
};
use ckpt_common::image::{
    FormatError, Kind, MemoryId, PAGE_SIZE,
    manifest::{PackRef, PartRef},
    pages::{PageRun, Source},
    part::{MAX_SIZE, PartBuilder},
    record::{self, RawRecord},
};
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// How page content is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compress {
    /// Not at all.
    None,
    /// By zstd at this level ([`FAST`], or 1 to 19).
    Zstd(i32),
}

/// The zstd level that finds repetitions and codes no entropy. Of what is half incompressible it makes as
/// little as level 1 in half the time (2.4 instead of 1.2 GB/s per processor); text gets 18% larger,
/// numbers without repetitions are not compressed at all, where level 1 would save a fifth at 0.9 GB/s.
pub const FAST: i32 = -1;

impl Default for Compress {
    fn default() -> Self {
        Self::Zstd(FAST)
    }
}

/// Default of [`PartOptions::most_packs`].
const MOST_PACKS: usize = 256;

/// Options of a part writer.
#[derive(Clone, Debug, Default)]
pub struct PartOptions {
    /// Compression of page content.
    pub compress: Compress,
    /// The dump that the part belongs to. Without one the caller alone answers for the finished
    /// part: nothing will ever sweep it.
    pub dump: Option<DumpId>,
    /// An older part of the same processes: chunks that it has are not written again.
    pub base: Option<PartReader>,
    /// Packs that the part points into at most, if it can be had cheaply: 256 by default. Of more,
    /// the emptiest are left behind.
    pub most_packs: Option<usize>,
    /// Lets another thread follow the writer, and stop it.
    pub watch: Arc<Watch>,
}

/// How far a writer has got, and whether it is to stop.
#[derive(Debug, Default)]
pub struct Watch {
    bytes: AtomicU64,
    cancelled: AtomicBool,
}

impl Watch {
    /// Bytes of page content taken so far, over all writers with this watch.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// From now on writers refuse to go on, with [`StoreError::Cancelled`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    fn check(&self) -> Result<()> {
        match self.cancelled.load(Ordering::Relaxed) {
            true => Err(StoreError::Cancelled),
            false => Ok(()),
        }
    }
}

/// Writes one part: records and pages of memory objects, all in any order.
///
/// What is said of a page later replaces what was said of it earlier; only [`PartWriter::inherit`]
/// gives way to everything else, whatever the order.
///
/// [`PartWriter::finish`] makes it durable; dropped before, it leaves nothing behind.
pub struct PartWriter {
    store: Store,
    /// Own workspace, where there is no dump.
    own: Option<Workspace>,
    directory: PathBuf,
    token: String,
    part: PartBuilder,
    pages: PageTable,
    chunks: Option<Chunker>,
    base: Option<PartReader>,
    most_packs: usize,
    /// Parts that were inherited from, and their packs that are to be left behind. They cannot be pruned before
    /// this dump has ended.
    bases: Vec<Base>,
    /// What is in those packs: index into `bases`, object, pages.
    left_behind: Vec<(usize, MemoryId, PageRun)>,
    watch: Arc<Watch>,
    records: u64,
    finished: bool,
}

impl Base {
    fn new(part: &PartReader, most_packs: usize) -> Result<Self> {
        part.check_present()?;
        Ok(Self { part: part.clone(), left_behind: crowded(part, most_packs)? })
    }
}

impl Store {
    /// Begins a part.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the dump is not alive in this store (any more).
    pub fn part_writer(&self, options: PartOptions) -> Result<PartWriter> {
        let (own, directory) = match &options.dump {
            Some(dump) => (None, self.dump_directory(dump)?),
            None => {
                let own = Workspace::create(self)?;
                let directory = own.directory();
                (Some(own), directory)
            }
        };
        let token = files::token()?;
        let most_packs = options.most_packs.unwrap_or(MOST_PACKS);
        let bases = options.base.iter().filter_map(|base| {
            // Without it everything that is not inherited is written.
            let unusable = |error| tracing::warn!(%error, "the chunks of the base cannot be used");
            Base::new(base, most_packs).map_err(unusable).ok()
        });
        let bases: Vec<_> = bases.collect();
        Ok(PartWriter {
            store: self.clone(),
            own,
            chunks: Some(Chunker::new(directory.join(&token), options.compress, bases.first().cloned())),
            directory,
            token,
            part: PartBuilder::default(),
            pages: PageTable::default(),
            base: options.base,
            most_packs,
            bases,
            left_behind: Vec::new(),
            watch: options.watch,
            records: 0,
            finished: false,
        })
    }
}

impl PartWriter {
    /// Appends a record.
    pub fn record<K: Kind>(&mut self, value: &K) -> Result<()> {
        record::encode(value, &mut self.part.records)?;
        self.records += 1;
        Ok(())
    }

    /// Appends a record that is already encoded.
    pub fn raw_record(&mut self, record: &RawRecord<'_>) -> Result<()> {
        record.encode(&mut self.part.records)?;
        self.records += 1;
        Ok(())
    }

    /// Declares a memory object. One without pages is stored too: as empty.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if the object was there before.
    pub fn memory(&mut self, id: MemoryId) -> Result<()> {
        Ok(self.pages.declare(id)?)
    }

    /// Takes pages that are present, from page number `first` on. `data` is a multiple of
    /// [`PAGE_SIZE`] long. Pages full of zeros are found and noted without being stored.
    pub fn pages(&mut self, id: MemoryId, first: u64, data: &[u8]) -> Result<()> {
        if !data.len().is_multiple_of(PAGE_SIZE) {
            let why = format!("{} bytes are not whole pages", data.len());
            return Err(FormatError::TooLarge { what: "page map", why }.into());
        }
        self.watch.check()?;
        self.pages.check(id, first, (data.len() / PAGE_SIZE) as u64)?;
        self.chunks.as_mut().ok_or(StoreError::Cancelled)?.pages(&mut self.pages, id.into(), first, data)?;
        self.watch.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Notes `count` pages full of zeros from page number `first` on, without looking at them.
    pub fn zero_pages(&mut self, id: MemoryId, first: u64, count: u32) -> Result<()> {
        self.note(id, first, count, Place::Zero)
    }

    /// Takes back whatever was said of `count` pages from `first` on: they do not exist any more.
    pub fn absent(&mut self, id: MemoryId, first: u64, count: u32) -> Result<()> {
        self.note(id, first, count, Place::Absent)
    }

    /// Notes that `count` pages from `first` on have the content of those pages of object `of`
    /// from `of_first` on, whatever that is when the part is finished.
    /// [`PartWriter::finish`] fails if the source has no such page.
    pub fn share(&mut self, id: MemoryId, first: u64, count: u32, of: MemoryId, of_first: u64) -> Result<()> {
        self.note(id, first, count, Place::Same { of, page: of_first })
    }

    fn note(&mut self, id: MemoryId, first: u64, count: u32, place: Place) -> Result<()> {
        self.pages.check(id, first, count.into())?;
        self.chunks.as_mut().ok_or(StoreError::Cancelled)?.note(
            &mut self.pages,
            id.into(),
            first,
            count,
            place,
        )
    }

    /// Notes pages whose content has not changed since an older part: they are where that has them.
    /// `runs` are of a page map of `base`, cut as needed (see `pages::slice`), in any order.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if `base` was pruned: then everything has to be saved.
    pub fn inherit(&mut self, id: MemoryId, base: &PartReader, runs: &[PageRun]) -> Result<()> {
        self.watch.check()?;
        let number = match self.bases.iter().position(|known| known.part.id() == base.id()) {
            Some(number) => number,
            None => {
                self.bases.push(Base::new(base, self.most_packs)?);
                self.bases.len() - 1
            }
        };
        let left_behind = &self.bases[number].left_behind;
        if !left_behind.is_empty() {
            let stays = |run: &PageRun| match run.source() {
                Source::Chunk { pack, .. } => !left_behind.contains(&pack),
                Source::Zero => true,
            };
            let (stay, go): (Vec<_>, Vec<_>) = runs.iter().copied().partition(stays);
            self.left_behind.extend(go.into_iter().map(|run| (number, id, run)));
            return Ok(self.pages.inherit(id, base.packs(), &stay)?);
        }
        Ok(self.pages.inherit(id, base.packs(), runs)?)
    }

    /// Writes pages anew that are in packs which are to be left behind.
    fn take_over(&mut self) -> Result<()> {
        let mut runs = std::mem::take(&mut self.left_behind);
        runs.sort_by_key(|(base, _, run)| (*base, run.pack.get(), run.chunk.get(), run.page_in_chunk.get()));
        let mut reader: Option<(usize, PageReader)> = None;
        for (base, id, run) in runs {
            let Source::Chunk { pack, chunk, page } = run.source() else { continue };
            let reader = match &mut reader {
                Some((of, reader)) if *of == base => reader,
                other => &mut other.insert((base, PageReader::new(self.bases[base].part.clone())?)).1,
            };
            let chunks = self.chunks.as_mut().ok_or(StoreError::Cancelled)?;
            for n in 0..run.count.get() {
                self.watch.check()?;
                let content = reader.page((pack, chunk, page + n as u16))?;
                let to = Target { id, inherited: true };
                chunks.pages(&mut self.pages, to, run.page.get() + u64::from(n), content)?;
            }
        }
        Ok(())
    }

    /// Makes the part durable. It stays invisible until a manifest names it.
    pub fn finish(mut self) -> Result<PartRef> {
        self.watch.check()?;
        self.take_over()?;
        let chunks = self.chunks.take();
        let finished = chunks.map(|mut chunks| chunks.finish(&mut self.pages)).transpose()?;
        let (packs, stored) = finished.unwrap_or_default();
        let own = packs.iter().map(|pack| pack.id).collect();
        let maps = std::mem::take(&mut self.pages).finish(
            own,
            self.base.as_ref().map_or(&[], PartReader::packs),
            &stored,
        )?;
        for pack in &maps.packs[packs.len()..] {
            files::open(&self.store.pack_path(*pack))?;
        }
        (self.part.maps, self.part.packs) = (maps.maps, maps.packs);
        let (pieces, id) = self.part.encode(files::nonce()?);
        let bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        if bytes > MAX_SIZE {
            let why = format!("{bytes} bytes, the limit is {MAX_SIZE}");
            return Err(FormatError::TooLarge { what: "part", why }.into());
        }
        let temporary = self.path("part");
        files::write_new(&temporary, &pieces.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
        let reference = PartRef {
            id,
            bytes,
            packs: packs.iter().map(|pack| PackRef { id: pack.id, bytes: pack.bytes }).collect(),
            records: self.records,
            data_pages: maps.data,
            zero_pages: maps.zero,
            inherited_pages: maps.inherited,
            shared_pages: maps.shared,
        };
        self.publish(&packs, &reference)?;
        self.finished = true;
        Ok(reference)
    }

    /// Moves the flushed files to their names. The list of them is durable first, so that a sweep
    /// finds them if this dump is never committed.
    fn publish(&mut self, packs: &[FinishedPack], part: &PartRef) -> Result<()> {
        let list: String = (packs.iter().map(|pack| format!("packs/{}.pack\n", pack.id)))
            .chain([format!("parts/{}.part\n", part.id)])
            .collect();
        files::write_new(&self.path("names"), &[list.as_bytes()])?;
        files::sync_dir(&self.directory)?;
        for pack in packs {
            files::rename(&pack.path, &self.store.pack_path(pack.id))?;
        }
        if !packs.is_empty() {
            files::sync_dir(&self.store.root.join("packs"))?;
        }
        files::rename(&self.path("part"), &self.store.part_path(part.id))?;
        files::sync_dir(&self.store.root.join("parts"))?;
        match self.own.take() {
            Some(own) => own.keep(),
            None => Ok(()),
        }
    }

    fn path(&self, extension: &str) -> PathBuf {
        self.directory.join(format!("{}.{extension}", self.token))
    }
}

impl Drop for PartWriter {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        drop(self.chunks.take());
        let Ok(entries) = std::fs::read_dir(&self.directory) else { return };
        for entry in entries.flatten() {
            // The list stays: what it names may have been moved to its place already.
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(&self.token) && !name.ends_with(".names") {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}
