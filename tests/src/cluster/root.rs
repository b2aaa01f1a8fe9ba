//! The root of a node's file system: the machine's, with the node's own places in it.
//!
//! The new root is a tmpfs with one bind mount per entry of `/`, so that files keep their identity
//! (an overlay would show other device and inode numbers), and a mount point that the machine
//! lacks, such as `/shared`, is made in the tmpfs and not on the machine's disk.

use super::{SHARED, build_folder, ssh};
use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Folders that are a node's own and start empty, and their modes.
const OWN: [(&str, u32); 3] = [("tmp", 0o1777), ("run", 0o755), ("var/lib/ckpt", 0o700)];
/// Folders of which a node has its own version, made of the machine's entries.
const PARTLY_OWN: [&str; 2] = ["var", "var/lib"];

/// Builds the root of a node below its folder and moves into it. Call as PID 1 of the node, in a
/// mount namespace of its own.
///
/// # Errors
/// A mount fails; the message says which.
pub fn enter(dir: &Path, node_dir: &Path) -> Result<()> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("make mounts private")?;
    let root = node_dir.join("new_root");
    fs::create_dir(&root)?;
    tmpfs(&root, 0o755)?;
    let others = ["proc", "tmp", "run", "var", "shared"];
    mirror(Path::new("/"), &root, &others)?;
    for place in PARTLY_OWN {
        let here = root.join(place);
        fs::create_dir(&here)?;
        tmpfs(&here, 0o755)?;
        mirror(&Path::new("/").join(place), &here, &["lib", "ckpt"])?;
    }
    for (place, mode) in OWN {
        fs::create_dir(root.join(place))?;
        tmpfs(&root.join(place), mode)?;
    }
    tmpfs(&root.join("dev/shm"), 0o1777)?;
    fs::create_dir(root.join(SHARED))?;
    bind(&dir.join(SHARED), &root.join(SHARED))?;
    private_files(dir, node_dir, &root)?;
    keep_visible(&root)?;

    std::env::set_current_dir(&root)?;
    nix::unistd::pivot_root(".", ".").context("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).context("unmount the old root")?;
    std::env::set_current_dir("/")?;
    fs::create_dir("/proc")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>).context("mount /proc")
}

/// Every entry of `from`, except some, appears in the folder `to`.
fn mirror(from: &Path, to: &Path, except: &[&str]) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if except.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        let kind = entry.file_type()?;
        if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
        } else if kind.is_dir() {
            fs::create_dir(&target)?;
            bind(&source, &target)?;
        } else if kind.is_file() {
            fs::write(&target, [])?;
            bind(&source, &target)?;
        }
    }
    Ok(())
}

/// The node's own files in place of the machine's, its keys, and the programs under test.
fn private_files(dir: &Path, node_dir: &Path, root: &Path) -> Result<()> {
    for file in ["etc/hosts", "etc/hostname", "etc/shadow", "root/.bashrc"] {
        let target = root.join(file);
        if target.exists() {
            bind(&node_dir.join(file), &target)?;
        }
    }
    bind(&ssh::folder(dir).join("config.d"), &root.join("etc/ssh/ssh_config.d"))?;
    for folder in ["run/sshd", "run/lock", "run/node", "run/node/ssh", "run/node/bin", "run/node/target"] {
        fs::create_dir(root.join(folder))?;
    }
    bind(&ssh::folder(dir), &root.join("run/node/ssh"))?;
    // The folder, not the file: a cluster that stays up sees the next build.
    bind(&build_folder()?, &root.join("run/node/target"))?;
    symlink("/run/node/target/ckpt", root.join("run/node/bin/ckpt"))?;
    Ok(())
}

/// The repository and its build folder keep their paths where the node's own `/tmp` or `/run`
/// would hide them.
fn keep_visible(root: &Path) -> Result<()> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folders: [PathBuf; 2] = [fs::canonicalize(repository)?, fs::canonicalize(build_folder()?)?];
    for folder in folders {
        if folder.starts_with("/tmp") || folder.starts_with("/run") {
            let target = root.join(folder.strip_prefix("/")?);
            fs::create_dir_all(&target)?;
            bind(&folder, &target)?;
        }
    }
    Ok(())
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("mount {} on {}", from.display(), to.display()))
}

fn tmpfs(at: &Path, mode: u32) -> Result<()> {
    let options = format!("mode={mode:o}");
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::MS_NOSUID, Some(options.as_str()))
        .with_context(|| format!("mount a tmpfs on {}", at.display()))?;
    fs::set_permissions(at, fs::Permissions::from_mode(mode))?;
    Ok(())
}
