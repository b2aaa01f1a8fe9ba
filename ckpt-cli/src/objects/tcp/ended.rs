//! Sockets whose connection has ended, with data still to be read.
//!
//! Such a socket has no other end any more. Its state is lived through again with a stand-in on
//! this node: connect, send the data, end it the same way.

use super::info::{Info, state};
use super::rebuild::{bind_by_force, send_all};
use crate::network::addresses::AddressMap;
use crate::objects::inet::{self, Protocol};
use crate::sys::socket;
use anyhow::{Context, Result, bail};
use ckpt_common::image::socket::Address;
use ckpt_common::image::tcp::TcpSocket;
use nix::sys::socket::{Backlog, Shutdown, connect, listen, shutdown};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

/// How long this node may take to end a connection with itself.
const PATIENCE: Duration = Duration::from_secs(5);

/// Brings a fresh socket to the end of a connection in which it received `received`.
///
/// # Errors
/// This node cannot connect with itself.
pub(super) fn rebuild(
    fd: BorrowedFd<'_>,
    record: &TcpSocket,
    map: &AddressMap,
    received: &[u8],
    error: bool,
) -> Result<()> {
    let loopback = if record.ipv6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    let mut own = Address { ip: loopback, port: 0, scope: 0 };
    if let Some(local) = record.local {
        // Its address may not be of this node any more; then it cannot matter to anybody.
        if bind_by_force(fd, local, map, record.settings.reuse_address).is_ok() && !local.ip.is_unspecified()
        {
            own = Address { port: 0, ..map.address(local) };
        }
    }
    let size = u32::try_from(received.len())?.saturating_mul(4).saturating_add(1 << 20);
    inet::set_buffers(fd, size, size)?;

    let listener = Protocol::Tcp.socket(record.ipv6)?;
    inet::set_buffers(listener.as_fd(), size, size)?;
    inet::bind(listener.as_fd(), own, &AddressMap::new())?;
    listen(&listener, Backlog::new(1)?).context("listen")?;
    let at = inet::local(listener.as_fd())?.context("a listening socket without an address")?;
    connect(fd.as_raw_fd(), &inet::storage(at))
        .with_context(|| format!("connect with a stand-in at {at}"))?;
    let stand_in = socket::accept(listener.as_fd()).context("accept")?;
    send_all(stand_in.as_fd(), received)?;
    let deadline = Instant::now() + PATIENCE;
    wait(deadline, || Ok(socket::input_queue(fd)? == received.len()))?;
    if error {
        // Closing without lingering breaks the connection off.
        socket::set(stand_in.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &[1_i32, 0])?;
        drop(stand_in);
    } else {
        drop(stand_in);
        wait(deadline, || Ok(Info::of(fd)?.state == state::CLOSE_WAIT))?;
        shutdown(fd.as_raw_fd(), Shutdown::Write).context("shut a connection down")?;
    }
    wait(deadline, || Ok(Info::of(fd)?.state == state::CLOSE))
}

fn wait(deadline: Instant, mut condition: impl FnMut() -> std::io::Result<bool>) -> Result<()> {
    while !condition().context("look at a socket")? {
        if Instant::now() > deadline {
            bail!("a connection of this node with itself does not end");
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}
