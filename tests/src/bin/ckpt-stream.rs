//! A workload that checks itself: many TCP connections, both directions of each always full, every byte known by its
//! place. It notices when it was frozen, and how long its connections then needed to move again.
//!
//! ```text
//! ckpt-stream listen  ADDRESS COUNT REPORT STOP
//! ckpt-stream connect ADDRESS COUNT REPORT STOP
//! ```
//! Ten times a second it writes its [`ckpt_tests::stream::Report`] to the file REPORT. When the file STOP
//! appears, it ends its streams, reads those of the other side to their ends, reports for the last time and ends.

use anyhow::{Context, Result, ensure};
use ckpt_tests::stream::{End, Freeze, Report};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// A turn of the loop that takes longer was interrupted by a freeze.
const FREEZE: Duration = Duration::from_millis(25);
const REPORT_EVERY: Duration = Duration::from_millis(100);
const PIECE: usize = 64 << 10;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [role, address, count, report, stop] = &arguments[..] else {
        anyhow::bail!("usage: ckpt-stream listen|connect ADDRESS COUNT REPORT STOP");
    };
    let count: u64 = count.parse().context("COUNT")?;
    let mut ends = Vec::new();
    let listener = (role == "listen").then(|| TcpListener::bind(address)).transpose().context("listen")?;
    for _ in 0..count {
        let stream = match &listener {
            Some(listener) => listener.accept()?.0,
            None => TcpStream::connect(address)?,
        };
        // Both sides know a connection by the port of the one that connected.
        let port = if listener.is_some() { stream.peer_addr()? } else { stream.local_addr()? }.port();
        let mine = 2 * u64::from(port) + u64::from(listener.is_some());
        stream.set_nonblocking(true)?;
        ends.push(End { stream, written: (mine, 0), read: (mine ^ 1, 0) });
    }
    let outcome = run(&mut ends, Path::new(report), Path::new(stop));
    let mut last = Report::of(&ends);
    match outcome {
        Ok(freezes) => {
            last.freezes = freezes;
            last.done = true;
        }
        Err(error) => last.error = Some(format!("{error:#}")),
    }
    last.write(Path::new(report))
}

fn run(ends: &mut [End], report: &Path, stop: &Path) -> Result<Vec<Freeze>> {
    let mut freezes: Vec<Freeze> = Vec::new();
    // Ends that have not read anything since the last freeze, and when that was over.
    let mut waiting = vec![false; ends.len()];
    let mut thawed = Instant::now();
    let (mut turn, mut reported) = (Instant::now(), Instant::now());
    let mut open = vec![true; ends.len()];
    let mut stopping = false;
    while open.contains(&true) {
        let events = if stopping { PollFlags::POLLIN } else { PollFlags::POLLIN | PollFlags::POLLOUT };
        let mut fds: Vec<_> = ends.iter().map(|end| PollFd::new(end.stream.as_fd(), events)).collect();
        poll(&mut fds, PollTimeout::from(10_u8))?;
        let ready: Vec<PollFlags> = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect();
        drop(fds);
        if turn.elapsed() > FREEZE {
            freezes.push(Freeze { gap_ms: turn.elapsed().as_secs_f64() * 1e3, stall_ms: 0.0 });
            waiting.fill(true);
            thawed = Instant::now();
        }
        turn = Instant::now();
        for (index, end) in ends.iter_mut().enumerate() {
            if !open[index] {
                continue;
            }
            if ready[index].intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
                match end.read_now(PIECE)? {
                    Some(0) => {
                        ensure!(stopping, "stream {} ends at {}", end.read.0, end.read.1);
                        open[index] = false;
                    }
                    Some(_) if std::mem::take(&mut waiting[index]) => {
                        let stall = thawed.elapsed().as_secs_f64() * 1e3;
                        if let Some(freeze) = freezes.last_mut() {
                            freeze.stall_ms = freeze.stall_ms.max(stall);
                        }
                    }
                    _ => {}
                }
            }
            if ready[index].contains(PollFlags::POLLOUT) {
                end.write_now(PIECE)?;
            }
        }
        if !stopping && stop.exists() {
            stopping = true;
            for end in ends.iter() {
                end.stream.shutdown(Shutdown::Write)?;
            }
        }
        if reported.elapsed() > REPORT_EVERY {
            reported = Instant::now();
            Report { freezes: freezes.clone(), ..Report::of(ends) }.write(report)?;
            turn = Instant::now();
        }
    }
    Ok(freezes)
}
