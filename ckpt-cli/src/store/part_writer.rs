//! Writing one node's part of a checkpoint.

use super::{
    DumpId, Result, Store, StoreError,
    dump::Workspace,
    files,
    pack_writer::{FinishedPack, PackWriter},
};
use ckpt_common::image::{
    FormatError, Kind, MemoryId, PAGE_SIZE,
    manifest::{PackRef, PartRef},
    pack::CHUNK_SIZE,
    pages::{PageMapBuilder, Source},
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
    /// By zstd at this level (1 to 19).
    Zstd(i32),
}

impl Default for Compress {
    /// Level 1: about as fast as the storage it is for.
    fn default() -> Self {
        Self::Zstd(1)
    }
}

/// Options of a part writer.
#[derive(Clone, Debug, Default)]
pub struct PartOptions {
    /// Compression of page content.
    pub compress: Compress,
    /// The dump that the part belongs to. Without one the caller alone answers for the finished
    /// part: nothing will ever sweep it.
    pub dump: Option<DumpId>,
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

static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Writes one part: records in any order, and page content, memory object by memory object.
///
/// [`PartWriter::finish`] makes it durable; dropped before, it leaves nothing behind.
pub struct PartWriter {
    store: Store,
    /// Own workspace, where there is no dump.
    own: Option<Workspace>,
    directory: PathBuf,
    token: String,
    part: PartBuilder,
    /// The memory object that pages belong to now.
    memory: Option<(MemoryId, PageMapBuilder)>,
    packs: Option<PackWriter>,
    compress: Compress,
    watch: Arc<Watch>,
    chunk: Vec<u8>,
    records: u64,
    data_pages: u64,
    zero_pages: u64,
    finished: bool,
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
        Ok(PartWriter {
            store: self.clone(),
            own,
            directory,
            token: files::token()?,
            part: PartBuilder::default(),
            memory: None,
            packs: None,
            compress: options.compress,
            watch: options.watch,
            chunk: Vec::new(),
            records: 0,
            data_pages: 0,
            zero_pages: 0,
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

    /// Begins a memory object; the pages that follow are its own. An object without pages is
    /// stored too: as empty.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if the object was there before.
    pub fn memory(&mut self, id: MemoryId) -> Result<()> {
        self.end_memory();
        if self.part.maps.contains_key(&id) {
            let why = format!("memory object {} is written twice", id.0);
            return Err(FormatError::TooLarge { what: "part", why }.into());
        }
        self.memory = Some((id, PageMapBuilder::default()));
        Ok(())
    }

    fn end_memory(&mut self) {
        self.part.maps.extend(self.memory.take());
    }

    fn map(&mut self) -> Result<&mut PageMapBuilder> {
        let none = || FormatError::TooLarge { what: "page map", why: "pages before any object".into() };
        Ok(self.memory.as_mut().map(|(_, map)| map).ok_or_else(none)?)
    }

    /// Appends pages that are present, from page number `first` on. `data` is a multiple of
    /// [`PAGE_SIZE`] long; page numbers ascend within a memory object. Pages full of zeros are
    /// found and noted without being stored.
    pub fn pages(&mut self, first: u64, data: &[u8]) -> Result<()> {
        if !data.len().is_multiple_of(PAGE_SIZE) {
            let why = format!("{} bytes are not whole pages", data.len());
            return Err(FormatError::TooLarge { what: "page map", why }.into());
        }
        self.watch.check()?;
        for (page, content) in (first..).zip(data.chunks_exact(PAGE_SIZE)) {
            let source = if content == ZERO_PAGE {
                self.zero_pages += 1;
                Source::Zero
            } else {
                self.data_pages += 1;
                self.store_page(content)?
            };
            self.map()?.push(page, 1, source)?;
        }
        self.watch.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Notes `count` pages full of zeros from page number `first` on, without looking at them.
    pub fn zero_pages(&mut self, first: u64, count: u32) -> Result<()> {
        self.map()?.push(first, count, Source::Zero)?;
        self.zero_pages += u64::from(count);
        Ok(())
    }

    fn store_page(&mut self, content: &[u8]) -> Result<Source> {
        let packs = match &mut self.packs {
            Some(packs) => packs,
            None => {
                let prefix = self.directory.join(&self.token);
                self.packs.insert(PackWriter::start(prefix, self.compress))
            }
        };
        if self.chunk.capacity() == 0 {
            self.chunk = packs.buffer()?;
        }
        let (pack, chunk) = packs.next_place();
        let page = (self.chunk.len() / PAGE_SIZE) as u16;
        self.chunk.extend_from_slice(content);
        if self.chunk.len() == CHUNK_SIZE {
            packs.put(std::mem::take(&mut self.chunk))?;
        }
        Ok(Source::Chunk { pack, chunk, page })
    }

    /// Makes the part durable. It stays invisible until a manifest names it.
    pub fn finish(mut self) -> Result<PartRef> {
        self.watch.check()?;
        self.end_memory();
        let mut packs = Vec::new();
        if let Some(mut writer) = self.packs.take() {
            if !self.chunk.is_empty() {
                writer.put(std::mem::take(&mut self.chunk))?;
            }
            packs = writer.finish()?;
        }
        self.part.packs = packs.iter().map(|pack| pack.id).collect();
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
            data_pages: self.data_pages,
            zero_pages: self.zero_pages,
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
        drop(self.packs.take());
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
