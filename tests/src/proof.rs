//! An image compared, page by page, with a copy that was made in the plainest way while the job was frozen
//! (`CKPT_REFERENCE`).

use crate::job::Job;
use anyhow::{Context, Result, bail, ensure};
use ckpt_cli::objects::decode;
use ckpt_cli::store::{JobName, PartReader, Store};
use ckpt_common::image::file::OpenFile;
use ckpt_common::image::objects::{MemoryFile, SysvMemory};
use ckpt_common::image::process::{AddressSpace, Backing, Process};
use ckpt_common::image::{Kind, MemoryId};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

const PAGE: u64 = 4096;

/// Content of the page at an address.
type Pages = BTreeMap<u64, Vec<u8>>;

/// `workloads/writers.c` with these arguments at work, in a job with a directory for [`dump_and_compare`].
pub fn writers(arguments: &[&str]) -> Result<Job> {
    let mut job = Job::new("writers")?;
    let program = job.build("writers")?;
    fs::create_dir(job.path("references"))?;
    job.start(&[&[program.as_str()], arguments].concat())?;
    job.until_output("ready")?;
    Ok(job)
}

/// What the agent has copied at the cut.
fn reference(directory: &Path, pid: i32) -> Result<Pages> {
    let bytes = fs::read(directory.join(format!("{pid}.pages")))?;
    let record = |record: &[u8]| -> Result<_> {
        let (address, content) = record.split_at(8);
        Ok((u64::from_ne_bytes(address.try_into()?), content.to_vec()))
    };
    bytes.chunks_exact(8 + PAGE as usize).map(record).collect()
}

/// What the image says is at an address; nothing where it says nothing.
struct Image {
    own: Pages,
    shared: BTreeMap<MemoryId, Pages>,
    files: BTreeMap<u32, MemoryId>,
}

impl Image {
    fn open(part: &PartReader, space: &AddressSpace) -> Result<Self> {
        let (mut shared, mut files) = (BTreeMap::new(), BTreeMap::new());
        for file in part.read::<OpenFile>()? {
            let content = match file.kind.as_str() {
                MemoryFile::KIND => decode::<MemoryFile>(file.version, &file.payload)?.content,
                SysvMemory::KIND => decode::<SysvMemory>(file.version, &file.payload)?.content,
                _ => continue,
            };
            files.insert(file.id.0, content);
            shared.insert(content, part.contents(content)?);
        }
        Ok(Self { own: part.contents(space.memory)?, shared, files })
    }

    fn page(&self, space: &AddressSpace, address: u64) -> Result<Option<&Vec<u8>>> {
        let mapping = space.mappings.iter().find(|m| (m.start..m.end).contains(&address));
        let mapping = mapping.with_context(|| format!("nothing is mapped at {address:#x} in the image"))?;
        Ok(match &mapping.backing {
            Backing::SharedFile { file, offset } => {
                let Some(content) = self.files.get(&file.0) else { return Ok(None) };
                self.shared[content].get(&((address - mapping.start + offset) / PAGE))
            }
            _ => self.own.get(&(address / PAGE)),
        })
    }
}

/// Every page of the newest checkpoint is as it was at its cut.
pub fn compare(job: &Job, references: &Path, what: &str) -> Result<()> {
    let store = Store::open(&job.path("store"))?;
    let name: JobName = job.name().parse()?;
    let checkpoint = store.checkpoints(&name)?.pop().context("no checkpoint")?;
    let part = store.open_part(&checkpoint.manifest.nodes[0].part)?;
    let mut compared = 0;
    for process in part.read::<Process>()?.iter().filter(|process| process.zombie.is_none()) {
        let (image, expected) = (Image::open(&part, &process.mm)?, reference(references, process.pid)?);
        let mut wrong = Vec::new();
        for (address, content) in &expected {
            let empty = content.iter().all(|byte| *byte == 0);
            let same = match image.page(&process.mm, *address)? {
                Some(page) => page == content,
                // Of a file that is not in the image, or never written.
                None => {
                    let of_file = process.mm.mappings.iter().any(|m| {
                        (m.start..m.end).contains(address)
                            && matches!(&m.backing, Backing::SharedFile { file, .. } if !image.files.contains_key(&file.0))
                    });
                    empty || of_file
                }
            };
            if !same {
                wrong.push(*address);
            }
        }
        let known: BTreeSet<u64> = expected.keys().map(|address| address / PAGE).collect();
        let more: Vec<_> = image.own.keys().filter(|page| !known.contains(page)).collect();
        if !wrong.is_empty() || !more.is_empty() {
            bail!(
                "{what}, process {}: {} of {} pages are wrong, first {:x?}; {} do not exist, first {:x?}",
                process.pid,
                wrong.len(),
                expected.len(),
                wrong.first(),
                more.len(),
                more.first().map(|page| *page * PAGE)
            );
        }
        compared += expected.len();
    }
    ensure!(compared > 1000, "{what}: only {compared} pages were compared");
    Ok(())
}

/// Takes a checkpoint with a copy of the memory at its cut in the job's directory `references`, and compares the two.
pub fn dump_and_compare(job: &Job, way: &str, pause: &str, what: &str) -> Result<()> {
    dump_with(job, way, pause, what, &[])
}

/// The same, with variables in the environment.
pub fn dump_with(job: &Job, way: &str, pause: &str, what: &str, variables: &[(&str, &str)]) -> Result<()> {
    let (pid, references) = (job.pid().to_string(), job.path("references"));
    let arguments = ["dump", "--pid", &pid, "--name", job.name(), "--cow", way, "--max-pause", pause];
    let path = references.display().to_string();
    job.ok_with(&arguments, &[variables, &[("CKPT_REFERENCE", &path)]].concat())
        .with_context(|| what.to_owned())?;
    compare(job, &references, what)
}
