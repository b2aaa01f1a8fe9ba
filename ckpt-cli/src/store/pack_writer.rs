//! From full chunks to durable packs: threads compress, one thread writes.
//!
//! Chunks are written in the order in which they are handed over. Each has a *ticket*; which chunk
//! of which pack it has become is known at the end, because a chunk that is stored already is not
//! written again. A fixed number of buffers goes round, which bounds the memory.

use super::{
    Compress, PartReader, Result, StoreError,
    compressor::Compressor,
    known::Known,
    pack_file::{FinishedPack, PackFile},
    page_table::{Pack, Stored},
};
use crate::sys::task;
use ckpt_common::image::{
    Digest,
    pack::{CHUNK_SIZE, ChunkEntry, Encoding},
};
use crossbeam_channel::{Receiver, Sender};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    thread::{self, JoinHandle},
};

/// Buffers per compressing thread: enough to bridge the writer's waits.
const BUFFERS: usize = 48;

/// The finished packs, and for each ticket where its chunk is.
pub(super) type Written = (Vec<FinishedPack>, Vec<Option<Stored>>);

struct Full {
    number: u64,
    ticket: u64,
    raw: Vec<u8>,
}

struct Packed {
    full: Full,
    /// Compressed content, if the entry says so; otherwise just a buffer.
    zstd: Vec<u8>,
    entry: ChunkEntry,
}

impl Packed {
    fn stored(&self) -> &[u8] {
        match self.entry.encoding() {
            Encoding::Plain => &self.full.raw,
            Encoding::Zstd => &self.zstd,
        }
    }
}

/// The part that an increment is built on.
#[derive(Clone)]
pub(super) struct Base {
    pub(super) part: PartReader,
    /// Packs that are not to be pointed into any more.
    pub(super) left_behind: BTreeSet<u32>,
}

/// The threads behind a part writer.
pub(super) struct PackWriter {
    full: Option<Sender<Full>>,
    free: Receiver<Vec<u8>>,
    /// Given back. (Only the writer has the other end of `free`: so it is noticed when it ends.)
    unused: Vec<Vec<u8>>,
    next: u64,
    tickets: u64,
    writer: Option<JoinHandle<Result<Written>>>,
    compressors: Vec<JoinHandle<()>>,
}

impl PackWriter {
    /// Starts the threads. Files are made at `prefix` with a running number and `.pack`. Chunks
    /// that `base` uses are not written again.
    pub(super) fn start(prefix: PathBuf, compress: Compress, base: Option<Base>) -> Self {
        let threads = task::processors();
        let buffers = BUFFERS * threads;
        let (full_in, full_out) = crossbeam_channel::bounded::<Full>(buffers);
        let (packed_in, packed_out) = crossbeam_channel::bounded::<Packed>(buffers);
        let (free_in, free_out) = crossbeam_channel::bounded::<Vec<u8>>(buffers);
        let (spare_in, spare_out) = crossbeam_channel::bounded::<Vec<u8>>(buffers);
        for _ in 0..buffers {
            // The channel holds exactly this many and its other end is alive.
            let _ = free_in.send(Vec::new());
        }
        let compressors = (0..threads)
            .map(|_| {
                let (full, packed, spare) = (full_out.clone(), packed_in.clone(), spare_out.clone());
                thread::spawn(move || {
                    // The job computes meanwhile.
                    task::step_back();
                    compress_chunks(&full, &packed, &spare, compress);
                })
            })
            .collect();
        let write = move || {
            task::step_back();
            let known = base
                .as_ref()
                .map_or_else(|| Ok(Known::default()), |base| Known::of(&base.part, &base.left_behind));
            // Then everything is written: nothing is wrong with this part, whatever is with the base.
            let known = known.unwrap_or_else(|error| {
                tracing::warn!(%error, "the chunks of the base cannot be used");
                Known::default()
            });
            let files = Files { prefix, known, done: Vec::new(), open: None, places: Vec::new() };
            files.write(&packed_out, &free_in, &spare_in)
        };
        let writer = Some(thread::spawn(write));
        Self {
            full: Some(full_in),
            free: free_out,
            unused: Vec::new(),
            next: 0,
            tickets: 0,
            writer,
            compressors,
        }
    }

    /// An empty buffer with room for a chunk; waits until the writer returns one.
    pub(super) fn buffer(&mut self) -> Result<Vec<u8>> {
        let unused = self.unused.pop();
        match unused.map_or_else(|| self.free.recv(), Ok) {
            Ok(mut buffer) => {
                buffer.clear();
                buffer.reserve_exact(CHUNK_SIZE);
                Ok(buffer)
            }
            Err(_) => Err(self.failure()),
        }
    }

    /// Gives a buffer back that is not needed after all.
    pub(super) fn give_back(&mut self, buffer: Vec<u8>) {
        self.unused.push(buffer);
    }

    /// A ticket for a chunk that will be handed to [`Self::put`].
    pub(super) fn ticket(&mut self) -> u64 {
        self.tickets += 1;
        self.tickets - 1
    }

    /// Hands over a chunk.
    pub(super) fn put(&mut self, ticket: u64, raw: Vec<u8>) -> Result<()> {
        let full = Full { number: self.next, ticket, raw };
        self.next += 1;
        match self.full.as_ref().map(|channel| channel.send(full)) {
            Some(Ok(())) => Ok(()),
            _ => Err(self.failure()),
        }
    }

    /// Waits until everything is on storage.
    pub(super) fn finish(mut self) -> Result<Written> {
        self.stop()
    }

    fn stop(&mut self) -> Result<Written> {
        drop(self.full.take());
        for thread in self.compressors.drain(..) {
            // A compressor that panicked has left a gap, which the writer reports.
            let _ = thread.join();
        }
        let panicked = || StoreError::io("write", "pack")(std::io::Error::other("a writer thread died"));
        match self.writer.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => Err(panicked()),
        }
    }

    /// Why the writer is gone.
    fn failure(&mut self) -> StoreError {
        let gone = || StoreError::io("write", "pack")(std::io::Error::other("the writer has ended"));
        self.stop().err().unwrap_or_else(gone)
    }
}

impl Drop for PackWriter {
    fn drop(&mut self) {
        if self.writer.is_some() {
            let _ = self.stop();
        }
    }
}

fn compress_chunks(
    full: &Receiver<Full>,
    packed: &Sender<Packed>,
    spare: &Receiver<Vec<u8>>,
    compress: Compress,
) {
    let mut compressor = Compressor::new(compress);
    for full in full {
        let mut zstd = spare.try_recv().unwrap_or_default();
        let (stored, encoding) = match compressor.compress(&full.raw, &mut zstd) {
            true => (&zstd, Encoding::Zstd),
            false => (&full.raw, Encoding::Plain),
        };
        let (crc, hash) = (crc32c::crc32c(stored), Digest::of(&[stored]));
        let entry = ChunkEntry::new(0, stored.len() as u32, full.raw.len() as u32, encoding, crc, hash);
        if packed.send(Packed { full, zstd, entry }).is_err() {
            return;
        }
    }
}

/// The writing thread's own.
struct Files {
    prefix: PathBuf,
    known: Known,
    done: Vec<FinishedPack>,
    open: Option<PackFile>,
    places: Vec<Option<Stored>>,
}

impl Files {
    fn write(
        mut self,
        packed: &Receiver<Packed>,
        free: &Sender<Vec<u8>>,
        spare: &Sender<Vec<u8>>,
    ) -> Result<Written> {
        let (mut early, mut next) = (BTreeMap::new(), 0);
        for chunk in packed {
            early.insert(chunk.full.number, chunk);
            while let Some(chunk) = early.remove(&next) {
                self.place(&chunk)?;
                next += 1;
                // Nobody takes buffers any more once the last chunk has been handed over.
                let _ = free.try_send(chunk.full.raw);
                let _ = spare.try_send(chunk.zstd);
            }
        }
        if !early.is_empty() {
            let lost = std::io::Error::other(format!("chunk {next} was lost: a compressing thread died"));
            return Err(StoreError::io("write", self.prefix)(lost));
        }
        self.done.extend(self.open.map(PackFile::finish).transpose()?);
        Ok((self.done, self.places))
    }

    fn place(&mut self, chunk: &Packed) -> Result<()> {
        let ticket = chunk.full.ticket as usize;
        if self.places.len() <= ticket {
            self.places.resize(ticket + 1, None);
        }
        self.places[ticket] = Some(match self.known.find(&chunk.entry) {
            Some(place) => place,
            None => self.append(chunk)?,
        });
        Ok(())
    }

    fn append(&mut self, chunk: &Packed) -> Result<Stored> {
        let pack = match self.open.take() {
            Some(pack) => self.open.insert(pack),
            None => {
                let mut path = self.prefix.clone().into_os_string();
                path.push(format!("-{}.pack", self.done.len()));
                self.open.insert(PackFile::create(path.into())?)
            }
        };
        let number = pack.append(chunk.entry, chunk.stored())?;
        let place = Stored { pack: Pack::Own(self.done.len() as u32), chunk: number, again: false };
        self.known.add(&chunk.entry, place);
        if pack.is_full() {
            self.done.extend(self.open.take().map(PackFile::finish).transpose()?);
        }
        Ok(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_that_fails_is_noticed_and_nothing_waits_for_it() {
        let mut packs = PackWriter::start("/nowhere/at/all".into(), Compress::None, None);
        let mut put = || {
            let mut buffer = packs.buffer()?;
            buffer.resize(CHUNK_SIZE, 1);
            let ticket = packs.ticket();
            packs.put(ticket, buffer)
        };
        // More than there are buffers.
        let error = (0..100_000).find_map(|_| put().err()).expect("it cannot create its file");
        assert!(error.to_string().starts_with("cannot create /nowhere/at/all-0.pack"), "{error}");
    }
}
