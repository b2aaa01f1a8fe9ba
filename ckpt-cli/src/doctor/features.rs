//! One function per feature of the kernel.

use super::Found;
use crate::memory::cow::Way;
use crate::sys::{self, pagemap};
use crate::tracee::mapping_flags::MappingFlags;
use ckpt_common::image::PAGE_SIZE;
use nix::{
    sys::{
        ptrace,
        socket::{AddressFamily, SockFlag, SockType, socket},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::Path,
    process::{Child, Command, Stdio},
};

/// A process to try things on; gone when dropped.
struct Subject(Child);

impl Subject {
    fn start() -> Result<Self, String> {
        let mut command = Command::new("sleep");
        command.arg("60").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().map(Self).map_err(|error| format!("starting a process to try on: {error}"))
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Version of the kernel: major and minor.
fn release() -> Result<((u32, u32), String), String> {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").map_err(|error| error.to_string())?;
    let mut numbers = text.split(['.', '-', '+']).map_while(|number| number.trim().parse::<u32>().ok());
    let version = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    Ok((version, text.trim().to_owned()))
}

pub(super) fn machine() -> Found {
    let (_, release) = release()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).map_err(text)?;
    match (std::env::consts::ARCH, page) {
        ("x86_64", Some(size)) if size as usize == PAGE_SIZE => Ok(format!("x86_64, Linux {release}")),
        (arch, _) => Err(format!("{arch}, Linux {release}: only x86_64 with 4 KiB pages is supported")),
    }
}

/// Effective capabilities, as a bit mask.
fn capabilities() -> Result<u64, String> {
    let status = procfs::process::Process::myself().and_then(|process| process.status()).map_err(text)?;
    Ok(status.capeff)
}

pub(super) fn privileges() -> Found {
    // Numbers as in linux/capability.h.
    const NEEDED: [(&str, u32); 8] = [
        ("DAC_OVERRIDE", 1),
        ("KILL", 5),
        ("SETGID", 6),
        ("SETUID", 7),
        ("SETPCAP", 8),
        ("NET_ADMIN", 12),
        ("SYS_PTRACE", 19),
        ("SYS_ADMIN", 21),
    ];
    let have = capabilities()?;
    let missing: Vec<_> =
        NEEDED.iter().filter(|(_, bit)| have >> bit & 1 == 0).map(|(name, _)| *name).collect();
    match missing[..] {
        [] => Ok(format!("user {}, all needed capabilities", nix::unistd::geteuid())),
        _ => Err(format!("user {} without CAP_{}", nix::unistd::geteuid(), missing.join(", CAP_"))),
    }
}

pub(super) fn ptrace() -> Found {
    let subject = Subject::start()?;
    let pid = subject.pid();
    ptrace::seize(pid, ptrace::Options::empty()).map_err(text)?;
    ptrace::interrupt(pid).map_err(text)?;
    // The stop that follows is an event stop: not an exit, and not a signal of its own.
    match waitpid(pid, Some(WaitPidFlag::__WALL)).map_err(text)? {
        WaitStatus::PtraceEvent(..) | WaitStatus::Stopped(..) => {}
        other => return Err(format!("instead of a stop: {other:?}")),
    }
    ptrace::getregs(pid).map_err(text)?;
    ptrace::detach(pid, None).map_err(text)?;
    Ok("a process was stopped, looked at and let go".into())
}

pub(super) fn pidfd_getfd() -> Found {
    let subject = Subject::start()?;
    let pidfd = sys::pidfd::open(subject.pid().as_raw()).map_err(text)?;
    sys::pidfd::getfd(pidfd.as_fd(), 0).map_err(text)?;
    Ok("a descriptor of another process was taken".into())
}

pub(super) fn kcmp() -> Found {
    let pid = std::process::id() as i32;
    match sys::kcmp::shared(pid, pid, sys::kcmp::Resource::Vm) {
        Ok(true) => Ok("works".into()),
        Ok(false) => Err("a process was found to differ from itself".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// /proc/PID/timers exists only with CONFIG_CHECKPOINT_RESTORE (fs/proc/base.c).
pub(super) fn checkpoint_restore() -> Found {
    match Path::new("/proc/self/timers").exists() {
        true => Ok("the kernel is built with CONFIG_CHECKPOINT_RESTORE".into()),
        false => Err("the kernel is built without CONFIG_CHECKPOINT_RESTORE".into()),
    }
}

/// clone3(2): set_tid since Linux 5.5, with CAP_SYS_ADMIN or, since 5.9, CAP_CHECKPOINT_RESTORE.
pub(super) fn set_tid() -> Found {
    let (version, release) = release()?;
    let have = capabilities()?;
    match (version >= (5, 5), have >> 21 & 1 == 1 || have >> 40 & 1 == 1) {
        (false, _) => Err(format!("Linux {release}: needs 5.5")),
        (_, false) => Err("needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE".into()),
        _ => Ok(format!("Linux {release}, with the capability")),
    }
}

pub(super) fn pagemap_scan() -> Found {
    let pagemap = File::open("/proc/self/pagemap").map_err(text)?;
    // A page that is there for sure: one of our own that was written.
    let page = vec![1u8; 2 * PAGE_SIZE];
    let start = (page.as_ptr() as u64).next_multiple_of(PAGE_SIZE as u64);
    let query = pagemap::Query {
        any: pagemap::category::PRESENT | pagemap::category::SWAPPED,
        report: pagemap::category::PRESENT,
        ..Default::default()
    };
    let mut found = 0;
    let end = start + PAGE_SIZE as u64;
    pagemap::scan(pagemap.as_fd(), start, end, query, |region| found += region.end - region.start)
        .map_err(|error| format!("{error} (needs Linux 6.7)"))?;
    match found == PAGE_SIZE as u64 {
        true => Ok("a page was found".into()),
        false => Err("a page that is there was not found".into()),
    }
}

pub(super) fn tcp_repair() -> Found {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).map_err(text)?;
    // TCP_REPAIR of linux/tcp.h.
    let repair = |value: &i32| {
        sys::ioctl::set_sockopt(socket.as_fd(), nix::libc::IPPROTO_TCP, 19, &value.to_ne_bytes())
            .map_err(text)
    };
    repair(&1)?;
    repair(&-1)?;
    Ok("a socket went into repair mode and out of it".into())
}

/// Loads and attaches the programs of the traffic hold; with no socket to hold they let all pass.
pub(super) fn hold() -> Found {
    let hold = crate::network::hold::Hold::load().map_err(|error| format!("{error:#}"))?;
    hold.release().map_err(|error| format!("{error:#}"))?;
    Ok("programs were attached to the root of the cgroup2 tree".into())
}

pub(super) fn page_faults() -> Found {
    crate::memory::cow::Cow::choose(Way::Bpf).map_err(|error| format!("{error:#}"))?;
    Ok("programs were attached to the tracepoints of page faults".into())
}

pub(super) fn mappings() -> Found {
    MappingFlags::load().map_err(|error| format!("{error:#}"))?;
    Ok("a program has read flags of mappings, and they were right".into())
}

pub(super) fn userfaultfd() -> Found {
    match File::open("/dev/userfaultfd") {
        Ok(_) => Ok("/dev/userfaultfd".into()),
        Err(error) => Err(format!("/dev/userfaultfd: {error}")),
    }
}
