//! Flags of mappings, such as what madvise(2) has said of them, from the kernel's own records.
//!
//! /proc/PID/smaps has them, too, but walks all page tables for it: 16 ms per GiB, with the lock of the address space
//! held. A BPF iterator (`ckpt-ebpf/src/mappings.rs`) gives the first words of each `struct vm_area_struct` instead. Which
//! of them has the flags depends on the kernel; that, and that they mean what we think, is found out with mappings of our
//! own, for which smaps is cheap.

use super::proc::{self, FLAGS, Maps};
use crate::sys::bpf_object;
use crate::sys::vma_iter::{self, Specimens};
use anyhow::{Context as _, Result, bail};
use aya::programs::Iter;
use ckpt_common::bpf::MappingWords;
use procfs::process::VmFlags;
use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::fd::{AsFd, OwnedFd};
use zerocopy::FromBytes as _;

/// What is read at a time, in bytes: the kernel gives 32 KiB at most (kernel/bpf/bpf_iter.c).
const READ: usize = 32 << 10;

/// Reads flags of mappings of any process.
#[derive(Debug)]
pub struct MappingFlags {
    program: OwnedFd,
    /// Which word has them.
    word: usize,
}

/// Mappings of ours whose flags are known: by address.
struct Known {
    _specimens: Specimens,
    flags: Vec<(u64, VmFlags)>,
}

impl Known {
    fn new() -> Result<Self> {
        let specimens = Specimens::new().context("mapping specimens")?;
        let maps = proc::maps_with_flags(own_pid())?;
        let of =
            |at: u64| maps.iter().find(|map| (map.start..map.end).contains(&at)).map(|map| (at, map.flags));
        let flags = specimens.addresses().map(|at| of(at).context("a specimen is not in smaps"));
        Ok(Self { flags: flags.collect::<Result<_>>()?, _specimens: specimens })
    }
}

fn own_pid() -> i32 {
    std::process::id() as i32
}

impl MappingFlags {
    /// Loads the program; takes some 30 ms, most of them for the kernel's types.
    ///
    /// # Errors
    /// The kernel does not have it, or its flags are not those that we know.
    pub fn load() -> Result<Self> {
        // While we are small.
        let known = Known::new()?;
        let mut object = bpf_object::load(&[])?;
        let program: &mut Iter = object.program_mut("mappings").context("not in the object")?.try_into()?;
        program.load("task_vma", bpf_object::kernel_types()?).context("load the BPF program mappings")?;
        let program = program.fd()?.as_fd().try_clone_to_owned()?;
        Self::tried(program, &known)
    }

    /// Goes on with a program that was loaded earlier.
    ///
    /// # Errors
    /// As for [`Self::load`].
    pub fn new(program: OwnedFd) -> Result<Self> {
        Self::tried(program, &Known::new()?)
    }

    /// The program, for the next who needs it.
    pub fn into_program(self) -> OwnedFd {
        self.program
    }

    /// Finds the word whose meaning is right for all mappings that are known.
    fn tried(program: OwnedFd, known: &Known) -> Result<Self> {
        let seen = read(&program, own_pid())?;
        let of = |at: u64| {
            let (_, words) = seen.range(..=at).next_back().filter(|(_, words)| at < words.0[1])?;
            Some(words)
        };
        let fits = |word: usize| {
            known
                .flags
                .iter()
                .all(|(at, flags)| of(*at).is_some_and(|words| meaning(words.0[word]) == *flags))
        };
        let mut words = (2..MappingWords::default().0.len()).filter(|word| fits(*word));
        let (Some(word), None) = (words.next(), words.next()) else {
            bail!("this kernel's mappings are not understood");
        };
        Ok(Self { program, word })
    }

    /// Mappings of a stopped process, with their flags.
    ///
    /// # Errors
    /// The process is gone, or the program has not seen all of its mappings.
    pub fn maps(&self, pid: i32) -> Result<Maps> {
        let mut maps = proc::maps(pid).context("reading the mappings")?;
        let seen = read(&self.program, pid)?;
        for map in &mut maps {
            let words = seen.get(&map.start).filter(|words| words.0[1] == map.end);
            let words = words.with_context(|| format!("no flags of the mapping at {:x}", map.start))?;
            map.flags = meaning(words.0[self.word]);
        }
        Ok(maps)
    }
}

fn meaning(word: u64) -> VmFlags {
    FLAGS.iter().filter(|(_, bit, _)| word & bit != 0).map(|(.., flag)| *flag).collect()
}

/// What the program says of a process, by first address.
fn read(program: &OwnedFd, pid: i32) -> Result<BTreeMap<u64, MappingWords>> {
    let what = "reading mappings by a BPF iterator";
    let mut file = vma_iter::open(program.as_fd(), pid).context(what)?;
    let (mut all, mut bytes) = (BTreeMap::new(), vec![0; READ]);
    loop {
        let length = file.read(&mut bytes).context(what)?;
        if length == 0 {
            return Ok(all);
        }
        for one in bytes[..length].chunks(size_of::<MappingWords>()) {
            let words = MappingWords::read_from_bytes(one).ok();
            let words = words.context("an answer of a BPF iterator ends in the middle")?;
            let start = words.0[0];
            if all.last_key_value().is_some_and(|(last, _)| *last >= start) {
                // With a single task, the kernel (6.18) does not end after the last mapping, but gives some once more.
                return Ok(all);
            }
            all.insert(start, words);
        }
    }
}
