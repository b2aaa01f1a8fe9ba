//! The kernel's mappings. Where this node has the same vdso, it is moved to where the program knows it. Where it has
//! another one, the old code stays there and its functions jump to the new ones.

use super::seed::{Inheritance, Parked};
use crate::tracee::{Batch, Stopped};
use anyhow::{Context as _, Result};
use ckpt_common::image::process::{AddressSpace, Backing, Mapping};
use goblin::elf::Elf;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// mov $target, %rax; jmp *%rax
const JUMP: usize = 12;

fn kernel_mappings(space: &AddressSpace) -> Vec<(&str, &Mapping)> {
    space
        .mappings
        .iter()
        .filter_map(|m| match &m.backing {
            Backing::Kernel { name } => Some((name.as_str(), m)),
            _ => None,
        })
        .collect()
}

/// Can the parked mappings simply take the places of the old ones?
fn same(space: &AddressSpace, inheritance: &Inheritance) -> bool {
    let old = kernel_mappings(space);
    space.vdso == inheritance.vdso
        && old.len() == inheritance.parked.len()
        && old
            .iter()
            .zip(&inheritance.parked)
            .all(|((name, m), p)| *name == p.name && m.end - m.start == p.size)
        && std::env::var_os("CKPT_FAULT_OTHER_VDSO").is_none()
}

/// Puts the vdso where the program knows it.
pub(super) fn rebuild(leader: &mut Stopped, space: &AddressSpace, inheritance: &Inheritance) -> Result<()> {
    let mut batch = Batch::new(inheritance.layout.arena);
    let flags = (libc::MREMAP_FIXED | libc::MREMAP_MAYMOVE) as u64;
    let move_to = |batch: &mut Batch, parked: &Parked, to: u64| {
        let name = format!("moving {}", parked.name);
        batch.call(name, libc::SYS_mremap, &[parked.start, parked.size, parked.size, flags, to]);
    };
    if same(space, inheritance) {
        for ((_, old), parked) in kernel_mappings(space).iter().zip(&inheritance.parked) {
            move_to(&mut batch, parked, old.start);
        }
        return Ok(leader.run(batch, false)?.all_ok()?);
    }
    // The new ones stay where they are parked: nothing of the program is there.
    let vdso = inheritance.parked.iter().find(|p| p.name == "[vdso]").context("no vdso is parked")?.start;
    for (name, old) in kernel_mappings(space) {
        let prot = if name == "[vdso]" { libc::PROT_READ | libc::PROT_EXEC } else { libc::PROT_READ };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let args = [old.start, old.end - old.start, prot as u64, flags as u64, u64::MAX, 0];
        batch.call(format!("mapping the old {name}"), libc::SYS_mmap, &args);
    }
    leader.run(batch, false)?.all_ok()?;
    let old = kernel_mappings(space).into_iter().find(|(name, _)| *name == "[vdso]");
    let (_, old) = old.context("the image has no vdso")?;
    let code = redirected(&space.vdso, &inheritance.vdso, vdso)?;
    let mem = File::options()
        .write(true)
        .open(format!("/proc/{}/mem", leader.pid))
        .context("opening the stub's memory")?;
    mem.write_all_at(&code, old.start).context("writing the old vdso")
}

/// Moves what [`rebuild`] has moved back to where it was parked.
pub(super) fn park(batch: &mut Batch, space: &AddressSpace, inheritance: &Inheritance) {
    if !same(space, inheritance) {
        return;
    }
    let flags = (libc::MREMAP_FIXED | libc::MREMAP_MAYMOVE) as u64;
    for ((name, old), parked) in kernel_mappings(space).iter().zip(&inheritance.parked) {
        let args = [old.start, parked.size, parked.size, flags, parked.start];
        batch.call(format!("moving {name} away"), libc::SYS_mremap, &args);
    }
}

fn functions(image: &[u8]) -> Result<BTreeMap<String, u64>> {
    let elf = Elf::parse(image).context("parsing a vdso")?;
    let named = elf.dynsyms.iter().filter(|s| s.st_value != 0 && s.is_function());
    Ok(named.filter_map(|s| Some((elf.dynstrtab.get_at(s.st_name)?.to_owned(), s.st_value))).collect())
}

/// The old code with each function jumping to its namesake in the new one at `base`.
fn redirected(old: &[u8], new: &[u8], base: u64) -> Result<Vec<u8>> {
    let (from, to) = (functions(old)?, functions(new)?);
    let mut code = old.to_vec();
    for (name, offset) in from {
        let target = base + to.get(&name).with_context(|| format!("this node's vdso has no {name}"))?;
        let at = offset as usize;
        let place = code.get_mut(at..at + JUMP).context("a vdso function lies outside its image")?;
        place[..2].copy_from_slice(&[0x48, 0xb8]);
        place[2..10].copy_from_slice(&target.to_le_bytes());
        place[10..].copy_from_slice(&[0xff, 0xe0]);
    }
    Ok(code)
}
