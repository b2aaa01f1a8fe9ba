//! Unpacking many chunks at once, each straight to where its pages belong.
//!
//! Chunks are taken in the order in which they lie in their packs, several neighbours with one read, and each is
//! unpacked once however many pages of however many targets refer to it. The thread that reads a chunk also checks,
//! unpacks and hands it on: nothing waits for a consumer.

use super::{
    PartReader, Result, StoreError,
    pack_reader::{PackReader, Unpacker},
};
use crate::sys::task;
use ckpt_common::image::{
    PAGE_SIZE,
    pages::{PageRun, Source},
};
use std::{
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

/// Content that one thread unpacks before it hands it on, in bytes: little enough to stay in a processor's cache.
const BATCH: usize = 512 << 10;
/// Unwanted bytes between two chunks that are rather read than jumped over.
const GAP: u64 = 32 << 10;
/// How far ahead the kernel is told what will be read, in batches.
const AHEAD: usize = 16;
/// More threads than this only fight for the memory's bandwidth.
const THREADS: usize = 8;

/// Content of neighbouring pages of a target.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// Index of the page map that asked for it.
    pub target: usize,
    /// Number of the first page.
    pub page: u64,
    /// Content of one or more pages.
    pub data: &'a [u8],
}

/// Pages of one target that lie next to each other in one chunk.
#[derive(Clone, Copy, Debug)]
struct Place {
    pack: u32,
    chunk: u32,
    page_in_chunk: u16,
    count: u16,
    target: u32,
    page: u64,
}

/// What is read at once: neighbouring chunks of a pack.
struct Batch {
    pack: Arc<PackReader>,
    places: Range<usize>,
    /// Where its bytes are in the pack.
    bytes: Range<u64>,
    /// Size of its content.
    raw: usize,
}

impl PartReader {
    /// Calls `each`, on several threads at once, with all content that these page maps name, in any order. Zero runs are
    /// passed over: they need no reading.
    ///
    /// # Errors
    /// The first of any thread. The others end as soon as they have handed on what they have.
    pub fn scatter<E: From<StoreError> + Send>(
        &self,
        maps: &[&[PageRun]],
        each: impl Fn(&[Piece<'_>]) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let places = places(maps);
        let batches = self.batches(&places)?;
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let first_error = Mutex::new(None);
        let work = || -> Result<(), E> {
            let mut worker = Unpacking::new()?;
            while !failed.load(Ordering::Relaxed) {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(batch) = batches.get(number) else { break };
                if let Some(later) = batches.get(number + AHEAD) {
                    later.pack.will_need(&later.bytes);
                }
                worker.perform(batch, &places[batch.places.clone()], &each)?;
            }
            Ok(())
        };
        let work = || {
            if let Err(error) = work() {
                failed.store(true, Ordering::Relaxed);
                first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        };
        for batch in batches.iter().take(AHEAD) {
            batch.pack.will_need(&batch.bytes);
        }
        thread::scope(|scope| {
            for _ in 1..task::processors().min(THREADS).min(batches.len()) {
                scope.spawn(work);
            }
            work();
        });
        first_error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// As [`Self::scatter`], on this thread alone: for a few pages.
    ///
    /// # Errors
    /// The first.
    pub fn gather<E: From<StoreError>>(
        &self,
        runs: &[PageRun],
        with: &mut Unpacking,
        each: impl Fn(&[Piece<'_>]) -> Result<(), E>,
    ) -> Result<(), E> {
        let places = places(&[runs]);
        let batches = self.batches(&places)?;
        batches.iter().try_for_each(|batch| with.perform(batch, &places[batch.places.clone()], &each))
    }

    /// Opens every pack that it needs: from then on it does not matter whether they are removed.
    ///
    /// # Errors
    /// A pack is missing or damaged.
    pub fn open_packs(&self) -> Result<()> {
        (0..self.packs().len() as u32).try_for_each(|pack| self.pack_number(pack).map(drop))
    }

    /// All pages of an object, by number: for objects that fit into memory twice.
    pub fn contents(
        &self,
        id: ckpt_common::image::MemoryId,
    ) -> Result<std::collections::BTreeMap<u64, Vec<u8>>> {
        let map = self.page_map(id)?;
        let zero = map.iter().filter(|run| run.source() == Source::Zero);
        let all = zero.flat_map(|run| run.page.get()..run.end()).map(|page| (page, vec![0; PAGE_SIZE]));
        let all = Mutex::new(all.collect::<std::collections::BTreeMap<_, _>>());
        self.scatter(&[map], |pieces| {
            let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
            for piece in pieces {
                all.extend((piece.page..).zip(piece.data.chunks(PAGE_SIZE).map(<[u8]>::to_vec)));
            }
            Ok::<_, StoreError>(())
        })?;
        Ok(all.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Cuts the work into pieces, and checks that every place lies inside its chunk.
    fn batches(&self, places: &[Place]) -> Result<Vec<Batch>> {
        let mut batches: Vec<Batch> = Vec::new();
        let mut last = None;
        for (index, place) in places.iter().enumerate() {
            let pack = match batches.last() {
                Some(batch) if last.is_some_and(|(pack, _)| pack == place.pack) => {
                    batch.pack.check(place.chunk, place.page_in_chunk, place.count.into())?;
                    batch.pack.clone()
                }
                _ => self.pack_of(place.pack, place.chunk, place.page_in_chunk, place.count.into())?,
            };
            let (bytes, raw) = pack.extent(place.chunk as usize)?;
            match batches.last_mut() {
                Some(batch) if last == Some((place.pack, place.chunk)) => batch.places.end = index + 1,
                Some(batch)
                    if last.is_some_and(|(pack, _)| pack == place.pack)
                        && batch.raw + raw <= BATCH
                        && (batch.bytes.end..batch.bytes.end + GAP).contains(&bytes.start) =>
                {
                    batch.places.end = index + 1;
                    batch.bytes.end = bytes.end;
                    batch.raw += raw;
                }
                _ => batches.push(Batch { pack, places: index..index + 1, bytes, raw }),
            }
            last = Some((place.pack, place.chunk));
        }
        Ok(batches)
    }
}

/// All places in the order of their chunks.
fn places(maps: &[&[PageRun]]) -> Vec<Place> {
    let mut places = Vec::with_capacity(maps.iter().map(|map| map.len()).sum());
    for (target, map) in (0..).zip(maps) {
        for run in *map {
            let Source::Chunk { pack, chunk, page } = run.source() else { continue };
            // A run lies within a chunk: `pages::parse` has checked that.
            let count = run.count.get() as u16;
            places.push(Place { pack, chunk, page_in_chunk: page, count, target, page: run.page.get() });
        }
    }
    places.sort_unstable_by_key(|place| (place.pack, place.chunk, place.page_in_chunk));
    places
}

/// What a thread uses again for each batch.
pub struct Unpacking {
    unpacker: Unpacker,
    stored: Vec<u8>,
    content: Vec<u8>,
}

impl Unpacking {
    /// For [`PartReader::gather`].
    ///
    /// # Errors
    /// The library does not begin.
    pub fn new() -> Result<Self> {
        Ok(Self { unpacker: Unpacker::new()?, stored: Vec::new(), content: vec![0; BATCH] })
    }

    /// Reads, checks, unpacks, hands on.
    fn perform<E: From<StoreError>>(
        &mut self,
        batch: &Batch,
        places: &[Place],
        each: &impl Fn(&[Piece<'_>]) -> Result<(), E>,
    ) -> Result<(), E> {
        batch.pack.read_span(&batch.bytes, &mut self.stored)?;
        let mut pieces = Vec::with_capacity(places.len());
        let mut rest = &mut self.content[..];
        for group in places.chunk_by(|a, b| a.chunk == b.chunk) {
            let Some(first) = group.first() else { continue };
            let stored = batch.pack.within(first.chunk as usize, &batch.bytes, &self.stored)?;
            let (content, behind) =
                batch.pack.unpack(first.chunk as usize, stored, &mut self.unpacker, rest)?;
            rest = behind;
            for place in group {
                let start = usize::from(place.page_in_chunk) * PAGE_SIZE;
                let data = content.get(start..start + usize::from(place.count) * PAGE_SIZE);
                pieces.push(Piece {
                    target: place.target as usize,
                    page: place.page,
                    data: data.unwrap_or_default(),
                });
            }
        }
        each(&pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{PartOptions, Store};
    use ckpt_common::image::MemoryId;
    use proptest::prelude::*;

    const PAGES: u64 = 600;

    fn content(page: u64) -> Vec<u8> {
        // Every third page does not compress, so that both encodings are there.
        (0..PAGE_SIZE as u64)
            .map(|i| if page.is_multiple_of(3) { (i * i * (page + 7)) >> 5 } else { page | 1 } as u8)
            .collect()
    }

    fn part(directory: &tempfile::TempDir) -> PartReader {
        let store = Store::create(&directory.path().join("store")).unwrap();
        let mut part = store.part_writer(PartOptions::default()).unwrap();
        part.memory(MemoryId(1)).unwrap();
        for page in 0..PAGES {
            part.pages(MemoryId(1), page, &content(page + 1)).unwrap();
        }
        let part = part.finish().unwrap();
        store.open_part(&part).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]
        /// Several targets want overlapping choices of the same chunks, at other page numbers.
        #[test]
        fn every_target_gets_exactly_what_it_asked_for(
            wanted in proptest::collection::vec(proptest::collection::btree_set(0..PAGES, 0..80), 1..4),
        ) {
            let directory = tempfile::TempDir::new().unwrap();
            let part = part(&directory);
            let all = part.page_map(MemoryId(1)).unwrap();
            let maps: Vec<Vec<PageRun>> = wanted.iter().map(|pages| pages.iter().map(|page| {
                let run = all.iter().find(|run| (run.page.get()..run.end()).contains(page)).unwrap();
                let Source::Chunk { pack, chunk, page: first } = run.source() else { panic!("no zeros here") };
                let inside = first + (page - run.page.get()) as u16;
                PageRun::new(page + 1000, 1, Source::Chunk { pack, chunk, page: inside })
            }).collect()).collect();
            let maps: Vec<&[PageRun]> = maps.iter().map(Vec::as_slice).collect();
            let got = Mutex::new(vec![Vec::new(); wanted.len()]);
            part.scatter(&maps, |pieces| {
                for piece in pieces {
                    assert!(piece.data == content(piece.page - 1000 + 1));
                    got.lock().unwrap()[piece.target].push(piece.page - 1000);
                }
                Ok::<_, StoreError>(())
            }).unwrap();
            for (got, wanted) in got.into_inner().unwrap().iter_mut().zip(&wanted) {
                got.sort_unstable();
                prop_assert_eq!(&*got, &wanted.iter().copied().collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn an_error_ends_the_work_and_is_the_result() {
        let directory = tempfile::TempDir::new().unwrap();
        let part = part(&directory);
        let map = part.page_map(MemoryId(1)).unwrap();
        let calls = AtomicUsize::new(0);
        let error = part.scatter(&[map], |_| {
            calls.fetch_add(1, Ordering::Relaxed);
            Err(StoreError::Cancelled)
        });
        assert!(matches!(error, Err(StoreError::Cancelled)));
        assert!(calls.into_inner() <= THREADS);
        // A run that the chunk does not have is refused before anything is handed on.
        let beyond = [PageRun::new(0, 1, Source::Chunk { pack: 0, chunk: 9999, page: 0 })];
        let error = part.scatter::<StoreError>(&[&beyond], |_| panic!("there is nothing")).unwrap_err();
        assert!(error.to_string().contains("chunk 9999 is smaller"), "{error}");
    }
}
