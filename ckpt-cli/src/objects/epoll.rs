//! epoll(7). A registration is keyed by description *and* descriptor number, so the process itself must make it.

use super::{CaptureContext, Captured, Probe};
use anyhow::{Context as _, Result};
use ckpt_common::image::objects::{Epoll, EpollTarget};
use nix::sys::epoll::{Epoll as NixEpoll, EpollCreateFlags};
use std::collections::HashMap;
use std::os::fd::OwnedFd;

/// Captures what an epoll watches: `tfd: 5 events: 19 data: 5 pos:0 ino:61af sdev:7` per registration.
pub fn capture(probe: &Probe, context: &dyn CaptureContext) -> Result<Captured> {
    let mut targets = Vec::new();
    let mut seen: HashMap<i32, u32> = HashMap::new();
    for (_, line) in probe.info.lines.iter().filter(|(key, _)| key == "tfd") {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let after =
            |name: &str| words.iter().position(|w| *w == name).and_then(|i| words.get(i + 1).copied());
        let fd: i32 =
            words.first().and_then(|w| w.parse().ok()).context("epoll registration without a number")?;
        let hex = |name| after(name).and_then(|v| u64::from_str_radix(v, 16).ok());
        let nth = seen.entry(fd).and_modify(|n| *n += 1).or_insert(0);
        let file = context.epoll_target(probe.pid, probe.fd, fd, *nth).with_context(|| {
            format!(
                "epoll fd {} of process {} watches fd {fd}, which no process of the job has open",
                probe.fd, probe.pid
            )
        })?;
        targets.push(EpollTarget {
            fd,
            file,
            events: hex("events:").context("epoll registration without events")? as u32,
            data: hex("data:").context("epoll registration without data")?,
        });
    }
    Captured::new(&Epoll { targets })
}

/// Makes an empty epoll; the registrations are made by the process that has it.
pub fn rebuild() -> Result<OwnedFd> {
    Ok(NixEpoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create")?.0)
}
