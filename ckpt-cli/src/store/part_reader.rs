//! Reading one node's part of a checkpoint.

use super::{Result, Store, StoreError, files, pack_reader::PackReader};
use ckpt_common::image::{
    Digest, FormatError, Kind, MemoryId,
    manifest::PartRef,
    pages::PageRun,
    part::{MAX_SIZE, PartLayout},
    record::RawRecord,
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

/// An open part, checked against its name. Cloning is cheap.
#[derive(Clone)]
pub struct PartReader(Arc<Inner>);

struct Inner {
    store: Store,
    part: PartRef,
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
        Ok(PartReader(Arc::new(Inner {
            store: self.clone(),
            part: part.clone(),
            path,
            bytes,
            layout,
            packs,
        })))
    }
}

impl PartReader {
    /// The store it is in.
    pub(super) fn store(&self) -> &Store {
        &self.0.store
    }

    /// The store, and the name of the part in it: another process opens it by them.
    pub fn place(&self) -> (&std::path::Path, &PartRef) {
        (self.0.store.root(), &self.0.part)
    }

    /// Its name.
    pub fn id(&self) -> Digest {
        self.0.part.id
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
        let reader = self.pack_number(pack)?;
        reader.check(chunk, page, count)?;
        Ok(reader)
    }

    /// The pack with this index.
    pub(super) fn pack_number(&self, pack: u32) -> Result<Arc<PackReader>> {
        let mut open = self.0.packs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reader) = open.get(&pack) {
            return Ok(reader.clone());
        }
        let missing = || FormatError::damaged("page map", format!("there is no pack {pack}"));
        let id = self.packs().get(pack as usize).copied();
        let id = id.ok_or_else(missing).map_err(StoreError::damaged(&self.0.path))?;
        let reader = Arc::new(self.0.store.open_pack(id)?);
        open.insert(pack, reader.clone());
        Ok(reader)
    }
}
