//! The store: packs, parts and manifests as files. No ptrace, no root.
//!
//! ```text
//! STORE/version              "ckpt store 1"
//! STORE/lock                 held (flock) shared by dumps and readers, exclusively by `prune`
//! STORE/jobs/NAME/N.json     a committed checkpoint; the rename to this name is the commit
//! STORE/jobs/NAME/lock       held (flock) by the coordinator of a dump of this job
//! STORE/parts/ID.part        what one node contributed
//! STORE/packs/ID.pack        compressed memory
//! STORE/logs/JOB@N-NODE/      output of restored processes (`--stdio log`)
//! STORE/tmp/DUMP/            files in the making, and lists of what was put into parts/ and packs/
//! STORE/tmp/DUMP.lock        held (flock) by the coordinator as long as the dump lives
//! ```
//! Directories are 0700, files 0600: an image holds everything its processes knew.
//!
//! A node may share the directory with others: each writes files of its own, under names that
//! nobody else can choose. A part and its packs are durable before anybody hears of them and
//! invisible until a manifest names them. Whatever a dump leaves behind that was never committed is
//! removed by the next dump (of any job) that finds the lock of the dead one free.

mod chunker;
mod compare;
mod compressor;
mod crowded;
mod dump;
mod error;
mod files;
mod holes;
mod known;
mod live;
mod locks;
mod pack_file;
mod pack_reader;
mod pack_writer;
mod page_reader;
mod page_table;
mod part_reader;
mod part_writer;
mod prune;
mod refs;
mod scatter;
mod verify;

pub use compare::{Object, PageDiff, compare_pages, stored_anew};
pub use dump::{Dump, DumpId};
pub use error::{Result, StoreError};
pub use locks::Hold;
pub use part_reader::PartReader;
pub use part_writer::{Compress, FAST, PartOptions, PartWriter, Watch};
pub use prune::PruneReport;
pub use refs::JobName;
pub use scatter::{Piece, Unpacking};
pub use verify::{Problem, VerifyReport};

use ckpt_common::image::{Digest, FormatError, manifest::Checkpoint};
use std::path::{Path, PathBuf};

/// Version of the layout that this code writes and reads.
pub const VERSION: u32 = 1;

const PREFIX: &str = "ckpt store ";
const DIRECTORIES: [&str; 5] = ["jobs", "parts", "packs", "logs", "tmp"];

/// A directory of checkpoints.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens an existing store.
    ///
    /// # Errors
    /// [`StoreError::NoStore`] where there is none.
    pub fn open(root: &Path) -> Result<Self> {
        let no_store = |why: String| StoreError::NoStore { path: root.to_owned(), why };
        let path = root.join("version");
        let text = match files::read_capped(&path, 100) {
            Ok(text) => text,
            Err(StoreError::Missing { .. }) if root.is_dir() => {
                return Err(no_store("the directory has no file `version`".into()));
            }
            Err(StoreError::Missing { .. }) => return Err(no_store("no such directory".into())),
            Err(error) => return Err(error),
        };
        let text = String::from_utf8_lossy(&text);
        let version = text.strip_prefix(PREFIX).and_then(|text| text.trim_end().parse::<u32>().ok());
        match version {
            Some(VERSION) => Ok(Self { root: root.to_owned() }),
            Some(found) if found > VERSION => {
                let what = "store".to_owned();
                Err(StoreError::damaged(path)(FormatError::Newer { what, found, supported: VERSION }))
            }
            _ => Err(no_store(format!("its file `version` says `{}`", text.trim_end()))),
        }
    }

    /// Opens a store, or makes one out of an empty or missing directory.
    pub fn create(root: &Path) -> Result<Self> {
        match Self::open(root) {
            Err(StoreError::NoStore { .. }) => {}
            result => return result,
        }
        if let Some(parent) = root.parent() {
            std::fs::create_dir_all(parent).map_err(StoreError::io("create directory", parent))?;
        }
        files::make_dir(root)?;
        for entry in std::fs::read_dir(root).map_err(StoreError::io("read directory", root))? {
            let name = entry.map_err(StoreError::io("read directory", root))?.file_name();
            let ours = |name: &str| DIRECTORIES.contains(&name) || name == "version" || name == "lock";
            let ours = name.to_str().is_some_and(ours);
            // `lost+found` is all that a fresh file system has.
            if !ours && name != "lost+found" {
                let why = format!("the directory holds other files, such as {name:?}");
                return Err(StoreError::NoStore { path: root.to_owned(), why });
            }
        }
        for name in DIRECTORIES {
            files::make_dir(&root.join(name))?;
        }
        // Several nodes may do this at once: all rename the same content into place.
        let temporary = root.join("tmp").join(format!("version-{}", files::token()?));
        files::write_new(&temporary, &[format!("{PREFIX}{VERSION}\n").as_bytes()])?;
        files::rename(&temporary, &root.join("version"))?;
        files::sync_dir(root)?;
        Self::open(root)
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Directory for the output of what is restored on a node; made if need be.
    pub fn log_directory(&self, checkpoint: &Checkpoint, node: &str) -> Result<PathBuf> {
        let logs = self.root.join("logs");
        files::make_dir(&logs)?;
        // A node may be given as user@host, but a slash would lead elsewhere.
        let directory = logs.join(format!("{}-{}", checkpoint.name(), node.replace('/', "_")));
        files::make_dir(&directory)?;
        Ok(directory)
    }

    fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn part_path(&self, id: Digest) -> PathBuf {
        self.root.join("parts").join(format!("{id}.part"))
    }

    fn pack_path(&self, id: Digest) -> PathBuf {
        self.root.join("packs").join(format!("{id}.pack"))
    }
}

#[cfg(test)]
mod tests;
