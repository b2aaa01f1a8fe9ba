//! Files that are private, durable, and bounded when read.

use super::{Result, StoreError};
use ckpt_common::image::FormatError;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

/// Creates a directory (0700); one that exists already is fine.
pub(super) fn make_dir(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        result => result.map_err(StoreError::io("create directory", path)),
    }
}

/// Creates a file (0600) that must not exist.
pub(super) fn create_new(path: &Path) -> Result<File> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.map_err(StoreError::io("create", path))
}

/// Opens a lock file (0600), creating it where needed.
pub(super) fn open_lock(path: &Path) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    file.map_err(StoreError::io("open lock", path))
}

/// Makes new names in a directory durable (fsync(2) of a file does not cover its name).
pub(super) fn sync_dir(path: &Path) -> Result<()> {
    let result = File::open(path).and_then(|dir| dir.sync_all());
    result.map_err(StoreError::io("flush directory", path))
}

/// Writes a new file and makes its content durable.
pub(super) fn write_new(path: &Path, pieces: &[&[u8]]) -> Result<()> {
    let mut file = create_new(path)?;
    for piece in pieces {
        file.write_all(piece).map_err(StoreError::io("write", path))?;
    }
    file.sync_all().map_err(StoreError::io("flush", path))
}

/// Moves a durable file to its final place.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(StoreError::io("move into place", to))
}

/// Reads a whole file of at most `limit` bytes.
pub(super) fn read_capped(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut file = open(path)?;
    let length = file.metadata().map_err(StoreError::io("read", path))?.len();
    if length > limit {
        let why = format!("{length} bytes, at most {limit} are possible");
        return Err(StoreError::damaged(path)(FormatError::damaged("file size", why)));
    }
    // All of it at once, not as much as the kernel reads ahead. Advice that is not taken is no failure.
    let _ = posix_fadvise(&file, 0, length as i64, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    let mut bytes = vec![0; length as usize];
    file.read_exact(&mut bytes).map_err(StoreError::io("read", path))?;
    Ok(bytes)
}

/// Opens a file that a checkpoint needs.
pub(super) fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => StoreError::Missing { path: path.to_owned() },
        _ => StoreError::io("open", path)(error),
    })
}

/// 16 random bytes.
pub(super) fn nonce() -> Result<[u8; 16]> {
    let path = Path::new("/dev/urandom");
    let mut nonce = [0; 16];
    let result = File::open(path).and_then(|mut file| file.read_exact(&mut nonce));
    result.map_err(StoreError::io("read", path))?;
    Ok(nonce)
}

/// 16 random bytes as text.
pub(super) fn token() -> Result<String> {
    Ok(nonce()?.iter().map(|byte| format!("{byte:02x}")).collect())
}
