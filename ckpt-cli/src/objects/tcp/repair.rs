//! Repair mode of a TCP socket (`TCP_REPAIR`, linux/tcp.h): its queues and numbers as values.
//!
//! Repair mode does not stop a socket: it still receives, acknowledges and retransmits. What it
//! stops is the program: send(2) fails. So a socket of a live job is in it for microseconds.

use crate::sys::socket;
use anyhow::{Context, Result};
use ckpt_common::image::tcp::Window;
use libc::{IPPROTO_TCP, SOL_SOCKET};
use nix::sys::socket::{MsgFlags, recv, send};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub(super) const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
/// Values of `TCP_REPAIR`. Turning it off with 0 would send a window probe.
const ON: i32 = 1;
pub(super) const OFF_WITHOUT_PROBE: i32 = -1;
/// Kinds of TCP options, as in the header of a SYN.
const OPTION_MAX_SEGMENT: u32 = 2;
const OPTION_WINDOW_SCALE: u32 = 3;
const OPTION_SACK: u32 = 4;
const OPTION_TIMESTAMP: u32 = 8;
/// How much is passed to a queue at once.
const PIECE: usize = 64 << 10;

/// A queue of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Queue {
    None = 0,
    Receive = 1,
    Send = 2,
}

/// `struct tcp_repair_window`.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable)]
struct RawWindow {
    snd_wl1: u32,
    snd_wnd: u32,
    max_window: u32,
    rcv_wnd: u32,
    rcv_wup: u32,
}

/// `struct tcp_repair_opt`.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct RawOption {
    code: u32,
    value: u32,
}

/// What the two ends have agreed on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Agreed {
    pub(super) max_segment: u32,
    pub(super) window_scales: Option<(u8, u8)>,
    pub(super) sack: bool,
    pub(super) timestamp: bool,
}

/// A socket in repair mode. Dropping it turns repair mode off, except after [`Repair::stay`].
#[derive(Debug)]
pub(super) struct Repair<'a> {
    fd: BorrowedFd<'a>,
    /// Repair mode overwrites it, and clears it when turned off.
    reuse_address: i32,
    stay: bool,
}

impl<'a> Repair<'a> {
    /// Turns repair mode on. `reuse_address` is what `SO_REUSEADDR` is set to when it is turned off.
    pub(super) fn enter(fd: BorrowedFd<'a>, reuse_address: bool) -> Result<Self> {
        socket::set(fd, IPPROTO_TCP, TCP_REPAIR, &ON)
            .context("turn on TCP repair mode\nhint: CAP_NET_ADMIN is needed")?;
        Ok(Self { fd, reuse_address: reuse_address.into(), stay: false })
    }

    /// A socket that was left in repair mode by [`Repair::stay`].
    pub(super) fn resume(fd: BorrowedFd<'a>, reuse_address: bool) -> Self {
        Self { fd, reuse_address: reuse_address.into(), stay: false }
    }

    /// The socket stays in repair mode.
    pub(super) fn stay(mut self) {
        self.stay = true;
    }

    /// Turns repair mode off.
    pub(super) fn leave(mut self) -> Result<()> {
        self.stay = true;
        self.turn_off().context("turn off TCP repair mode")
    }

    fn turn_off(&self) -> io::Result<()> {
        socket::set(self.fd, IPPROTO_TCP, TCP_REPAIR, &OFF_WITHOUT_PROBE)?;
        socket::set(self.fd, SOL_SOCKET, libc::SO_REUSEADDR, &self.reuse_address)
    }

    fn select(&self, queue: Queue) -> Result<()> {
        socket::set(self.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &(queue as i32)).context("select a TCP queue")
    }

    /// Sequence number after the last byte of a queue, a FIN counting as a byte.
    pub(super) fn end(&self, queue: Queue) -> Result<u32> {
        self.select(queue)?;
        socket::get(self.fd, IPPROTO_TCP, TCP_QUEUE_SEQ)
            .with_context(|| format!("sequence number of queue {queue:?}"))
    }

    /// Sets where a queue starts, before connecting.
    pub(super) fn set_start(&self, queue: Queue, sequence: u32) -> Result<()> {
        self.select(queue)?;
        socket::set(self.fd, IPPROTO_TCP, TCP_QUEUE_SEQ, &sequence)
            .with_context(|| format!("set the sequence number of queue {queue:?}"))?;
        self.select(Queue::None)
    }

    /// Content of a queue: up to `length` bytes.
    ///
    /// While the send queue is selected, what the kernel would send counts as sent and is not
    /// (tcp_write_xmit): no longer than needed, or it is on its way only after a loss probe.
    pub(super) fn peek(&self, queue: Queue, length: usize) -> Result<Vec<u8>> {
        if length == 0 {
            return Ok(Vec::new());
        }
        self.select(queue)?;
        let mut data = vec![0; length];
        let got = recv(self.fd.as_raw_fd(), &mut data, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
        self.select(Queue::None)?;
        let got = match got {
            Ok(got) => got,
            Err(nix::errno::Errno::EAGAIN) => 0,
            Err(error) => return Err(error).with_context(|| format!("read TCP queue {queue:?}")),
        };
        data.truncate(got);
        Ok(data)
    }

    /// Puts received data into the receive queue.
    pub(super) fn fill_receive_queue(&self, data: &[u8]) -> Result<()> {
        self.select(Queue::Receive)?;
        let mut done = 0;
        while done < data.len() {
            let piece = &data[done..data.len().min(done + PIECE)];
            done += send(self.fd.as_raw_fd(), piece, MsgFlags::MSG_DONTWAIT).with_context(|| {
                format!("put {} bytes into a TCP receive queue, at byte {done}", data.len())
            })?;
        }
        self.select(Queue::None)
    }

    /// Largest segment, as agreed.
    pub(super) fn max_segment(&self) -> Result<u32> {
        socket::get(self.fd, IPPROTO_TCP, libc::TCP_MAXSEG).context("TCP_MAXSEG")
    }

    pub(super) fn set_agreed(&self, agreed: Agreed) -> Result<()> {
        let mut options = vec![RawOption { code: OPTION_MAX_SEGMENT, value: agreed.max_segment }];
        if let Some((ours, its)) = agreed.window_scales {
            let value = u32::from(ours) | u32::from(its) << 16;
            options.push(RawOption { code: OPTION_WINDOW_SCALE, value });
        }
        if agreed.sack {
            options.push(RawOption { code: OPTION_SACK, value: 0 });
        }
        if agreed.timestamp {
            options.push(RawOption { code: OPTION_TIMESTAMP, value: 0 });
        }
        socket::set(self.fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, options.as_slice())
            .with_context(|| format!("set agreed TCP options {agreed:?}"))
    }

    pub(super) fn timestamp(&self) -> Result<u32> {
        socket::get(self.fd, IPPROTO_TCP, TCP_TIMESTAMP).context("TCP_TIMESTAMP")
    }

    pub(super) fn set_timestamp(&self, value: u32) -> Result<()> {
        socket::set(self.fd, IPPROTO_TCP, TCP_TIMESTAMP, &value).context("set TCP_TIMESTAMP")
    }

    pub(super) fn window(&self) -> Result<Window> {
        let raw: RawWindow =
            socket::get(self.fd, IPPROTO_TCP, TCP_REPAIR_WINDOW).context("TCP_REPAIR_WINDOW")?;
        Ok(Window {
            update: raw.snd_wl1,
            send: raw.snd_wnd,
            max: raw.max_window,
            receive: raw.rcv_wnd,
            announced_at: raw.rcv_wup,
        })
    }

    pub(super) fn set_window(&self, window: Window) -> Result<()> {
        let raw = RawWindow {
            snd_wl1: window.update,
            snd_wnd: window.send,
            max_window: window.max,
            rcv_wnd: window.receive,
            rcv_wup: window.announced_at,
        };
        socket::set(self.fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &raw)
            .with_context(|| format!("set TCP_REPAIR_WINDOW to {window:?}"))
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        if !self.stay {
            // The backstop after an error, which is the one to report.
            let _ = self.turn_off();
        }
    }
}
