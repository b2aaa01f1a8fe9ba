//! The remote batch: a table of system calls written into a target and run in one go.

use super::proc::{Map, Maps};
use super::{Result, TraceeError};
use crate::sys::{batch_code, memory};
use std::io;

/// Bytes of one call in the table: number, six arguments, result.
pub(super) const CALL_SIZE: u64 = 64;
/// Where data may begin: behind the page of code.
const DATA_OFFSET: u64 = 4096;
/// Kept free at the top for the frame of rt_sigreturn(2), the XSAVE area it points to, and a handler's stack.
pub(super) const TOP_RESERVE: u64 = 48 * 1024;

/// Memory of ours in a target: code, calls and their data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arena {
    /// First address.
    pub base: u64,
    /// Size in bytes.
    pub len: u64,
}

impl Arena {
    /// Size for the batches of a capture.
    pub const SMALL: u64 = 128 * 1024;
    /// Where that of a capture is, if the process has nothing there: "ckpt" in ASCII. So it is known as ours from the
    /// moment it is mapped, whenever ckpt is killed.
    pub const PLACE: u64 = 0x636b_7074_0000;
    /// Size for the batches of a rebuild.
    pub const LARGE: u64 = 2 * 1024 * 1024;

    /// Writes the code. The mapping must be there, readable, writable and executable.
    pub fn install(self, pid: i32) -> Result<()> {
        memory::write(pid, self.base, batch_code::bytes())
            .map_err(TraceeError::request("writing the batch code", pid))
    }

    /// One that a ckpt has left in the process that was killed while it was there. It is at [`Self::PLACE`], or its
    /// code tells.
    pub fn left_in(pid: i32, maps: &Maps) -> Option<Self> {
        let code = batch_code::bytes();
        let mut there = vec![0; code.len()];
        let like_ours =
            |map: &&Map| map.size() == Self::SMALL && map.prot == 7 && !map.shared && map.inode == 0;
        let left = maps.iter().filter(like_ours).find(|map| {
            map.start == Self::PLACE || memory::read(pid, map.start, &mut there).is_ok() && there == code
        });
        left.map(|map| Self { base: map.start, len: Self::SMALL })
    }

    /// Is this address in the arena of a capture? Where [`Self::PLACE`] was not free nothing is known.
    pub fn has(address: u64) -> bool {
        (Self::PLACE..Self::PLACE + Self::SMALL).contains(&address)
    }

    /// First address behind.
    pub fn end(self) -> u64 {
        self.base + self.len
    }

    /// Bytes for calls and data.
    fn capacity(self) -> u64 {
        self.len - DATA_OFFSET - TOP_RESERVE
    }
}

/// One call of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Call(usize);

/// Calls to make in a target, with the data their arguments point to.
#[derive(Debug)]
pub struct Batch {
    arena: Arena,
    calls: Vec<[u64; 8]>,
    names: Vec<String>,
    data: Vec<u8>,
    /// Which calls are pauses.
    pauses: Vec<usize>,
}

impl Batch {
    /// An empty batch for this arena.
    pub fn new(arena: Arena) -> Self {
        Self { arena, calls: Vec::new(), names: Vec::new(), data: Vec::new(), pauses: Vec::new() }
    }

    /// Places bytes and gives their address in the target. Also a buffer for results.
    pub fn bytes(&mut self, bytes: &[u8]) -> u64 {
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        let at = self.arena.base + DATA_OFFSET + self.data.len() as u64;
        self.data.extend_from_slice(bytes);
        at
    }

    /// Places a string with its final NUL.
    pub fn cstr(&mut self, s: &str) -> u64 {
        let mut bytes = s.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(&bytes)
    }

    /// Adds a call. `name` is for the message where it fails.
    pub fn call(&mut self, name: impl Into<String>, number: i64, args: &[u64]) -> Call {
        let mut entry = [0u64; 8];
        entry[0] = number as u64;
        entry[1..=args.len()].copy_from_slice(args);
        self.calls.push(entry);
        self.names.push(name.into());
        Call(self.calls.len() - 1)
    }

    /// Adds a pause: the thread stops there, and what was given to [`super::Stopped::run_with_pauses`] is called.
    pub fn pause(&mut self) {
        let call = self.call("a pause", libc::SYS_tgkill, &[]);
        self.pauses.push(call.0);
    }

    /// Number of pauses.
    pub(super) fn pauses(&self) -> usize {
        self.pauses.len()
    }

    /// Number of calls.
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    /// Has the batch no call?
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Is there room for some more calls with up to `extra` bytes of data?
    pub fn fits(&self, extra: usize) -> bool {
        let used = self.data.len() + extra + (self.calls.len() + 8) * CALL_SIZE as usize;
        (used as u64) < self.arena.capacity()
    }

    /// The arena it is for.
    pub fn arena(&self) -> Arena {
        self.arena
    }

    /// Writes data and table, the bell as last call; gives the table's address and the number of calls.
    pub(super) fn store(&mut self, pid: i32, bell: [u64; 3]) -> Result<(u64, u64)> {
        if !self.fits(0) {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "the batch is larger than its arena");
            return Err(TraceeError::Request { what: "writing a batch", tid: pid, source });
        }
        let table = self.bytes(&[]);
        let at = self.data.len();
        let bell = [libc::SYS_tgkill as u64, bell[0], bell[1], bell[2], 0, 0, 0, 0];
        for pause in &self.pauses {
            self.calls[*pause] = bell;
        }
        for entry in self.calls.iter().chain([&bell]) {
            entry.iter().for_each(|word| self.data.extend_from_slice(&word.to_ne_bytes()));
        }
        memory::write(pid, self.arena.base + DATA_OFFSET, &self.data)
            .map_err(TraceeError::request("writing a batch", pid))?;
        self.data.truncate(at);
        Ok((table, self.calls.len() as u64 + 1))
    }

    /// Reads data and results back after the run.
    pub(super) fn load(self, pid: i32, tid: i32) -> Result<Done> {
        let table = self.data.len();
        let mut all = vec![0u8; table + self.calls.len() * CALL_SIZE as usize];
        let base = self.arena.base + DATA_OFFSET;
        memory::read(pid, base, &mut all).map_err(TraceeError::request("reading a batch's results", pid))?;
        let results = (0..self.calls.len())
            .map(|i| {
                let at = table + i * CALL_SIZE as usize + 56;
                i64::from_ne_bytes(all[at..at + 8].try_into().unwrap_or_default())
            })
            .collect();
        all.truncate(table);
        Ok(Done { tid, results, names: self.names, data: all, base })
    }
}

/// A batch that has run.
#[derive(Debug)]
pub struct Done {
    tid: i32,
    results: Vec<i64>,
    names: Vec<String>,
    data: Vec<u8>,
    base: u64,
}

impl Done {
    /// Result of a call, or its error with the call's name.
    pub fn result(&self, call: Call) -> Result<i64> {
        let value = self.results[call.0];
        if (-4095..0).contains(&value) {
            let source = io::Error::from_raw_os_error(-value as i32);
            return Err(TraceeError::Call { what: self.names[call.0].clone(), tid: self.tid, source });
        }
        Ok(value)
    }

    /// Raw result: a negative error number on failure.
    pub fn raw(&self, call: Call) -> i64 {
        self.results[call.0]
    }

    /// The first failure of all calls, if any.
    pub fn all_ok(&self) -> Result<()> {
        (0..self.results.len()).try_for_each(|i| self.result(Call(i)).map(drop))
    }

    /// Bytes at an address that [`Batch::bytes`] gave.
    pub fn read(&self, at: u64, len: usize) -> &[u8] {
        let start = (at - self.base) as usize;
        &self.data[start..start + len]
    }

    /// A 64-bit word at such an address.
    pub fn word(&self, at: u64) -> u64 {
        u64::from_ne_bytes(self.read(at, 8).try_into().unwrap_or_default())
    }
}
