//! eventfd, timerfd, signalfd: objects without a path whose state fdinfo shows (proc_pid_fdinfo(5)).

use super::{Captured, Probe};
use crate::sys::ioctl;
use anyhow::{Context as _, Result};
use ckpt_common::image::objects::{EventFd, SignalFd, TimerFd};
use nix::sys::eventfd::{EfdFlags, EventFd as NixEventFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd as NixTimerFd, TimerFlags, TimerSetTimeFlags};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

fn number(probe: &Probe, key: &str, radix: u32) -> Result<u64> {
    let value = probe.info.get(key).with_context(|| format!("fdinfo of fd {} shows no {key}", probe.fd))?;
    u64::from_str_radix(value.trim_start_matches("0x"), radix)
        .with_context(|| format!("fdinfo {key}: {value}"))
}

/// Captures an eventfd.
pub fn capture_eventfd(probe: &Probe) -> Result<Captured> {
    let semaphore = probe.info.get("eventfd-semaphore").is_some_and(|v| v != "0");
    Captured::new(&EventFd { count: number(probe, "eventfd-count", 16)?, semaphore })
}

/// Makes an eventfd.
pub fn rebuild_eventfd(event: &EventFd) -> Result<OwnedFd> {
    let mode = if event.semaphore { EfdFlags::EFD_SEMAPHORE } else { EfdFlags::empty() };
    let fd = NixEventFd::from_value_and_flags(0, mode | EfdFlags::EFD_CLOEXEC).context("eventfd")?;
    if event.count != 0 {
        fd.write(event.count).context("setting an eventfd's counter")?;
    }
    Ok(fd.into())
}

/// `(seconds, nanoseconds)` of fdinfo as ns.
fn pair(probe: &Probe, key: &str) -> Result<u64> {
    let text = probe.info.get(key).with_context(|| format!("fdinfo of fd {} shows no {key}", probe.fd))?;
    let mut parts = text.trim_matches(['(', ')']).split(',').map(|p| p.trim().parse::<u64>());
    match (parts.next(), parts.next()) {
        (Some(Ok(s)), Some(Ok(ns))) => Ok(s * 1_000_000_000 + ns),
        _ => anyhow::bail!("fdinfo {key}: {text}"),
    }
}

/// Captures a timerfd.
pub fn capture_timerfd(probe: &Probe) -> Result<Captured> {
    Captured::new(&TimerFd {
        clock: number(probe, "clockid", 10)? as i32,
        ticks: number(probe, "ticks", 10)?,
        settime_flags: number(probe, "settime flags", 8)? as i32,
        value: pair(probe, "it_value")?,
        interval: pair(probe, "it_interval")?,
    })
}

/// Makes a timerfd. Its next expiry is as far away as it was at the checkpoint.
pub fn rebuild_timerfd(timer: &TimerFd) -> Result<OwnedFd> {
    let clock = match timer.clock {
        libc::CLOCK_REALTIME => ClockId::CLOCK_REALTIME,
        libc::CLOCK_BOOTTIME => ClockId::CLOCK_BOOTTIME,
        libc::CLOCK_REALTIME_ALARM => ClockId::CLOCK_REALTIME_ALARM,
        libc::CLOCK_BOOTTIME_ALARM => ClockId::CLOCK_BOOTTIME_ALARM,
        _ => ClockId::CLOCK_MONOTONIC,
    };
    let fd = NixTimerFd::new(clock, TimerFlags::TFD_CLOEXEC).context("timerfd_create")?;
    let spec = |ns| TimeSpec::from_duration(Duration::from_nanos(ns));
    // An armed timer that was just due has no time left; zero would disarm it.
    if timer.value != 0 || timer.interval != 0 {
        let first = spec(timer.value.max(1));
        let expiration = if timer.interval == 0 {
            Expiration::OneShot(first)
        } else {
            Expiration::IntervalDelayed(first, spec(timer.interval))
        };
        fd.set(expiration, TimerSetTimeFlags::empty()).context("timerfd_settime")?;
    }
    if timer.ticks != 0 {
        ioctl::timerfd_set_ticks(fd.as_fd(), timer.ticks).context("setting a timerfd's expirations")?;
    }
    Ok(fd.into())
}

/// Captures a signalfd.
pub fn capture_signalfd(probe: &Probe) -> Result<Captured> {
    Captured::new(&SignalFd { mask: number(probe, "sigmask", 16)? })
}

/// Makes a signalfd.
pub fn rebuild_signalfd(signals: &SignalFd) -> Result<OwnedFd> {
    ioctl::signalfd(signals.mask).context("signalfd")
}
