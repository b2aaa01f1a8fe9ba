//! Reading one node's part of a checkpoint.

use super::{
    Result, Store, StoreError, files,
    pack_reader::{PackReader, Unpacker},
};
use ckpt_common::image::{
    Digest, FormatError, Kind, MemoryId, PAGE_SIZE,
    manifest::PartRef,
    pages::{PageRun, Source},
    part::{MAX_SIZE, PartLayout},
    record::RawRecord,
};
use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

/// Unpacked chunks that are kept: a chunk of an older checkpoint may be needed again a little later.
const KEPT: usize = 64;
/// Chunks that are unpacked ahead.
const AHEAD: usize = 32;
/// Most threads that unpack.
const THREADS: usize = 4;

/// Content of neighbouring pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunData<'a> {
    /// So many pages full of zeros.
    Zero(u64),
    /// Content of one or more pages.
    Data(&'a [u8]),
}

/// An open part, checked against its name. Cloning is cheap.
#[derive(Clone)]
pub struct PartReader(Arc<Inner>);

struct Inner {
    store: Store,
    id: Digest,
    path: PathBuf,
    bytes: Vec<u8>,
    layout: PartLayout,
    packs: Mutex<BTreeMap<u32, Arc<PackReader>>>,
}

impl std::fmt::Debug for PartReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PartReader").field(&self.0.path).finish()
    }
}

impl Store {
    /// Opens a part and checks it, all but the content of its packs.
    pub fn open_part(&self, part: &PartRef) -> Result<PartReader> {
        let path = self.part_path(part.id);
        let bytes = files::read_capped(&path, part.bytes.min(MAX_SIZE))?;
        let layout = PartLayout::parse(&bytes).map_err(StoreError::damaged(&path))?;
        let name = Digest::of(&[&bytes]);
        if name != part.id {
            let why = format!("it has the hash {}, which is not its name", name.short());
            return Err(StoreError::damaged(path)(FormatError::damaged("part", why)));
        }
        let packs = Mutex::default();
        Ok(PartReader(Arc::new(Inner { store: self.clone(), id: name, path, bytes, layout, packs })))
    }
}

impl PartReader {
    /// The store it is in.
    pub(super) fn store(&self) -> &Store {
        &self.0.store
    }

    /// Its name.
    pub fn id(&self) -> Digest {
        self.0.id
    }

    /// Is the part still in the store? What it points into is there just as long; only a dump or a
    /// reader that holds the store ([`Store::hold`]) can rely on it.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if it was pruned.
    pub fn check_present(&self) -> Result<()> {
        files::open(&self.0.path).map(drop)
    }

    /// All records in order.
    pub fn records(&self) -> Result<Vec<RawRecord<'_>>> {
        self.0.layout.records(&self.0.bytes).map_err(StoreError::damaged(&self.0.path))
    }

    /// Refuses required records of unknown kinds, or newer versions, by name.
    pub fn check_known(&self) -> Result<()> {
        let mut records = self.records()?.into_iter();
        records.try_for_each(|record| record.check_known()).map_err(StoreError::damaged(&self.0.path))
    }

    /// All records of one kind, in order.
    pub fn read<K: Kind>(&self) -> Result<Vec<K>> {
        let records = self.records()?;
        let of_kind = records.iter().filter(|record| record.kind == K::KIND).map(RawRecord::decode);
        of_kind.collect::<Result<_, _>>().map_err(StoreError::damaged(&self.0.path))
    }

    /// Memory objects in the part.
    pub fn memories(&self) -> Vec<MemoryId> {
        self.0.layout.memories().collect()
    }

    /// Packs that its page maps point into.
    pub fn packs(&self) -> &[Digest] {
        self.0.layout.packs()
    }

    /// Page map of a memory object.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] if the part has no such object.
    pub fn page_map(&self, id: MemoryId) -> Result<&[PageRun]> {
        let map = self.0.layout.page_map(&self.0.bytes, id).and_then(|map| {
            map.ok_or_else(|| FormatError::damaged("part", format!("memory object {} is missing", id.0)))
        });
        map.map_err(StoreError::damaged(&self.0.path))
    }

    /// The pack with this index, and a check that the run lies inside it.
    pub(super) fn pack_of(&self, pack: u32, chunk: u32, page: u16, count: u32) -> Result<Arc<PackReader>> {
        let mut open = self.0.packs.lock().unwrap_or_else(PoisonError::into_inner);
        let reader = match open.get(&pack) {
            Some(reader) => reader.clone(),
            None => {
                let missing = || FormatError::damaged("page map", format!("there is no pack {pack}"));
                let id = self.packs().get(pack as usize).copied();
                let id = id.ok_or_else(missing).map_err(StoreError::damaged(&self.0.path))?;
                let reader = Arc::new(self.0.store.open_pack(id)?);
                open.insert(pack, reader.clone());
                reader
            }
        };
        let size = reader.chunks().get(chunk as usize).map_or(0, |chunk| chunk.raw() / PAGE_SIZE);
        if u64::from(page) + u64::from(count) > size as u64 {
            return Err(reader.damaged(chunk as usize, "is smaller than the page map says"));
        }
        Ok(reader)
    }

    /// Calls `each` with every run of a memory object in ascending order: number of the first page
    /// and content (at most one chunk at a time). Threads unpack ahead; `each` runs on the
    /// caller's.
    pub fn for_each_run<E: From<StoreError>>(
        &self,
        id: MemoryId,
        mut each: impl FnMut(u64, RunData<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let map = self.page_map(id)?;
        let loads = self.plan(map)?;
        let threads = thread::available_parallelism().map_or(1, |n| n.get()).min(THREADS).min(loads.len());
        let (todo_in, todo_out) = crossbeam_channel::bounded::<(usize, Vec<u8>)>(AHEAD);
        let (done_in, done_out) = crossbeam_channel::bounded(AHEAD);
        thread::scope(|scope| {
            // Moved in here, so that they are gone, and the threads end, when this returns early.
            let (todo_in, done_out) = (todo_in, done_out);
            for _ in 0..threads {
                let (todo, done, loads) = (todo_out.clone(), done_in.clone(), &loads);
                scope.spawn(move || {
                    let mut unpacker = Unpacker::new();
                    for (number, buffer) in todo {
                        let content = match (&mut unpacker, loads.get(number)) {
                            (Ok(unpacker), Some(load)) => load.pack.read(load.chunk, unpacker, buffer, false),
                            (Err(_), _) => Unpacker::new().map(|_| Vec::new()),
                            (_, None) => Ok(Vec::new()),
                        };
                        if done.send((number, content)).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(done_in);
            let mut loaded = Loaded { total: loads.len(), ..Default::default() };
            for run in map {
                let Source::Chunk { pack, chunk, page } = run.source() else {
                    each(run.page.get(), RunData::Zero(run.count.get().into()))?;
                    continue;
                };
                let content = loaded.get((pack, chunk), &todo_in, &done_out)?;
                let start = usize::from(page) * PAGE_SIZE;
                let data = content.get(start..start + run.count.get() as usize * PAGE_SIZE);
                each(run.page.get(), RunData::Data(data.unwrap_or_default()))?;
            }
            Ok(())
        })
    }

    /// The chunks to unpack, in the order in which they are needed: each once, unless it was
    /// dropped from the kept ones in between.
    fn plan(&self, map: &[PageRun]) -> Result<Vec<Load>> {
        let (mut loads, mut kept) = (Vec::new(), VecDeque::new());
        for run in map {
            let Source::Chunk { pack, chunk, page } = run.source() else { continue };
            let reader = self.pack_of(pack, chunk, page, run.count.get())?;
            if !kept.iter().rev().any(|&key| key == (pack, chunk)) {
                loads.push(Load { pack: reader, chunk: chunk as usize });
                while kept.len() >= KEPT {
                    kept.pop_front();
                }
                kept.push_back((pack, chunk));
            }
        }
        Ok(loads)
    }
}

struct Load {
    pack: Arc<PackReader>,
    chunk: usize,
}

/// The consumer's side of [`PartReader::plan`]: keeps and drops exactly as the plan assumes.
#[derive(Default)]
struct Loaded {
    kept: VecDeque<((u32, u32), Vec<u8>)>,
    /// Unpacked, but not needed yet.
    early: BTreeMap<usize, Result<Vec<u8>>>,
    /// Buffers to use again: fresh memory costs more than unpacking into it.
    spare: Vec<Vec<u8>>,
    asked: usize,
    taken: usize,
    total: usize,
}

impl Loaded {
    fn get(
        &mut self,
        key: (u32, u32),
        todo: &crossbeam_channel::Sender<(usize, Vec<u8>)>,
        done: &crossbeam_channel::Receiver<(usize, Result<Vec<u8>>)>,
    ) -> Result<&[u8]> {
        if let Some(position) = self.kept.iter().rposition(|(kept, _)| *kept == key) {
            return Ok(&self.kept[position].1);
        }
        while self.asked < self.total && self.asked < self.taken + AHEAD {
            let gone = |_| StoreError::io("unpack", "chunks")(std::io::Error::other("a thread died"));
            todo.send((self.asked, self.spare.pop().unwrap_or_default())).map_err(gone)?;
            self.asked += 1;
        }
        let content = loop {
            if let Some(content) = self.early.remove(&self.taken) {
                break content?;
            }
            let gone = |_| StoreError::io("unpack", "chunks")(std::io::Error::other("a thread died"));
            let (number, content) = done.recv().map_err(gone)?;
            self.early.insert(number, content);
        };
        self.taken += 1;
        while self.kept.len() >= KEPT {
            self.spare.extend(self.kept.pop_front().map(|(_, content)| content));
        }
        self.kept.push_back((key, content));
        Ok(self.kept.back().map_or(&[], |(_, content)| content))
    }
}
