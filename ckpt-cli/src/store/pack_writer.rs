//! From full chunks to durable packs: threads compress, one thread writes.
//!
//! Chunks are written in the order in which they are handed over. Each has a *ticket*; which chunk
//! of which pack it has become is known at the end. A fixed number of buffers goes round, which
//! bounds the memory.

use super::{Compress, Result, StoreError, files, page_table::Stored};
use ckpt_common::image::{
    Digest,
    pack::{self, CHUNK_SIZE, ChunkEntry, Encoding, Header, MAX_CHUNKS},
};
use crossbeam_channel::{Receiver, Sender};
use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    path::PathBuf,
    thread::{self, JoinHandle},
};
use zerocopy::IntoBytes;

/// Buffers per compressing thread: enough to bridge the writer's waits.
const BUFFERS: usize = 48;
/// A chunk that shrinks by less than this part of its size is stored as it is.
const WORTH: usize = 32;

/// A pack that is complete and flushed, under a temporary name.
pub(super) struct FinishedPack {
    pub(super) path: PathBuf,
    pub(super) id: Digest,
    pub(super) bytes: u64,
}

struct Full {
    number: u64,
    ticket: u64,
    raw: Vec<u8>,
}

struct Packed {
    number: u64,
    ticket: u64,
    raw: Vec<u8>,
    /// Compressed content, where that is worth it.
    zstd: Option<Vec<u8>>,
    crc: u32,
    hash: Digest,
}

impl Packed {
    fn stored(&self) -> &[u8] {
        self.zstd.as_ref().unwrap_or(&self.raw)
    }
}

/// The finished packs, and for each ticket where its chunk is.
type Written = (Vec<FinishedPack>, Vec<Stored>);

/// The threads behind a part writer.
pub(super) struct PackWriter {
    full: Option<Sender<Full>>,
    free: Receiver<Vec<u8>>,
    freed: Sender<Vec<u8>>,
    next: u64,
    tickets: u64,
    writer: Option<JoinHandle<Result<Written>>>,
    compressors: Vec<JoinHandle<()>>,
}

impl PackWriter {
    /// Starts the threads. Files are made at `prefix` with a running number and `.pack`.
    pub(super) fn start(prefix: PathBuf, compress: Compress) -> Self {
        let threads = thread::available_parallelism().map_or(1, |n| n.get());
        let buffers = BUFFERS * threads;
        let (full_in, full_out) = crossbeam_channel::bounded::<Full>(buffers);
        let (packed_in, packed_out) = crossbeam_channel::bounded::<Packed>(buffers);
        let (free_in, free_out) = crossbeam_channel::bounded::<Vec<u8>>(buffers);
        for _ in 0..buffers {
            // The channel holds exactly this many and its other end is alive.
            let _ = free_in.send(Vec::new());
        }
        let compressors = (0..threads)
            .map(|_| {
                let (full, packed) = (full_out.clone(), packed_in.clone());
                thread::spawn(move || compress_chunks(&full, &packed, compress))
            })
            .collect();
        let freed = free_in.clone();
        let writer = Some(thread::spawn(move || write_packs(&packed_out, &free_in, prefix)));
        Self { full: Some(full_in), free: free_out, freed, next: 0, tickets: 0, writer, compressors }
    }

    /// An empty buffer with room for a chunk; waits until the writer returns one.
    pub(super) fn buffer(&mut self) -> Result<Vec<u8>> {
        match self.free.recv() {
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
        // There is room for all of them.
        let _ = self.freed.try_send(buffer);
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

fn compress_chunks(full: &Receiver<Full>, packed: &Sender<Packed>, compress: Compress) {
    let mut compressor = match compress {
        Compress::None => None,
        // Only an impossible level fails; then chunks are stored as they are.
        Compress::Zstd(level) => zstd::bulk::Compressor::new(level).ok(),
    };
    for Full { number, ticket, raw } in full {
        let zstd = compressor.as_mut().and_then(|compressor| compressor.compress(&raw).ok());
        let zstd = zstd.filter(|zstd| zstd.len() < raw.len() - raw.len() / WORTH);
        let stored = zstd.as_ref().unwrap_or(&raw);
        let (crc, hash) = (crc32c::crc32c(stored), Digest::of(&[stored]));
        if packed.send(Packed { number, ticket, raw, zstd, crc, hash }).is_err() {
            return;
        }
    }
}

/// A pack in the making.
struct OpenPack {
    path: PathBuf,
    file: File,
    header: Header,
    chunks: Vec<ChunkEntry>,
    offset: u64,
}

impl OpenPack {
    fn create(path: PathBuf) -> Result<Self> {
        let header = Header::new(files::nonce()?);
        let mut file = files::create_new(&path)?;
        file.write_all(header.as_bytes()).map_err(StoreError::io("write", &path))?;
        Ok(Self { path, file, header, chunks: Vec::new(), offset: Header::SIZE as u64 })
    }

    fn append(&mut self, chunk: &Packed) -> Result<()> {
        let stored = chunk.stored();
        self.file.write_all(stored).map_err(StoreError::io("write", &self.path))?;
        let encoding = if chunk.zstd.is_some() { Encoding::Zstd } else { Encoding::Plain };
        let (stored, raw) = (stored.len() as u32, chunk.raw.len() as u32);
        self.chunks.push(ChunkEntry::new(self.offset, stored, raw, encoding, chunk.crc, chunk.hash));
        self.offset += u64::from(stored);
        Ok(())
    }

    fn finish(mut self) -> Result<FinishedPack> {
        let (tail, id) = pack::finish(&self.header, &self.chunks);
        self.file.write_all(&tail).map_err(StoreError::io("write", &self.path))?;
        self.file.sync_all().map_err(StoreError::io("flush", &self.path))?;
        Ok(FinishedPack { path: self.path, id, bytes: self.offset + tail.len() as u64 })
    }
}

fn write_packs(packed: &Receiver<Packed>, free: &Sender<Vec<u8>>, prefix: PathBuf) -> Result<Written> {
    let mut places = Vec::new();
    let (mut done, mut open, mut early, mut next) = (Vec::new(), None::<OpenPack>, BTreeMap::new(), 0);
    for chunk in packed {
        early.insert(chunk.number, chunk);
        while let Some(chunk) = early.remove(&next) {
            let pack = match open.take() {
                Some(pack) => open.insert(pack),
                None => {
                    let mut path = prefix.clone().into_os_string();
                    path.push(format!("-{}.pack", done.len()));
                    open.insert(OpenPack::create(path.into())?)
                }
            };
            if places.len() <= chunk.ticket as usize {
                places.resize(chunk.ticket as usize + 1, Stored { pack: u32::MAX, chunk: 0 });
            }
            places[chunk.ticket as usize] =
                Stored { pack: done.len() as u32, chunk: pack.chunks.len() as u32 };
            pack.append(&chunk)?;
            if pack.chunks.len() as u32 == MAX_CHUNKS {
                done.extend(open.take().map(OpenPack::finish).transpose()?);
            }
            next += 1;
            // Nobody takes buffers any more once the last chunk has been handed over.
            let _ = free.try_send(chunk.raw);
        }
    }
    if !early.is_empty() {
        let lost = std::io::Error::other(format!("chunk {next} was lost: a compressing thread died"));
        return Err(StoreError::io("write", prefix)(lost));
    }
    done.extend(open.map(OpenPack::finish).transpose()?);
    Ok((done, places))
}
