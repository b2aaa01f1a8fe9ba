//! The io_uring instances of a process, as fdinfo shows them (`io_uring_show_fdinfo`).
//!
//! A request under way may write to memory at any time: a device does so without a fault, into pages that were marked
//! as written when the request was made. So nobody may forget such marks, or call a copy final, while there is one.
//! What the kernel has finished and not yet reported waits for the thread that asked, and so do requests that are to be
//! tried once more: a stopped thread has to be led through the kernel for them ([`settle`]).

use super::freeze::FrozenProcess;
use super::healing::Finder;
use super::proc::Maps;
use super::{Batch, Stopped};
use crate::sys::io_uring::{self, REGISTERED_RING};
use anyhow::Result;
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

/// How the kernel calls them, in maps and as descriptors.
pub const PATH: &str = "anon_inode:[io_uring]";
/// How long requests under way are waited for while the job is stopped, and the time between two looks.
const PATIENCE: Duration = Duration::from_millis(10);
const BETWEEN_LOOKS: Duration = Duration::from_micros(100);
/// Rings that a thread can register (`IO_RINGFD_REG_MAX`).
const REGISTERED: u64 = 16;

/// Requests were under way for as long as was waited. They may end by themselves.
#[derive(Debug, thiserror::Error)]
#[error("requests to an io_uring of process {pid} are under way, and do not end in time")]
pub struct Busy {
    /// The process.
    pub pid: i32,
}

/// What fdinfo shows of a ring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Length of the submission queue.
    pub sq_entries: u32,
    /// Length of the completion queue.
    pub cq_entries: u32,
    /// Requests that the kernel has taken, modulo 2^32.
    pub submitted: u32,
    /// Completions that it has put into the queue, modulo 2^32.
    pub completed: u32,
    /// Does a thread of the kernel submit (`IORING_SETUP_SQPOLL`)?
    pub polled: bool,
    /// Registered files.
    pub files: u32,
    /// Registered buffers: address and length; zeros for an empty place.
    pub buffers: Vec<(u64, u64)>,
    /// Requests that wait for a file to become ready.
    pub waiting: usize,
    /// Completions that found no room in the queue.
    pub overflow: usize,
}

impl State {
    /// Reads the state of a ring; none while the kernel is at work on it.
    ///
    /// # Errors
    /// The descriptor is gone.
    pub fn read(pid: i32, fd: i32) -> io::Result<Option<Self>> {
        Ok(Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))?))
    }

    fn parse(text: &str) -> Option<Self> {
        let (mut state, mut section, mut complete) = (Self::default(), "", false);
        for line in text.lines() {
            let indented = line.starts_with(' ');
            let (key, value) = line.split_once(':').unwrap_or((line, ""));
            let (key, value) = (key.trim(), value.trim());
            if !indented {
                section = key;
            }
            let mask = || u32::from_str_radix(value.trim_start_matches("0x"), 16).ok();
            match (indented, section) {
                (false, "SqMask") => state.sq_entries = mask()?.checked_add(1)?,
                (false, "CqMask") => (state.cq_entries, complete) = (mask()?.checked_add(1)?, true),
                (false, "CachedSqHead") => state.submitted = value.parse().ok()?,
                (false, "CachedCqTail") => state.completed = value.parse().ok()?,
                (false, "SqThread") => state.polled = value != "-1",
                (false, "UserFiles") => state.files = value.parse().ok()?,
                // `    0: 0x7f35fa0d6000/1048576`, or `<none>`.
                (true, "UserBufs") => state.buffers.push(buffer(value)),
                (true, "PollList") => state.waiting += 1,
                (true, "CqOverflowList") => state.overflow += 1,
                _ => {}
            }
        }
        complete.then_some(state)
    }

    /// Is every request completed, by one completion each?
    pub fn is_quiet(&self) -> bool {
        self.submitted == self.completed && self.waiting == 0 && self.overflow == 0
    }

    /// Pages of the registered buffers. The kernel has pinned them: they are written without a fault.
    pub fn pinned(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let pages = |(start, len): &(u64, u64)| start / 4096..start.saturating_add(*len).div_ceil(4096);
        self.buffers.iter().filter(|(_, len)| *len > 0).map(pages)
    }
}

fn buffer(text: &str) -> (u64, u64) {
    let parse = || {
        let (start, len) = text.split_once('/')?;
        Some((u64::from_str_radix(start.strip_prefix("0x")?, 16).ok()?, len.parse().ok()?))
    };
    parse().unwrap_or_default()
}

/// A descriptor for each ring that the process has mapped.
///
/// # Errors
/// The process is gone, or has no descriptor for one of them.
pub fn of(pid: i32, maps: &Maps) -> io::Result<Vec<i32>> {
    let mut inodes: BTreeSet<u64> =
        maps.iter().filter(|map| map.path.starts_with(PATH)).map(|map| map.inode).collect();
    let mut found = Vec::new();
    if inodes.is_empty() {
        return Ok(found);
    }
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        if !std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == PATH) {
            continue;
        }
        let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if inodes.remove(&std::fs::metadata(entry.path())?.ino()) {
            found.push(fd);
        }
    }
    match inodes.is_empty() {
        true => Ok(found),
        false => Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("process {pid} has an io_uring mapped and no descriptor for it"),
        )),
    }
}

/// The states of all rings, if all are quiet.
fn quiet(pid: i32, rings: &[i32]) -> io::Result<Option<Vec<State>>> {
    let states: Option<Vec<State>> =
        rings.iter().map(|fd| State::read(pid, *fd)).collect::<io::Result<_>>()?;
    Ok(states.filter(|states| states.iter().all(State::is_quiet)))
}

/// Is certainly no request under way in a stopped process?
pub fn are_quiet(pid: i32, maps: &Maps) -> bool {
    of(pid, maps).and_then(|rings| quiet(pid, &rings)).is_ok_and(|states| states.is_some())
}

/// Waits for the end of what is under way in a stopped process, for a few milliseconds; gives the states of its rings,
/// or nothing if it did not end.
///
/// # Errors
/// The process is gone, or one of its rings cannot be seen.
pub fn settle(process: &mut FrozenProcess, finder: &mut Finder, maps: &Maps) -> Result<Option<Vec<State>>> {
    let pid = process.pid;
    let rings = of(pid, maps)?;
    if let Some(states) = quiet(pid, &rings)? {
        return Ok(Some(states));
    }
    let start = Instant::now();
    process.with_arena(finder, maps, |threads, arena| {
        loop {
            for thread in &mut *threads {
                let mut batch = Batch::new(arena);
                for ring in &rings {
                    // Nothing is submitted and nothing waited for.
                    let args = [*ring as u64, 0, 0, io_uring::GETEVENTS.into(), 0, 0];
                    batch.call("io_uring_enter", libc::SYS_io_uring_enter, &args);
                }
                thread.run(batch, true)?;
                if let Some(states) = quiet(pid, &rings)? {
                    return Ok(Some(states));
                }
            }
            if start.elapsed() > PATIENCE {
                return Ok(None);
            }
            std::thread::sleep(BETWEEN_LOOKS);
        }
    })
}

/// Has the thread given rings a number of their own (`IORING_REGISTER_RING_FDS`)? Nobody can see which.
///
/// # Errors
/// The thread is gone.
pub fn are_registered(thread: &mut Stopped, arena: super::Arena) -> super::Result<bool> {
    let mut batch = Batch::new(arena);
    let calls: Vec<_> = (0..REGISTERED)
        .map(|number| {
            let args = [number, 0, 0, REGISTERED_RING.into(), 0, 0];
            batch.call("io_uring_enter", libc::SYS_io_uring_enter, &args)
        })
        .collect();
    let done = thread.run(batch, true)?;
    let none = [-i64::from(libc::EBADF), -i64::from(libc::EINVAL)];
    Ok(calls.into_iter().any(|call| !none.contains(&done.raw(call))))
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1298496\nSqMask:\t0x7\nSqHead:\t12\nSqTail:\t13\n\
        CachedSqHead:\t12\nCqMask:\t0xf\nCqHead:\t11\nCqTail:\t12\nCachedCqTail:\t12\nSQEs:\t1\n\
        \x20   5: opcode:READ, fd:3, flags:0, off:0, addr:0x0, rw_flags:0x0, buf_index:0 user_data:0\nCQEs:\t1\n\
        \x20  11: user_data:5, res:3, flag:0\nSqThread:\t-1\nSqThreadCpu:\t-1\nUserFiles:\t0\nUserBufs:\t2\n\
        \x20   0: 0x7f35fa0d6800/4096\n    1: <none>\nPollList:\nCqOverflowList:\nNAPI:\tdisabled\n";

    #[test]
    fn state_of_a_quiet_ring() {
        let state = State::parse(INFO).unwrap();
        assert_eq!((state.sq_entries, state.cq_entries), (8, 16));
        assert_eq!((state.submitted, state.completed), (12, 12));
        assert_eq!(state.buffers, [(0x7f35_fa0d_6800, 4096), (0, 0)]);
        assert!(state.is_quiet() && !state.polled);
        assert!(state.pinned().eq(std::iter::once(0x7_f35f_a0d6..0x7_f35f_a0d8)));
    }

    #[test]
    fn what_is_under_way_is_seen() {
        let busy = |from: &str, to: &str| State::parse(&INFO.replace(from, to)).is_none_or(|s| !s.is_quiet());
        assert!(busy("CachedSqHead:\t12", "CachedSqHead:\t13"));
        assert!(busy("PollList:\n", "PollList:\n  op=22, task_works=0\n"));
        assert!(busy("CqOverflowList:\n", "CqOverflowList:\n  user_data=7, res=3, flags=0\n"));
        // The kernel shows nothing of a ring that it is at work on.
        assert!(State::parse("pos:\t0\nflags:\t02000002\n").is_none());
    }
}
