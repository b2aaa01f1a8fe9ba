//! Bytes that know their place in a stream, and the two ends of a connection that count them.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

/// The byte at a position of the stream `seed`.
pub fn byte(seed: u64, position: u64) -> u8 {
    // splitmix64 of the position: neighbours have nothing to do with each other.
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(position / 8);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((x ^ (x >> 31)) >> (position % 8 * 8)) as u8
}

/// One end of a connection.
#[derive(Debug)]
pub struct End {
    /// The socket.
    pub stream: TcpStream,
    /// Stream that is written, and how much of it was.
    pub written: (u64, u64),
    /// Stream that is read, and how much of it was.
    pub read: (u64, u64),
}

/// The two ends of a connection, which write the streams `seed` and `seed + 1`.
pub fn ends(one: TcpStream, two: TcpStream, seed: u64) -> (End, End) {
    let end = |stream, writes, reads| End { stream, written: (writes, 0), read: (reads, 0) };
    (end(one, seed, seed + 1), end(two, seed + 1, seed))
}

impl End {
    /// Writes up to `length` bytes, as many as the kernel takes without waiting.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn write(&mut self, length: usize) -> Result<usize> {
        self.stream.set_nonblocking(true)?;
        self.write_now(length)
    }

    /// The same for a stream that does not block.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn write_now(&mut self, length: usize) -> Result<usize> {
        let (seed, position) = self.written;
        let data: Vec<u8> = (position..).take(length).map(|at| byte(seed, at)).collect();
        let mut done = 0;
        while done < length {
            match self.stream.write(&data[done..]) {
                Ok(more) => done += more,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).with_context(|| format!("write at {}", self.written.1)),
            }
        }
        self.written.1 += done as u64;
        Ok(done)
    }

    /// Reads once and checks what comes: `Some(0)` at the end, `None` where nothing came in time.
    ///
    /// # Errors
    /// A wrong byte, or the connection is broken.
    pub fn read(&mut self, within: Duration) -> Result<Option<usize>> {
        self.stream.set_nonblocking(false)?;
        self.stream.set_read_timeout(Some(within))?;
        self.read_now(256 << 10)
    }

    /// The same for a stream that does not block, up to `length` bytes.
    ///
    /// # Errors
    /// A wrong byte, or the connection is broken.
    pub fn read_now(&mut self, length: usize) -> Result<Option<usize>> {
        let mut buffer = vec![0; length];
        let length = match self.stream.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Ok(None);
            }
            Err(error) => return Err(error).with_context(|| format!("read at {}", self.read.1)),
        };
        let (seed, position) = self.read;
        for (offset, got) in buffer[..length].iter().enumerate() {
            let at = position + offset as u64;
            ensure!(*got == byte(seed, at), "stream {seed}: wrong byte at {at}");
        }
        self.read.1 += length as u64;
        Ok(Some(length))
    }

    /// Reads up to a position of the stream.
    ///
    /// # Errors
    /// A wrong byte, an early end, or nothing for 20 seconds.
    pub fn read_to(&mut self, position: u64) -> Result<()> {
        while self.read.1 < position {
            let length = self.read(Duration::from_secs(20))?;
            ensure!(length.is_some(), "nothing comes after {} of {position} bytes", self.read.1);
            ensure!(length != Some(0), "the stream ends at {} of {position} bytes", self.read.1);
        }
        ensure!(self.read.1 == position, "{} bytes came, {position} were written", self.read.1);
        Ok(())
    }

    /// Reads the end of the stream.
    ///
    /// # Errors
    /// Something else comes, or nothing for 20 seconds.
    pub fn read_end(&mut self) -> Result<()> {
        ensure!(self.read(Duration::from_secs(20))? == Some(0), "no end at {}", self.read.1);
        Ok(())
    }
}

/// Everything that was written arrives, and so does what is written now, in both directions.
///
/// # Errors
/// Something was lost, invented or changed.
pub fn check_both(one: &mut End, two: &mut End) -> Result<()> {
    for _ in 0..2 {
        two.read_to(one.written.1)?;
        one.read_to(two.written.1)?;
        ensure!(one.write(1000)? == 1000 && two.write(1000)? == 1000, "no room for 1000 bytes");
    }
    two.read_to(one.written.1)?;
    one.read_to(two.written.1)
}

/// What one process of the workload `ckpt-stream` tells.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Per connection: the stream that is written, and how much of it; the one that is read, likewise.
    pub streams: Vec<((u64, u64), (u64, u64))>,
    /// The times when nothing was possible.
    pub freezes: Vec<Freeze>,
    /// All streams were read to their ends.
    pub done: bool,
    /// A byte was wrong, or a connection broke.
    pub error: Option<String>,
}

/// A time when the process was not running.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Freeze {
    /// How long, in milliseconds.
    pub gap_ms: f64,
    /// How long after it the last of the connections read something, in milliseconds.
    pub stall_ms: f64,
}

impl Report {
    /// The positions of all ends.
    pub fn of(ends: &[End]) -> Self {
        Self { streams: ends.iter().map(|end| (end.written, end.read)).collect(), ..Self::default() }
    }

    /// Bytes read in all.
    pub fn received(&self) -> u64 {
        self.streams.iter().map(|(_, read)| read.1).sum()
    }

    /// Replaces the report in a file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let unfinished = path.with_extension("new");
        fs::write(&unfinished, serde_json::to_vec(self)?)?;
        fs::rename(&unfinished, path).with_context(|| format!("write {}", path.display()))
    }

    /// The last report in a file.
    ///
    /// # Errors
    /// There is none.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }
}
