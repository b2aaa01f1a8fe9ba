//! io_uring(7).
//!
//! **Capture.** A ring without requests under way is its counters and the content of its two shared areas. Programs
//! keep counters of their own beside those in the rings, and the kernel keeps some where nobody can write. So a ring of
//! which more is not known than that as many completions as requests were seen is one that can be made again:
//!
//! **Rebuild.** A new ring is led through as many requests as the old one has had, each doing nothing, until the
//! kernel's counters are the same; then the areas get their content. It is made in our process and taken by the
//! restored one; registered buffers the restored process registers itself.

use super::{Captured, Probe};
use crate::sys::io_uring::{self as ring, Area, Params, setup};
use crate::tracee::rings::State;
use anyhow::{Context as _, Result, bail, ensure};
use ckpt_common::image::io_uring::IoUring;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Most requests that a new ring is led through, each taking about 100 ns.
const MOST_REQUESTS: u32 = 1 << 28;
/// Longest submission queue (`IORING_MAX_ENTRIES`); a completion queue may be twice as long.
const MOST_ENTRIES: u32 = 32768;
/// Groups of provided buffers that are looked for in the freeze.
const GROUPS: u16 = 64;
/// Size of an entry and of a completion.
const ENTRY: usize = 64;
const COMPLETION: usize = 16;

/// What stands in the way of saving a ring of a running program.
pub fn obstacle(probe: &Probe) -> Result<Option<String>> {
    for _ in 0..100 {
        if let Some(state) = State::read(probe.pid, probe.fd).context("reading the state of an io_uring")? {
            return look(probe, &state, u16::MAX).map(Result::err);
        }
        // The kernel is at work on it.
        std::thread::sleep(Duration::from_millis(1));
    }
    bail!("the kernel does not show the state of an io_uring")
}

/// Captures a ring of a stopped program.
pub fn capture(probe: &Probe) -> Result<Captured> {
    let state = State::read(probe.pid, probe.fd).context("reading the state of an io_uring")?;
    let state = state.filter(State::is_quiet).ok_or(crate::tracee::rings::Busy { pid: probe.pid })?;
    match look(probe, &state, GROUPS)? {
        Ok(found) => Captured::new(&IoUring {
            sq_entries: state.sq_entries,
            cq_entries: state.cq_entries,
            flags: found.flags,
            offsets: found.params.offsets().to_vec(),
            requests: state.submitted,
            rings: found.rings,
            entries: found.entries,
            buffers: state.buffers,
        }),
        Err(reason) => bail!("{reason}"),
    }
}

/// How a ring was made, and what is in it.
struct Found {
    flags: u32,
    params: Params,
    rings: Vec<u8>,
    entries: Vec<u8>,
}

/// Looks at a ring; gives the reason if it cannot be made again. Up to so many groups of provided buffers are looked for.
fn look(probe: &Probe, state: &State, groups: u16) -> Result<Result<Found, String>> {
    let no = |reason: &str| Ok(Err(reason.to_owned()));
    let fd = probe.file.as_fd();
    if state.polled {
        return no("a kernel thread submits its requests (IORING_SETUP_SQPOLL): it cannot be stopped");
    }
    if state.files > 0 {
        return no("registered files of an io_uring are not supported yet");
    }
    if state.submitted > MOST_REQUESTS {
        let (has, most) = (state.submitted, MOST_REQUESTS);
        return Ok(Err(format!("it has had {has} requests, and a new ring is led through {most} at most")));
    }
    match ring::why_no_eventfd(fd) {
        libc::EFAULT => {}
        libc::EBUSY => return no("an eventfd registered with an io_uring is not supported yet"),
        libc::EEXIST => {
            return no("a ring for one thread only (IORING_SETUP_SINGLE_ISSUER) is not supported yet");
        }
        libc::EACCES => return no("restrictions of an io_uring cannot be seen from outside"),
        error => return Ok(Err(format!("it does not say how it was made (error {error})"))),
    }
    if ring::enter(fd, 0, 0, 0).is_err_and(|error| error.raw_os_error() == Some(libc::EBADFD)) {
        return no("it is not enabled yet (IORING_SETUP_R_DISABLED)");
    }
    let (known, params) =
        ring::setup(state.sq_entries, state.cq_entries, 0).context("making an io_uring like it")?;
    let has = |fd, group| ring::buffer_group(fd, group).err().and_then(|error| error.raw_os_error());
    // Where a ring without any does not say so, the kernel cannot tell.
    if has(known.as_fd(), 0) == Some(libc::ENOENT) && (0..groups).any(|n| has(fd, n) != Some(libc::ENOENT)) {
        return no("provided buffers of an io_uring are not supported yet");
    }
    let entries = Area::map(fd, ring::ENTRIES, params.entries_len());
    let Ok(entries) = entries.and_then(|area| area.read()) else {
        return no("its queues are in memory of the program's own (IORING_SETUP_NO_MMAP)");
    };
    let read = |params: &Params| Area::map(fd, ring::RINGS, params.rings_len()).and_then(|area| area.read());
    let (flags, params, rings) = match read(&params) {
        Ok(rings) if has_array(&params, &rings, &entries) => (0, params, rings),
        _ => {
            let (_, params) = ring::setup(state.sq_entries, state.cq_entries, setup::NO_SQARRAY)
                .context("making an io_uring like it")?;
            (setup::NO_SQARRAY, params, read(&params).context("reading the queues of an io_uring")?)
        }
    };
    let word = |at: usize| rings.get(at..at + 4).is_some_and(|word| word != [0; 4]);
    if word(params.sq_dropped()) || word(params.cq_overflow()) {
        return no("it has thrown requests or completions away");
    }
    let completions = &rings[params.completions()..][..COMPLETION * state.cq_entries as usize];
    if entries.chunks_exact(ENTRY).any(is_uneven) || completions.chunks_exact(COMPLETION).any(is_more) {
        return no("it has had requests with none or several completions: nobody can tell what is under way");
    }
    Ok(Ok(Found { flags, params, rings, entries }))
}

/// Is the submission queue an array of indexes (`!IORING_SETUP_NO_SQARRAY`)? The kernel does not tell. Where there is
/// none, the place stays zero, and so it does where only the first entry is ever used.
fn has_array(params: &Params, rings: &[u8], entries: &[u8]) -> bool {
    let array = &rings[params.sq_array()..];
    array.iter().any(|byte| *byte != 0)
        || (entries[..ENTRY].iter().any(|byte| *byte != 0) && entries[ENTRY..].iter().all(|byte| *byte == 0))
}

/// Entries (`struct io_uring_sqe`) of requests that do not complete exactly once, or that have another size.
fn is_uneven(entry: &[u8]) -> bool {
    /// linux/io_uring.h
    const CQE_SKIP_SUCCESS: u8 = 1 << 6;
    const POLL_ADD: u8 = 6;
    const RECVMSG: u8 = 10;
    const TIMEOUT: u8 = 11;
    const ACCEPT: u8 = 13;
    const RECV: u8 = 27;
    const TIMEOUT_MULTISHOT: u32 = 1 << 6;
    /// From here on: messages to other rings, commands of drivers, sending without copies, receiving several times.
    const MSG_RING: u8 = 40;
    let priority = u16::from_ne_bytes([entry[2], entry[3]]);
    let word = |at: usize| u32::from_ne_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
    entry[1] & CQE_SKIP_SUCCESS != 0
        || match entry[0] {
            POLL_ADD => word(24) & 1 != 0,
            ACCEPT => priority & 1 != 0,
            RECV | RECVMSG => priority & 2 != 0,
            TIMEOUT => word(28) & TIMEOUT_MULTISHOT != 0,
            opcode => [MSG_RING, 46, 47, 48, 49, 58].contains(&opcode),
        }
}

/// Completions (`struct io_uring_cqe`) that are not the only one of their request.
fn is_more(completion: &[u8]) -> bool {
    const MORE: u8 = 1 << 1;
    const NOTIFICATION: u8 = 1 << 3;
    completion[12] & (MORE | NOTIFICATION) != 0
}

/// Makes a ring.
pub fn rebuild(old: &IoUring) -> Result<OwnedFd> {
    ensure!(old.requests <= MOST_REQUESTS, "an io_uring with {} requests", old.requests);
    ensure!(old.flags & !setup::NO_SQARRAY == 0, "an io_uring with unknown flags {:#x}", old.flags);
    let lengths = [old.sq_entries, old.cq_entries];
    let fits = lengths.iter().all(|n| n.is_power_of_two() && *n <= 2 * MOST_ENTRIES);
    ensure!(fits, "an io_uring with queues of {} and {}", old.sq_entries, old.cq_entries);
    let (fd, params) = ring::setup(old.sq_entries, old.cq_entries, old.flags).context("io_uring_setup")?;
    ensure!(
        params.offsets() == old.offsets
            && old.rings.len() == params.rings_len()
            && old.entries.len() == params.entries_len(),
        "rings of io_uring are laid out in another way by this kernel, and the program looks where they were before"
    );
    let rings = Area::map(fd.as_fd(), ring::RINGS, params.rings_len()).context("mapping an io_uring")?;
    let entries =
        Area::map(fd.as_fd(), ring::ENTRIES, params.entries_len()).context("mapping an io_uring")?;
    lead(&fd, &params, &rings, old)?;
    rings.write(&old.rings).context("filling the queues of an io_uring")?;
    entries.write(&old.entries).context("filling an io_uring")?;
    let now = (rings.get(params.sq_head()), rings.get(params.cq_tail()));
    ensure!(now == (old.requests, old.requests), "an io_uring whose counters do not fit: {now:?}");
    Ok(fd)
}

/// Leads a new ring through requests that do nothing. Its entries are all zero: `IORING_OP_NOP`.
fn lead(fd: &OwnedFd, params: &Params, rings: &Area, old: &IoUring) -> Result<()> {
    // As far as is allowed at once: the kernel takes what it is told to.
    rings.set(params.sq_tail(), old.requests);
    let mut done = 0;
    while done < old.requests {
        let next = (old.requests - done).min(old.sq_entries).min(old.cq_entries);
        let taken = ring::enter(fd.as_fd(), next, 0, 0).context("leading an io_uring to where it was")?;
        ensure!(taken > 0, "an io_uring takes no requests");
        done += taken;
        rings.set(params.cq_head(), rings.get(params.cq_tail()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A ring that has had some requests, as a program leaves it: one more made, one completion not taken.
    fn used(requests: u32, flags: u32) -> IoUring {
        let (fd, params) = ring::setup(8, 16, flags).unwrap();
        let mut old = IoUring {
            sq_entries: 8,
            cq_entries: 16,
            flags,
            offsets: params.offsets().to_vec(),
            requests,
            rings: Vec::new(),
            entries: vec![7; params.entries_len()],
            buffers: Vec::new(),
        };
        let rings = Area::map(fd.as_fd(), ring::RINGS, params.rings_len()).unwrap();
        lead(&fd, &params, &rings, &old).unwrap();
        rings.set(params.sq_tail(), requests + 1);
        rings.set(params.cq_head(), requests.saturating_sub(1));
        old.rings = rings.read().unwrap();
        old
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn counters_and_content_come_back(requests in 0_u32..2000, array: bool) {
            let old = used(requests, if array { 0 } else { setup::NO_SQARRAY });
            let fd = rebuild(&old).unwrap();
            let (_, params) = ring::setup(8, 16, old.flags).unwrap();
            let rings = Area::map(fd.as_fd(), ring::RINGS, params.rings_len()).unwrap();
            let entries = Area::map(fd.as_fd(), ring::ENTRIES, params.entries_len()).unwrap();
            prop_assert_eq!(&rings.read().unwrap(), &old.rings);
            prop_assert_eq!(&entries.read().unwrap(), &old.entries);
            // The kernel goes on where the program is: the one entry that waits, and no other.
            entries.write(&vec![0; params.entries_len()]).unwrap();
            prop_assert_eq!(ring::enter(fd.as_fd(), 8, 0, 0).unwrap(), 1);
            prop_assert_eq!(rings.get(params.cq_tail()), requests + 1);
        }
    }

    #[test]
    fn requests_with_another_number_of_completions_are_known() {
        let entry = |change: &dyn Fn(&mut [u8])| {
            let mut entry = [0; ENTRY];
            change(&mut entry);
            is_uneven(&entry)
        };
        assert!(!entry(&|_| {}));
        assert!(!entry(&|e| e[0] = 22));
        assert!(entry(&|e| e[1] = 1 << 6));
        assert!(entry(&|e| (e[0], e[24]) = (6, 1)));
        assert!(entry(&|e| (e[0], e[2]) = (13, 1)));
        assert!(entry(&|e| (e[0], e[2]) = (27, 2)));
        assert!(is_more(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]));
    }
}
