//! The traffic hold: between two moments no packet of the named sockets gets in or out.
//!
//! What a held socket's peer sends is lost on the way and sent again after the hold, as on a bad
//! line; what the socket itself sends stays in its queue. A peer that has sent into a hold waits for
//! a retransmission time-out (200 ms and more), so a hold is for sockets that have a reason, and
//! short. See `docs/NETWORK.md` for when none is needed.
//!
//! The programs are attached at the root of the cgroup2 tree, through links that belong to this
//! process: they go when it ends, however it ends.

use crate::sys::bpf_object;
use anyhow::{Context, Result};
use aya::Ebpf;
use aya::maps::{HashMap, MapData};
use aya::programs::{CgroupAttachMode, CgroupSkb, CgroupSkbAttachType};
use ckpt_common::bpf::Dropped;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;

/// Name of a socket: unique on the machine, in all network namespaces, until it reboots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketCookie(pub u64);

impl SocketCookie {
    /// The cookie of a socket that we have a descriptor of (`SO_COOKIE`).
    ///
    /// # Errors
    /// The descriptor is not a socket.
    pub fn of(socket: impl AsFd) -> std::io::Result<Self> {
        crate::sys::socket::get(socket.as_fd(), libc::SOL_SOCKET, libc::SO_COOKIE).map(Self)
    }
}

/// A traffic hold. Dropping it lets the traffic flow again.
#[derive(Debug)]
pub struct Hold {
    programs: Ebpf,
}

impl Hold {
    /// Loads and attaches the programs, with no socket held yet. Takes milliseconds: before the freeze.
    ///
    /// # Errors
    /// No privilege (CAP_BPF and CAP_NET_ADMIN), no cgroup2 tree, or a kernel without cgroup BPF.
    pub fn load() -> Result<Self> {
        let root = cgroup2_root()?;
        let directory = File::open(&root).with_context(|| format!("open {}", root.display()))?;
        let mut programs = bpf_object::load(&[]).context("load the traffic hold")?;
        for (name, direction) in
            [("hold_egress", CgroupSkbAttachType::Egress), ("hold_ingress", CgroupSkbAttachType::Ingress)]
        {
            let program: &mut CgroupSkb =
                programs.program_mut(name).context("not in the object")?.try_into().context(name)?;
            program.load().with_context(|| format!("load the BPF program {name}"))?;
            // A link each; with links this mode does not exclude other programs.
            program
                .attach(&directory, direction, CgroupAttachMode::Single)
                .with_context(|| format!("attach the BPF program {name} to {}", root.display()))?;
        }
        Ok(Self { programs })
    }

    /// Holds sockets, from the next packet on.
    ///
    /// # Errors
    /// More than [`ckpt_common::bpf::MAX_HELD`] sockets, or the kernel has no memory.
    pub fn add(&mut self, sockets: impl IntoIterator<Item = SocketCookie>) -> Result<()> {
        let mut held: HashMap<&mut MapData, u64, [u64; 2]> =
            HashMap::try_from(self.programs.map_mut("HELD").context("the object has no map HELD")?)?;
        for SocketCookie(cookie) in sockets {
            held.insert(cookie, [0; 2], 0)
                .with_context(|| format!("hold the socket with cookie {cookie}"))?;
        }
        Ok(())
    }

    /// What was dropped for a socket so far; `None`: it is not held.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn dropped(&self, socket: SocketCookie) -> Result<Option<Dropped>> {
        let held: HashMap<&MapData, u64, [u64; 2]> =
            HashMap::try_from(self.programs.map("HELD").context("the object has no map HELD")?)?;
        match held.get(&socket.0, 0) {
            Ok(value) => Ok(Some(zerocopy::transmute!(value))),
            Err(aya::maps::MapError::KeyNotFound) => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("read what was dropped for socket {}", socket.0))
            }
        }
    }

    /// Lets all traffic flow again, all sockets at once, and tells how many packets were dropped.
    ///
    /// # Errors
    /// A program cannot be detached. It is gone at the latest when this process ends.
    pub fn release(mut self) -> Result<Dropped> {
        for name in ["hold_egress", "hold_ingress"] {
            let program: &mut CgroupSkb =
                self.programs.program_mut(name).context("not in the object")?.try_into()?;
            program.unload().with_context(|| format!("detach the BPF program {name}"))?;
        }
        let held: HashMap<&MapData, u64, [u64; 2]> =
            HashMap::try_from(self.programs.map("HELD").context("the object has no map HELD")?)?;
        let mut sum = Dropped::default();
        for entry in held.iter() {
            let (_, value) = entry.context("read what was dropped")?;
            let one: Dropped = zerocopy::transmute!(value);
            sum.egress += one.egress;
            sum.ingress += one.ingress;
        }
        Ok(sum)
    }
}

/// Root of the cgroup2 tree, from `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn cgroup2_root() -> Result<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    find_cgroup2(&table)
        .context("no cgroup2 tree is mounted\nhint: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

fn find_cgroup2(table: &str) -> Option<PathBuf> {
    let of_line = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (top, place) = (fields.next()?, fields.next()?);
        (after.split(' ').next()? == "cgroup2").then(|| (top.to_owned(), PathBuf::from(place)))
    };
    let found: Vec<_> = table.lines().filter_map(of_line).collect();
    // A mount of a subtree would see only the sockets created below it.
    let whole = found.iter().find(|(top, _)| top == "/").or_else(|| found.first());
    whole.map(|(_, place)| place.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_beside_cgroup1() {
        let table = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
                     40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n\
                     42 31 0:38 /below /mnt/part rw,relatime shared:9 - cgroup2 cgroup2 rw\n\
                     41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_cgroup2(table), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(find_cgroup2("24 27 0:6 / /dev rw - devtmpfs devtmpfs rw\n"), None);
    }
}
