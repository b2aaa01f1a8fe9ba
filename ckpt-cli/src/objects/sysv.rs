//! System V shared memory (shmget(2)): segments that are attached, and those that wait to be.
//!
//! A segment has an id that programs keep, so it comes back with the same one: `kernel.shm_next_id` (Documentation/
//! admin-guide/sysctl/kernel.rst; with CONFIG_CHECKPOINT_RESTORE) says which id the next segment gets.

use super::{CaptureContext, Captured, Probe, decode};
use crate::sys::sysv::{self, Attached};
use anyhow::{Context as _, Result, ensure};
use ckpt_common::image::Kind;
use ckpt_common::image::file::OpenFile;
use ckpt_common::image::objects::SysvMemory;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

const LIST: &str = "/proc/sysvipc/shm";
const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";
/// Device number in place of that of the files behind segments: it is the memfds' too, and inode numbers of segments
/// are ids, so that both may have the same.
pub const DEVICE: u64 = u64::MAX;
/// The lower bits of an id are an index that no two segments have in common (ipc/util.h).
const INDEX: i32 = (1 << 15) - 1;
// `shm_perm.mode`, linux/shm.h
const SHM_DEST: u32 = 0o1000;
const SHM_LOCKED: u32 = 0o2000;

/// A segment as /proc/sysvipc/shm lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Key.
    pub key: i32,
    /// Id.
    pub id: i32,
    /// Permission bits, and what else is in `shm_perm.mode`.
    mode: u32,
    /// Size in bytes.
    pub size: u64,
    /// Process that made it; 0 where it is in another PID namespace.
    pub creator_pid: i32,
    /// Number of mappings of it, of all processes.
    pub attaches: u64,
    owner: (u32, u32),
    creator: (u32, u32),
    /// When it was made or changed by shmctl(2), in seconds since 1970.
    pub changed: u64,
}

impl Listed {
    /// `key shmid perms size cpid lpid nattch uid gid cuid cgid atime dtime ctime rss swap`
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let number = |at: usize| words.get(at)?.parse::<u64>().ok();
        let pair = |at| Some((number(at)? as u32, number(at + 1)? as u32));
        Some(Self {
            key: words.first()?.parse().ok()?,
            id: number(1)?.try_into().ok()?,
            mode: u32::from_str_radix(words.get(2)?, 8).ok()?,
            size: number(3)?,
            creator_pid: number(4)?.try_into().ok()?,
            attaches: number(6)?,
            owner: pair(7)?,
            creator: pair(9)?,
            changed: number(13)?,
        })
    }

    /// Is it destroyed with its last attach?
    fn doomed(&self) -> bool {
        self.mode & SHM_DEST != 0
    }

    /// What to call it.
    pub fn name(&self) -> String {
        name(self.id, self.key)
    }
}

/// What to call a segment.
fn name(id: i32, key: i32) -> String {
    match key {
        libc::IPC_PRIVATE => format!("System V segment {id}"),
        key => format!("System V segment {id} (key {key:#x})"),
    }
}

/// All segments of our IPC namespace; none where the kernel has no such thing.
pub fn list() -> Result<Vec<Listed>> {
    if !Path::new(LIST).exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(LIST).with_context(|| format!("reading {LIST}"))?;
    let line = |line| Listed::parse(line).with_context(|| format!("{LIST} has a strange line: {line}"));
    text.lines().skip(1).map(line).collect()
}

/// Captures a segment that `probe` has open; its content is staged once, however often it is attached. `creator_pid` is
/// its creator as the job sees it.
pub fn capture(
    probe: &Probe,
    listed: &[Listed],
    creator_pid: impl Fn(i32) -> i32,
    context: &mut dyn CaptureContext,
) -> Result<Captured> {
    let id = probe.stat.st_ino as i32;
    let found = listed.iter().find(|s| s.id == id).with_context(|| format!("no segment has id {id}"))?;
    ensure!(
        found.size == probe.stat.st_size as u64
            && (found.doomed() || probe.link == format!("/SYSV{:08x} (deleted)", found.key)),
        "it is not segment {id}"
    );
    let file = File::from(probe.file.as_fd().try_clone_to_owned()?);
    let content = context.stage((DEVICE, probe.stat.st_ino), &file)?;
    let mut tail = Vec::new();
    if !found.size.is_multiple_of(4096) {
        tail = Attached::new(id, found.size, true).context("attaching it")?.tail(found.size);
        tail.truncate(tail.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
    }
    Captured::new(&SysvMemory {
        id,
        key: found.key,
        size: found.size,
        mode: found.mode & 0o777,
        doomed: found.doomed(),
        locked: found.mode & SHM_LOCKED != 0,
        owner: found.owner,
        creator: found.creator,
        creator_pid: creator_pid(found.creator_pid),
        tail,
        content,
    })
}

/// A segment that is attached by nobody, as an open file.
pub fn open(segment: &Listed) -> Result<File> {
    let attached = Attached::new(segment.id, segment.size, true);
    attached.and_then(|attached| attached.file(false)).with_context(|| format!("opening {}", segment.name()))
}

/// The segments among these records, each once.
pub fn records(files: &[OpenFile]) -> Result<Vec<SysvMemory>> {
    let mut all: Vec<SysvMemory> = Vec::new();
    for file in files.iter().filter(|file| file.kind == SysvMemory::KIND) {
        let segment: SysvMemory = decode(file.version, &file.payload)?;
        if all.iter().all(|known| known.id != segment.id) {
            all.push(segment);
        }
    }
    Ok(all)
}

/// Destroys the segments of a job that has ended; others have gone with their last attach, or by somebody else's hand.
pub fn remove(files: &[OpenFile]) -> Result<()> {
    for segment in records(files)?.iter().filter(|segment| !segment.doomed) {
        match sysv::remove(segment.id) {
            Err(e) if ![Some(libc::EINVAL), Some(libc::EIDRM)].contains(&e.raw_os_error()) => {
                return Err(e).with_context(|| format!("removing {}", name(segment.id, segment.key)));
            }
            _ => {}
        }
    }
    Ok(())
}

/// What keeps the segment from coming back in an IPC namespace with these others: what it is, and why.
pub fn obstacle(segment: &SysvMemory, others: &[Listed]) -> Option<(String, String)> {
    let what = name(segment.id, segment.key);
    if !Path::new(NEXT_ID).exists() {
        let reason = format!("its id cannot be chosen: this kernel has no {NEXT_ID}");
        return Some((what, reason));
    }
    let same_key = |s: &&Listed| segment.key != libc::IPC_PRIVATE && s.key == segment.key;
    let same_id = |s: &&Listed| s.id & INDEX == segment.id & INDEX;
    let (taken, by) = match (others.iter().find(same_id), others.iter().find(same_key)) {
        (Some(by), _) if by.id == segment.id => ("id", by),
        (_, Some(by)) => ("key", by),
        (Some(by), _) => ("place in the kernel's table", by),
        (None, None) => return None,
    };
    let used = match by.attaches {
        0 => format!("which nobody has attached (made by process {})", by.creator_pid),
        n => format!("which is attached {n} times"),
    };
    let reason = format!(
        "its {taken} is in use on this node by {}, {used}; remove that with `ipcrm -m {}`, or use --pids namespace",
        by.name(),
        by.id
    );
    Some((what, reason))
}

/// Makes the next segment of our IPC namespace get this id, if its place is free.
pub fn choose(id: i32) -> Result<()> {
    std::fs::write(NEXT_ID, id.to_string()).with_context(|| format!("choosing id {id} ({NEXT_ID})"))
}

/// A segment that was just made, attached to us until all others have it. Removed if the restore fails.
#[derive(Debug)]
pub struct Made {
    segment: SysvMemory,
    attached: Option<Attached>,
    remove: bool,
}

impl Made {
    /// Takes over a segment that shmget(2) has just made.
    pub fn new(segment: SysvMemory) -> Result<Self> {
        let mut made = Self { segment, attached: None, remove: true };
        let attached = Attached::new(made.segment.id, made.segment.size, false);
        made.attached = Some(attached.context("attaching a segment")?);
        Ok(made)
    }

    /// Gives it its content, by `fill`.
    pub fn fill(&self, fill: impl FnOnce(&SysvMemory, &File) -> Result<()>) -> Result<()> {
        let attached = self.attached.as_ref().context("the segment is complete already")?;
        let file = attached.file(true).context("opening a segment")?;
        fill(&self.segment, &file).with_context(|| format!("filling {}", self.name()))?;
        attached.set_tail(self.segment.size, &self.segment.tail);
        Ok(())
    }

    /// Gives it to those who have attached it.
    pub fn complete(&mut self) -> Result<()> {
        let segment = &self.segment;
        let what = |what| format!("{what} of {}", name(segment.id, segment.key));
        sysv::set(segment.id, segment.owner, segment.mode).with_context(|| what("setting the owner"))?;
        if segment.locked {
            sysv::lock(segment.id).with_context(|| what("SHM_LOCK"))?;
        }
        if segment.doomed {
            sysv::remove(segment.id).with_context(|| what("IPC_RMID"))?;
        }
        self.attached = None;
        Ok(())
    }

    /// The restore has succeeded.
    pub fn keep(mut self) {
        self.remove = false;
    }

    fn name(&self) -> String {
        name(self.segment.id, self.segment.key)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if self.remove
            && let Err(error) = sysv::remove(self.segment.id)
        {
            tracing::warn!(%error, "{} could not be removed", self.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_common::image::MemoryId;

    const LINE: &str = "       119      98310  1600                 12345 16109 16110      3  1000  1001     0     5 1795606435          0 1795606436                     0                     0";

    #[test]
    fn a_line_of_the_list() {
        let listed = Listed::parse(LINE).unwrap();
        assert_eq!((listed.key, listed.id, listed.size, listed.attaches), (0x77, 98310, 12345, 3));
        assert_eq!((listed.creator_pid, listed.owner, listed.creator), (16109, (1000, 1001), (0, 5)));
        assert!(listed.doomed());
        assert_eq!(listed.changed, 1_795_606_436);
        assert_eq!(Listed::parse(&LINE.replace("119", "-119")).unwrap().key, -119);
        assert_eq!(Listed::parse("key shmid"), None);
    }

    #[test]
    fn whoever_is_in_the_way_is_named() {
        let segment = SysvMemory {
            id: 98310,
            key: 0x10,
            size: 1,
            mode: 0o600,
            doomed: false,
            locked: false,
            owner: (0, 0),
            creator: (0, 0),
            creator_pid: 1,
            tail: Vec::new(),
            content: MemoryId(0),
        };
        let other = |key, id| Listed { key, id, ..Listed::parse(LINE).unwrap() };
        assert_eq!(obstacle(&segment, &[other(0x11, 98311), other(0, 0)]), None);
        for (other, why) in [
            (other(0, 98310), "its id is in use on this node by System V segment 98310, "),
            (other(0x10, 7), "its key is in use on this node by System V segment 7 (key 0x10), "),
            (other(0, 6), "its place in the kernel's table is in use"),
        ] {
            let (what, reason) = obstacle(&segment, std::slice::from_ref(&other)).unwrap();
            assert_eq!(what, "System V segment 98310 (key 0x10)");
            assert!(reason.starts_with(why), "{reason}");
        }
    }
}
