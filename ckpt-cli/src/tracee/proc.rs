//! What /proc says about a process, in the form that capture and rebuild need.

use crate::sys::task;
use procfs::FromBufRead as _;
use procfs::process::{Process, Status, VmFlags};
use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;

/// One mapping as /proc/PID/maps or smaps shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    /// First address.
    pub start: u64,
    /// First address behind.
    pub end: u64,
    /// `PROT_*`.
    pub prot: i32,
    /// `MAP_SHARED`?
    pub shared: bool,
    /// Offset in bytes in what is mapped.
    pub offset: u64,
    /// Device of the file as (major << 32 | minor).
    pub device: u64,
    /// Inode, 0 where no file is mapped.
    pub inode: u64,
    /// Path or pseudo-path as the kernel prints it.
    pub path: String,
    /// Flags, where they were asked for.
    pub flags: VmFlags,
}

impl Map {
    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.end - self.start
    }

    /// Link of /proc/PID to what is mapped there.
    pub fn link(&self) -> String {
        format!("map_files/{:x}-{:x}", self.start, self.end)
    }

    /// Can code run there?
    pub fn executable(&self) -> bool {
        self.prot & libc::PROT_EXEC != 0
    }

    /// A mapping that the kernel provides: vdso, vvar and its like.
    pub fn by_kernel(&self) -> bool {
        self.inode == 0 && self.path.starts_with("[v")
    }

    /// The System V segment whose attach it is. Its id is the inode number, and may be 0 (ipc/shm.c, `newseg`).
    pub fn segment(&self) -> Option<i32> {
        let key = self.path.strip_prefix("/SYSV")?.strip_suffix(" (deleted)")?;
        let is_key = key.len() == 8 && key.bytes().all(|b| b.is_ascii_hexdigit());
        (self.shared && is_key).then_some(i32::try_from(self.inode).ok()).flatten()
    }
}

/// What a process may grow between a look and the freeze: one such piece of what it has.
const PIECES: u64 = 32;

/// By how much the kernel's counters may be behind: each processor counts for itself first (linux/percpu_counter.h).
const SLACK: u64 = 1 << 20;

/// Mappings of a process in address order.
pub type Maps = Vec<Map>;

/// Flags that anybody here asks for: their names in smaps, and their bits in the kernel's own record (`vm_flags` of
/// linux/mm.h, on x86-64).
pub(super) const FLAGS: [(&str, u64, VmFlags); 15] = [
    ("mw", 0x20, VmFlags::MW),
    ("gd", 0x100, VmFlags::GD),
    ("pf", 0x400, VmFlags::PF),
    ("lo", 0x2000, VmFlags::LO),
    ("io", 0x4000, VmFlags::IO),
    ("sr", 0x8000, VmFlags::SR),
    ("rr", 0x1_0000, VmFlags::RR),
    ("dc", 0x2_0000, VmFlags::DC),
    ("nr", 0x20_0000, VmFlags::NR),
    ("ht", 0x40_0000, VmFlags::HT),
    ("wf", 0x200_0000, VmFlags::WF),
    ("dd", 0x400_0000, VmFlags::DD),
    ("hg", 0x2000_0000, VmFlags::HG),
    ("nh", 0x4000_0000, VmFlags::NH),
    ("mg", 0x8000_0000, VmFlags::MG),
];

/// A line of maps: `START-END PERMISSIONS OFFSET MAJOR:MINOR INODE    PATH`.
fn header(line: &str) -> Option<Map> {
    let mut rest = line;
    let mut word = || {
        let (word, behind) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = behind;
        word
    };
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = word().split_once('-')?;
    let (start, end) = (number(start)?, number(end)?);
    let permissions = word().as_bytes();
    let offset = number(word())?;
    let (major, minor) = word().split_once(':')?;
    let device = number(major)? << 32 | number(minor)?;
    let inode = word().parse().ok()?;
    let prot = |at: usize, letter: u8, prot: i32| if permissions.get(at) == Some(&letter) { prot } else { 0 };
    Some(Map {
        start,
        end,
        prot: prot(0, b'r', libc::PROT_READ)
            | prot(1, b'w', libc::PROT_WRITE)
            | prot(2, b'x', libc::PROT_EXEC),
        shared: permissions.get(3) == Some(&b's'),
        offset,
        device,
        inode,
        path: rest.trim_start_matches(' ').to_owned(),
        flags: VmFlags::empty(),
    })
}

/// Parses maps or smaps. Thousands of mappings are read while a job is frozen, so fields that nobody needs are passed over.
fn parse(text: &str) -> Maps {
    let mut maps = Maps::new();
    for line in text.lines() {
        // Headers begin with an address in lower case, fields with a capital letter.
        if !line.starts_with(|first: char| first.is_ascii_uppercase()) {
            maps.extend(header(line));
        } else if let (Some(names), Some(map)) = (line.strip_prefix("VmFlags:"), maps.last_mut()) {
            let flag = |name: &str| FLAGS.iter().find(|(known, ..)| *known == name).map(|(.., flag)| *flag);
            map.flags = names.split_ascii_whitespace().filter_map(flag).collect();
        }
    }
    // The page of old-style system calls is the same in every process and cannot be moved or unmapped.
    maps.retain(|map| map.path != "[vsyscall]");
    maps
}

fn read(pid: i32, name: &str) -> std::io::Result<Maps> {
    let mut text = Vec::with_capacity(1 << 16);
    File::open(format!("/proc/{pid}/{name}"))?.read_to_end(&mut text)?;
    Ok(parse(&String::from_utf8_lossy(&text)))
}

/// Mappings without their flags: cheap.
pub fn maps(pid: i32) -> std::io::Result<Maps> {
    read(pid, "maps")
}

/// Mappings with their flags; walks the page tables.
pub fn maps_with_flags(pid: i32) -> std::io::Result<Maps> {
    read(pid, "smaps")
}

/// Mappings with their flags, of a stopped process: from a look at them when it still ran, as far as they are the same.
/// What `before` does not have is read now.
pub fn maps_like_before(pid: i32, before: &Maps) -> std::io::Result<Maps> {
    let mut now = maps(pid)?;
    for map in &mut now {
        let same = before.binary_search_by_key(&map.start, |known| known.start).ok().map(|at| &before[at]);
        let Some(known) = same.filter(|known| Map { flags: map.flags, ..(*known).clone() } == *map) else {
            return maps_with_flags(pid);
        };
        map.flags = known.flags;
    }
    Ok(now)
}

/// About how many bytes a copy of what only the process has takes (proc_pid_status(5)).
pub fn private_bytes(pid: i32) -> u64 {
    let status = Process::new(pid).and_then(|process| process.status());
    let kilobytes = status.map_or(0, |s| s.rssanon.unwrap_or(0) + s.vmswap.unwrap_or(0));
    (kilobytes << 10) / PIECES * (PIECES + 1) + SLACK
}

/// TIDs of a process, the leader first.
pub fn threads(pid: i32) -> std::io::Result<Vec<i32>> {
    let mut tids = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        tids.extend(entry?.file_name().to_str().and_then(|n| n.parse::<i32>().ok()));
    }
    tids.sort_unstable_by_key(|tid| (*tid != pid, *tid));
    Ok(tids)
}

/// Is it a thread that the kernel has made in the process for work of its own, as for io_uring? A signal would show in
/// the results of what it does, and it has no program to stop.
pub fn is_kernels(pid: i32, tid: i32) -> bool {
    /// linux/sched.h
    const PF_IO_WORKER: u32 = 0x10;
    // It has no list of robust futexes, and hardly any other thread has none.
    if !task::robust_list(tid).is_ok_and(|(head, _)| head == 0) {
        return false;
    }
    let stat = Process::new(pid).and_then(|process| process.task_from_tid(tid)).and_then(|task| task.stat());
    stat.is_ok_and(|stat| stat.flags & PF_IO_WORKER != 0)
}

/// /proc/PID/task/TID/status, in one go: it is read of each thread of a frozen job.
///
/// # Errors
/// The thread is gone.
pub fn thread_status(pid: i32, tid: i32) -> procfs::ProcResult<Status> {
    let mut text = Vec::with_capacity(4096);
    File::open(format!("/proc/{pid}/task/{tid}/status"))?.read_to_end(&mut text)?;
    Status::from_buf_read(text.as_slice())
}

/// Children of all threads of a process (CONFIG_PROC_CHILDREN); none where the process is gone.
pub fn children(pid: i32) -> Vec<i32> {
    let mut all = Vec::new();
    for tid in threads(pid).unwrap_or_default() {
        let path = format!("/proc/{pid}/task/{tid}/children");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        all.extend(text.split_ascii_whitespace().filter_map(|w| w.parse::<i32>().ok()));
    }
    all
}

/// A process and all its descendants, parents before children.
pub fn tree(root: i32) -> Vec<i32> {
    let mut all = vec![root];
    let mut next = 0;
    while let Some(pid) = all.get(next).copied() {
        let new: Vec<i32> = children(pid).into_iter().filter(|c| !all.contains(c)).collect();
        all.extend(new);
        next += 1;
    }
    all
}

/// The PID that a process has for itself, in its own PID namespace.
pub fn inner(pid: i32) -> procfs::ProcResult<i32> {
    let status = Process::new(pid)?.status()?;
    Ok(status.nspid.and_then(|numbers| numbers.last().copied()).unwrap_or(pid))
}

/// Target of a link of /proc/PID.
pub fn link(pid: i32, name: &str) -> std::io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/{name}"))
}

/// State letter of a process (`Z`: zombie), `None` where it is gone, if only in this moment: its number may still be
/// in use then (`X`, proc_pid_stat(5)).
pub fn state(pid: i32) -> Option<char> {
    Process::new(pid).and_then(|p| p.stat()).ok().map(|s| s.state).filter(|state| *state != 'X')
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000003000 rw-s 00001000 08:1f 77                         /tmp/a  b (deleted)
Size:                 12 kB
VmFlags: rd wr sh mr mw me ms nh sd
7f0000004000-7f0000005000 ---p 00000000 00:00 0 
VmFlags: mr mw me gd nr sd
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
VmFlags: ex
";

    #[test]
    fn lines_of_smaps() {
        let maps = parse(SMAPS);
        assert_eq!(maps.len(), 2);
        let first = &maps[0];
        assert_eq!((first.start, first.size(), first.offset), (0x7f00_0000_0000, 0x3000, 0x1000));
        assert_eq!(
            (first.device, first.inode, first.path.as_str()),
            (8 << 32 | 0x1f, 77, "/tmp/a  b (deleted)")
        );
        assert_eq!((first.prot, first.shared), (libc::PROT_READ | libc::PROT_WRITE, true));
        assert_eq!(first.flags, VmFlags::MW | VmFlags::NH);
        let second = &maps[1];
        assert_eq!((second.prot, second.shared, second.path.as_str()), (0, false, ""));
        assert_eq!(second.flags, VmFlags::MW | VmFlags::GD | VmFlags::NR);
    }

    #[test]
    fn attaches_of_segments() {
        let line = |permissions, inode, path| {
            header(&format!("7f0000000000-7f0000003000 {permissions} 00000000 00:01 {inode} {path}")).unwrap()
        };
        assert_eq!(line("rw-s", 0, "/SYSV00000000 (deleted)").segment(), Some(0));
        assert_eq!(line("r--s", 98310, "/SYSV0000beef (deleted)").segment(), Some(98310));
        for (permissions, path) in
            [("rw-p", "/SYSV0000beef (deleted)"), ("rw-s", "/SYSV0000beef"), ("rw-s", "/SYSVmine (deleted)")]
        {
            assert_eq!(line(permissions, 7, path).segment(), None, "{path}");
        }
    }
}
