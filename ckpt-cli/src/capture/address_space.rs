//! One address space: its mappings, and the pages that only it has.

use super::descriptors::Table;
use crate::sys::io_uring;
use crate::tracee::freeze::FrozenProcess;
use crate::tracee::proc::{self, Map, Maps};
use crate::tracee::rings;
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::process::{AddressSpace, Backing, Mapping};
use procfs::process::{Process as Proc, VmFlags};

/// Captures the address space.
pub(super) fn capture(
    frozen: &mut FrozenProcess,
    proc: &Proc,
    maps: &Maps,
    brk: u64,
    table: &mut Table<'_>,
) -> Result<AddressSpace> {
    let (pid, stat) = (frozen.pid, proc.stat()?);
    let field = |value: Option<u64>, name| value.with_context(|| format!("/proc/{pid}/stat has no {name}"));
    let memory = table.memory().cut(frozen, maps).context("listing modified memory")?;
    let mut space = AddressSpace {
        memory,
        fields: [
            stat.startcode,
            stat.endcode,
            field(stat.start_data, "start_data")?,
            field(stat.end_data, "end_data")?,
            field(stat.start_brk, "start_brk")?,
            brk,
            stat.startstack,
            field(stat.arg_start, "arg_start")?,
            field(stat.arg_end, "arg_end")?,
            field(stat.env_start, "env_start")?,
            field(stat.env_end, "env_end")?,
        ],
        auxv: std::fs::read(format!("/proc/{pid}/auxv")).context("reading the auxiliary vector")?,
        exe: table.mapped_file(pid, None, "exe", false).context("opening the executable")?,
        mappings: Vec::with_capacity(maps.len()),
        vdso: Vec::new(),
    };
    for map in maps {
        let backing = backing(pid, map, table)?;
        match &backing {
            Backing::Kernel { name } if name == "[vdso]" => {
                space.vdso = vec![0; map.size() as usize];
                crate::sys::memory::read(pid, map.start, &mut space.vdso).context("reading the vdso")?;
            }
            _ => {}
        }
        space.mappings.push(Mapping {
            start: map.start,
            end: map.end,
            prot: map.prot,
            backing,
            flags: if map.flags.contains(VmFlags::GD) { libc::MAP_GROWSDOWN } else { 0 }
                | if map.flags.contains(VmFlags::NR) { libc::MAP_NORESERVE } else { 0 },
            advice: advice(map.flags),
            locked: u8::from(map.flags.contains(VmFlags::LO)),
            huge: map.huge,
        });
    }
    Ok(space)
}

fn backing(pid: i32, map: &Map, table: &mut Table<'_>) -> Result<Backing> {
    if map.by_kernel() {
        return Ok(Backing::Kernel { name: map.path.clone() });
    }
    if map.inode == 0 {
        if map.shared {
            bail!("mapping {:x}-{:x} ({}) is shared but has no file", map.start, map.end, map.path);
        }
        return Ok(Backing::Anonymous);
    }
    if map.path.starts_with(rings::PATH) {
        let file = table.by_inode(map.device, map.inode);
        let file =
            file.with_context(|| format!("an io_uring without descriptor is mapped at {:x}", map.start))?;
        return Ok(Backing::SharedFile { file, offset: map.offset });
    }
    let name = format!("map_files/{:x}-{:x}", map.start, map.end);
    // A shared mapping that may become writable needs a description that is open for writing.
    let write = map.shared && map.flags.contains(VmFlags::MW);
    let file = table
        .mapped_file(pid, Some((map.device, map.inode)), &name, write)
        .with_context(|| format!("opening what is mapped at {:x}-{:x} ({})", map.start, map.end, map.path))?;
    Ok(if map.shared {
        Backing::SharedFile { file, offset: map.offset }
    } else {
        Backing::PrivateFile { file, offset: map.offset }
    })
}

fn advice(flags: VmFlags) -> Vec<i32> {
    [
        (VmFlags::DC, libc::MADV_DONTFORK),
        (VmFlags::DD, libc::MADV_DONTDUMP),
        (VmFlags::WF, libc::MADV_WIPEONFORK),
        (VmFlags::MG, libc::MADV_MERGEABLE),
        (VmFlags::HG, libc::MADV_HUGEPAGE),
        (VmFlags::NH, libc::MADV_NOHUGEPAGE),
        (VmFlags::SR, libc::MADV_SEQUENTIAL),
        (VmFlags::RR, libc::MADV_RANDOM),
    ]
    .into_iter()
    .filter_map(|(flag, advice)| flags.contains(flag).then_some(advice))
    .collect()
}

/// Mappings that cannot be saved from outside, with the reason.
pub(super) fn obstacle(map: &Map) -> Option<&'static str> {
    match () {
        () if map.flags.contains(VmFlags::HT) => Some("memory of hugetlbfs is not supported yet"),
        () if map.path.starts_with("/SYSV") => Some("System V shared memory is not supported yet"),
        () if map.path.starts_with("/[aio]") => Some("contexts of io_setup(2) are not supported yet"),
        () if map.path.starts_with(rings::PATH) => match map.offset {
            io_uring::RINGS | io_uring::COMPLETIONS | io_uring::ENTRIES => None,
            _ => Some("provided buffers of an io_uring are not supported yet"),
        },
        () if map.path.starts_with("anon_inode:") => Some("this kernel object is not supported"),
        () if map.flags.intersects(VmFlags::IO | VmFlags::PF) && !map.by_kernel() => {
            Some("memory of a device cannot be saved")
        }
        () => None,
    }
}

/// Reads the mappings with flags, for the plan.
pub(super) fn maps(pid: i32) -> Result<Maps> {
    proc::maps_with_flags(pid).context("reading the mappings")
}
