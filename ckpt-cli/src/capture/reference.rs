//! A second copy of the memory at the cut, made in the plainest way: for tests.
//!
//! With `CKPT_REFERENCE=DIRECTORY` in an agent's environment, each cut leaves `DIRECTORY/PID.pages` there, a record for
//! each page that the process has something of its own in: address (u64, in this machine's byte order) and content.
//! Nothing of the code that finds, copies or saves pages for the image is used. The tests compare the two.

use crate::tracee::freeze::Frozen;
use crate::tracee::proc;
use anyhow::{Context as _, Result};
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

const VARIABLE: &str = "CKPT_REFERENCE";
const PAGE: u64 = 4096;

/// Makes the copy, if there is to be one; the job is frozen.
pub(super) fn copy(frozen: &Frozen) -> Result<()> {
    let Some(directory) = std::env::var_os(VARIABLE) else { return Ok(()) };
    for process in frozen.processes.values().filter(|process| !process.threads.is_empty()) {
        one(process.pid, Path::new(&directory))
            .with_context(|| format!("copying process {}", process.pid))?;
    }
    Ok(())
}

fn one(pid: i32, directory: &Path) -> Result<()> {
    let mut out = BufWriter::new(File::create(directory.join(format!("{pid}.pages")))?);
    let (mem, pagemap) =
        (File::open(format!("/proc/{pid}/mem"))?, File::open(format!("/proc/{pid}/pagemap"))?);
    let mut content = [0; PAGE as usize];
    for map in proc::maps(pid)?.iter().filter(|map| !map.by_kernel()) {
        for address in (map.start..map.end).step_by(PAGE as usize) {
            // Documentation/admin-guide/mm/pagemap.rst: 63 present, 62 swapped, 61 of a file or shared.
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, address / PAGE * 8)?;
            let entry = u64::from_ne_bytes(entry);
            let (there, file) = (entry >> 62 != 0, entry >> 61 & 1 != 0);
            if !there || (file && !map.shared) || mem.read_exact_at(&mut content, address).is_err() {
                continue;
            }
            out.write_all(&address.to_ne_bytes())?;
            out.write_all(&content)?;
        }
    }
    Ok(out.flush()?)
}
