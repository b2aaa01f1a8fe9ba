//! Files with a path: regular files (deleted ones too), directories, device nodes.

use super::{CaptureContext, Captured, FilePolicy, Probe, RebuildContext, open_flags};
use crate::sys::ioctl;
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::objects::{FileRestore, PathFile, RecordLock};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

const DELETED: &str = " (deleted)";

/// Captures the file.
pub fn capture(probe: &Probe, context: &mut dyn CaptureContext) -> Result<Captured> {
    Captured::new(&record(probe, context)?)
}

fn record(probe: &Probe, context: &mut dyn CaptureContext) -> Result<PathFile> {
    let stat = &probe.stat;
    let regular = probe.file_type() == SFlag::S_IFREG;
    let deleted = stat.st_nlink == 0 || probe.link.ends_with(DELETED);
    let path = probe.link.strip_suffix(DELETED).unwrap_or(&probe.link).to_owned();
    let writable =
        probe.info.flags & libc::O_ACCMODE != libc::O_RDONLY && probe.info.flags & libc::O_PATH == 0;
    let policy = context.file_policy();
    let restore = match (regular, deleted, writable) {
        (false, ..) => FileRestore::Leave,
        (true, true, _) => FileRestore::Content(stage(probe, context)?),
        (true, false, false) if volatile(&path) => FileRestore::Content(stage(probe, context)?),
        (true, false, false) => FileRestore::Unchanged,
        (true, false, true) => match policy {
            FilePolicy::Content => FileRestore::Content(stage(probe, context)?),
            FilePolicy::Length => FileRestore::Length,
            FilePolicy::None => FileRestore::Leave,
        },
    };
    let (flock, locks) = locks(probe);
    Ok(PathFile {
        path,
        deleted,
        inode: stat.st_ino ^ stat.st_dev.rotate_left(40),
        mode: stat.st_mode,
        owner: (stat.st_uid, stat.st_gid),
        rdev: stat.st_rdev,
        size: stat.st_size as u64,
        mtime: (stat.st_mtime, stat.st_mtime_nsec),
        position: probe.info.pos,
        restore,
        flock,
        locks,
    })
}

/// Memory in the shape of a file: gone with the node.
fn volatile(path: &str) -> bool {
    path.starts_with("/dev/shm/")
}

fn stage(probe: &Probe, context: &mut dyn CaptureContext) -> Result<ckpt_common::image::MemoryId> {
    let file = File::from(
        RebuildContext::reopen(&probe.file, libc::O_RDONLY)
            .with_context(|| format!("opening {} for reading, to save its content", probe.link))?,
    );
    context.stage((probe.stat.st_dev, probe.stat.st_ino), &file)
}

/// Locks as fdinfo shows them: `1: POSIX  ADVISORY  WRITE 4242 fe:00:1234 0 EOF`.
fn locks(probe: &Probe) -> (Option<i32>, Vec<RecordLock>) {
    let (mut flock, mut posix) = (None, Vec::new());
    for (_, line) in probe.info.lines.iter().filter(|(key, _)| key == "lock") {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, family, _, kind, pid, _, start, end] = words[..] else { continue };
        match family {
            "FLOCK" => flock = Some(if kind == "WRITE" { libc::LOCK_EX } else { libc::LOCK_SH }),
            "POSIX" => {
                let kind = if kind == "WRITE" { libc::F_WRLCK } else { libc::F_RDLCK };
                let start = start.parse().unwrap_or(0i64);
                let length = end.parse::<i64>().map_or(0, |end| end - start + 1);
                posix.push(RecordLock { pid: pid.parse().unwrap_or(0), kind, start, length });
            }
            _ => {}
        }
    }
    (flock, posix)
}

/// Says why the file cannot come back here; `None` where it can.
pub fn obstacle(file: &PathFile) -> Option<String> {
    if file.deleted {
        return None;
    }
    let path = file.path.clone();
    let stat = match (nix::sys::stat::stat(path.as_str()), file.restore) {
        (Ok(stat), _) => stat,
        (Err(_), FileRestore::Content(_)) => {
            let parent = std::path::Path::new(&path).parent()?;
            return (!parent.is_dir()).then(|| format!("directory {} is missing", parent.display()));
        }
        (Err(e), _) => return Some(format!("{path}: {}", e.desc())),
    };
    if (stat.st_mode ^ file.mode) & SFlag::S_IFMT.bits() != 0 {
        return Some(format!("{path} is a file of another type"));
    }
    (file.restore == FileRestore::Unchanged && stat.st_size as u64 != file.size).then(|| {
        format!(
            "{path} has another size than at the checkpoint ({} against {} bytes)",
            stat.st_size, file.size
        )
    })
}

/// Opens the file again, its bytes as they were.
pub fn rebuild(file: &PathFile, flags: i32, context: &mut RebuildContext<'_>) -> Result<OwnedFd> {
    let path = file.path.clone();
    let fd = if file.deleted {
        deleted(file, &path, flags, context)?
    } else {
        restore_bytes(file, &path, context)?;
        nix::fcntl::open(path.as_str(), open_flags(flags), Mode::empty())
            .with_context(|| format!("opening {path}"))?
    };
    // That of a directory says which names have been read.
    let kind = SFlag::from_bits_truncate(file.mode & SFlag::S_IFMT.bits());
    let has_position = kind == SFlag::S_IFREG || kind == SFlag::S_IFDIR;
    if has_position && flags & libc::O_PATH == 0 {
        lseek(&fd, file.position as i64, Whence::SeekSet).with_context(|| format!("seeking in {path}"))?;
    }
    if let Some(kind) = file.flock {
        // The lock belongs to the description, which lives on in the restored process.
        ioctl::flock(fd.as_fd(), kind | libc::LOCK_NB).with_context(|| format!("locking {path}"))?;
    }
    Ok(fd)
}

/// Brings the bytes of an existing path back, once per file.
fn restore_bytes(file: &PathFile, path: &str, context: &mut RebuildContext<'_>) -> Result<()> {
    if context.by_inode.contains_key(&file.inode) {
        return Ok(());
    }
    let fd = match file.restore {
        FileRestore::Unchanged | FileRestore::Leave => return Ok(()),
        FileRestore::Length => {
            let fd = nix::fcntl::open(path, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
                .with_context(|| format!("opening {path} to cut it to its length"))?;
            let now = nix::sys::stat::fstat(&fd)?.st_size as u64;
            if now < file.size {
                bail!("{path} is shorter than at the checkpoint ({now} against {} bytes)", file.size);
            }
            nix::unistd::ftruncate(&fd, file.size as i64).with_context(|| format!("cutting {path}"))?;
            fd
        }
        FileRestore::Content(memory) => {
            let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_CLOEXEC;
            let fd = nix::fcntl::open(path, flags, Mode::from_bits_truncate(file.mode & 0o7777))
                .with_context(|| format!("opening {path} to restore its content"))?;
            let out = File::from(fd);
            out.set_len(0).with_context(|| format!("emptying {path}"))?;
            out.set_len(file.size).with_context(|| format!("sizing {path}"))?;
            (context.fill)(memory, &out).with_context(|| format!("restoring the content of {path}"))?;
            nix::unistd::fchown(&out, Some(file.owner.0.into()), Some(file.owner.1.into()))
                .with_context(|| format!("restoring the owner of {path}"))?;
            out.into()
        }
    };
    context.by_inode.insert(file.inode, fd);
    Ok(())
}

/// A file without a name, as it was: created at its old place so that it lies on the same file system.
fn deleted(file: &PathFile, path: &str, flags: i32, context: &mut RebuildContext<'_>) -> Result<OwnedFd> {
    if !context.by_inode.contains_key(&file.inode) {
        let FileRestore::Content(memory) = file.restore else {
            bail!("{path}: deleted file without content")
        };
        let out = without_name(Path::new(path), Mode::from_bits_truncate(file.mode & 0o7777))
            .with_context(|| format!("creating {path}, which was deleted while it was open"))?;
        out.set_len(file.size)?;
        (context.fill)(memory, &out).with_context(|| format!("restoring the deleted file {path}"))?;
        nix::unistd::fchown(&out, Some(file.owner.0.into()), Some(file.owner.1.into()))?;
        context.by_inode.insert(file.inode, out.into());
    }
    let again = format!("/proc/self/fd/{}", context.by_inode[&file.inode].as_fd().as_raw_fd());
    nix::fcntl::open(again.as_str(), open_flags(flags), Mode::empty())
        .with_context(|| format!("reopening {path}"))
}

/// Creates a file and removes its name: `path`, or another one beside it if that is in use. Directories that are gone are
/// made, and removed, too.
fn without_name(path: &Path, mode: Mode) -> Result<File> {
    let gone: Vec<&Path> = path.ancestors().skip(1).take_while(|parent| !parent.exists()).collect();
    for directory in gone.iter().rev() {
        match nix::unistd::mkdir(*directory, Mode::S_IRWXU) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("making {}", directory.display())),
        }
    }
    let create = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let beside = path.with_file_name(format!(".ckpt-{}", std::process::id()));
    let made = match nix::fcntl::open(path, create, mode) {
        Err(Errno::EEXIST) => nix::fcntl::open(&beside, create, mode).map(|fd| (fd, beside.as_path())),
        made => made.map(|fd| (fd, path)),
    };
    let removed = made.and_then(|(fd, name)| nix::unistd::unlink(name).map(|()| fd.into()));
    // Somebody else may use them by now.
    gone.iter().for_each(|directory| drop(std::fs::remove_dir(directory)));
    Ok(removed?)
}
