//! What /proc says about a process, in the form that capture and rebuild need.

use procfs::process::{MMPermissions, MMapPath, Process, VmFlags};
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
    /// `VmFlags` (only from smaps).
    pub flags: VmFlags,
}

impl Map {
    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.end - self.start
    }

    /// Can code run there?
    pub fn executable(&self) -> bool {
        self.prot & libc::PROT_EXEC != 0
    }

    /// A mapping that the kernel provides: vdso, vvar and its like.
    pub fn by_kernel(&self) -> bool {
        self.inode == 0 && self.path.starts_with("[v")
    }
}

/// Mappings of a process in address order.
pub type Maps = Vec<Map>;

fn convert(maps: procfs::process::MemoryMaps) -> Maps {
    let perm = |p: MMPermissions, bit, prot: i32| if p.contains(bit) { prot } else { 0 };
    maps.0
        .into_iter()
        // The page of old-style system calls is the same in every process and cannot be moved or unmapped.
        .filter(|m| m.pathname != MMapPath::Vsyscall)
        .map(|m| Map {
            start: m.address.0,
            end: m.address.1,
            prot: perm(m.perms, MMPermissions::READ, libc::PROT_READ)
                | perm(m.perms, MMPermissions::WRITE, libc::PROT_WRITE)
                | perm(m.perms, MMPermissions::EXECUTE, libc::PROT_EXEC),
            shared: m.perms.contains(MMPermissions::SHARED),
            offset: m.offset,
            device: (m.dev.0 as u64) << 32 | m.dev.1 as u64,
            inode: m.inode,
            path: match m.pathname {
                MMapPath::Path(p) => p.to_string_lossy().into_owned(),
                MMapPath::Heap => "[heap]".into(),
                MMapPath::Stack => "[stack]".into(),
                MMapPath::TStack(tid) => format!("[stack:{tid}]"),
                MMapPath::Vdso => "[vdso]".into(),
                MMapPath::Vvar => "[vvar]".into(),
                MMapPath::Vsys(key) => format!("/SYSV{key:08x} (deleted)"),
                MMapPath::Other(name) => format!("[{name}]"),
                MMapPath::Anonymous | MMapPath::Vsyscall | MMapPath::Rollup => String::new(),
            },
            flags: m.extension.vm_flags,
        })
        .collect()
}

/// Mappings without their flags: cheap.
pub fn maps(pid: i32) -> procfs::ProcResult<Maps> {
    Ok(convert(Process::new(pid)?.maps()?))
}

/// Mappings with their flags; walks the page tables.
pub fn maps_with_flags(pid: i32) -> procfs::ProcResult<Maps> {
    Ok(convert(Process::new(pid)?.smaps()?))
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

/// Target of a link of /proc/PID.
pub fn link(pid: i32, name: &str) -> std::io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/{name}"))
}

/// State letter of a process (`Z`: zombie), `None` where it is gone.
pub fn state(pid: i32) -> Option<char> {
    Process::new(pid).and_then(|p| p.stat()).ok().map(|s| s.state)
}
