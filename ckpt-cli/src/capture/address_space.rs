//! One address space: its mappings, and the pages that only it has.

use super::descriptors::Table;
use crate::sys::io_uring;
use crate::tracee::freeze::FrozenProcess;
use crate::tracee::proc::{Map, Maps};
use crate::tracee::rings;
use anyhow::{Context as _, Result, bail};
use ckpt_common::image::process::{AddressSpace, Backing, Mapping};
use nix::sys::statfs::{HUGETLBFS_MAGIC, statfs};
use procfs::process::{Stat, VmFlags};
use std::collections::HashMap;
use std::os::unix::fs::FileTypeExt;

/// Captures the address space.
pub(super) fn capture(
    frozen: &mut FrozenProcess,
    stat: &Stat,
    maps: &Maps,
    brk: u64,
    table: &mut Table<'_>,
) -> Result<AddressSpace> {
    let pid = frozen.pid;
    let field = |value: Option<u64>, name| value.with_context(|| format!("/proc/{pid}/stat has no {name}"));
    let memory = table.memory().cut(frozen, maps, stat.starttime).context("listing modified memory")?;
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
        if let Some(reason) = obstacle(map) {
            bail!("mapping {:x}-{:x} {}: {reason}", map.start, map.end, map.path);
        }
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
            huge: table.memory().has_huge(pid, map.start, map.end),
        });
    }
    Ok(space)
}

fn backing(pid: i32, map: &Map, table: &mut Table<'_>) -> Result<Backing> {
    if map.by_kernel() {
        return Ok(Backing::Kernel { name: map.path.clone() });
    }
    if let Some(id) = map.segment() {
        let file = table.segment(pid, map, id);
        let file = file.with_context(|| format!("segment {id} at {:x}-{:x}", map.start, map.end))?;
        return Ok(Backing::SharedFile { file, offset: map.offset });
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
    let file = table
        .mapping(pid, map, (map.device, map.inode))
        .with_context(|| format!("opening what is mapped at {:x}-{:x} ({})", map.start, map.end, map.path))?;
    Ok(if map.shared {
        Backing::SharedFile { file, offset: map.offset }
    } else {
        Backing::PrivateFile { file, offset: map.offset }
    })
}

const DEVICE: &str = "memory of a device cannot be saved";
const HUGETLBFS: &str = "memory of hugetlbfs is not supported yet";

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

/// Mappings that cannot be saved from outside, with the reason. `flags` are looked at where they are known.
pub(super) fn obstacle(map: &Map) -> Option<&'static str> {
    match () {
        () if map.flags.contains(VmFlags::HT) => Some(HUGETLBFS),
        () if map.path.starts_with("/[aio]") => Some("contexts of io_setup(2) are not supported yet"),
        () if map.path.starts_with(rings::PATH) => match map.offset {
            io_uring::RINGS | io_uring::COMPLETIONS | io_uring::ENTRIES => None,
            _ => Some("provided buffers of an io_uring are not supported yet"),
        },
        () if map.path.starts_with("anon_inode:") => Some("this kernel object is not supported"),
        () if map.flags.intersects(VmFlags::IO | VmFlags::PF) && !map.by_kernel() => Some(DEVICE),
        () => None,
    }
}

/// Those of these mappings that cannot be saved, with the reason. Their flags are not read: that walks all page tables.
pub(super) fn obstacles(pid: i32, maps: &[Map]) -> Vec<(&Map, &'static str)> {
    let mut file_systems = HashMap::new();
    let file = |map: &Map| format!("/proc/{pid}/{}", map.link());
    let mut by_file = |map: &Map| {
        let on_hugetlbfs = map.inode != 0
            && *file_systems.entry(map.device).or_insert_with(|| {
                statfs(file(map).as_str()).is_ok_and(|stat| stat.filesystem_type() == HUGETLBFS_MAGIC)
            });
        // Files of /sys and /proc that can be mapped are memory of devices, too.
        let of_device = map.path.starts_with("/sys/")
            || map.path.starts_with("/proc/")
            || map.path.starts_with("/dev/")
                && map.path != "/dev/zero"
                && std::fs::metadata(file(map)).is_ok_and(|found| found.file_type().is_char_device());
        if on_hugetlbfs { Some(HUGETLBFS) } else { of_device.then_some(DEVICE) }
    };
    let mut obstacle = |map| obstacle(map).or_else(|| by_file(map));
    maps.iter().filter_map(|map| Some((map, obstacle(map)?))).collect()
}
