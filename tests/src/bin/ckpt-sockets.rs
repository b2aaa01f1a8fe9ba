//! A workload that checks itself: one process with TCP and UDP sockets in every state that a program can leave them
//! in. It sets them up, says so, waits, and looks whether each is as it was.
//!
//! ```text
//! ckpt-sockets ADDRESS4 ADDRESS6 READY VERIFY RESULT
//! ```
//! It creates READY when all is set up. When VERIFY exists, it checks, and writes `pass`, or what is wrong, to RESULT.

use anyhow::{Context, Result, ensure};
use ckpt_tests::stream::{End, check_both, ends};
use nix::sys::socket::{setsockopt, sockopt};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

const SHORT: Duration = Duration::from_millis(50);
const MANY: usize = 8 << 20;

/// What is to hold after the restore.
type Check = Box<dyn FnOnce() -> Result<()>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [four, six, ready, verify, result] = &arguments[..] else {
        anyhow::bail!("usage: ckpt-sockets ADDRESS4 ADDRESS6 READY VERIFY RESULT");
    };
    let mut checks: Vec<(String, Check)> = Vec::new();
    for address in [four.parse()?, six.parse()?, IpAddr::from([127, 0, 0, 1]), "::1".parse()?] {
        for (name, setup) in SETUPS {
            let name = format!("{name} at {address}");
            let check = setup(address).with_context(|| format!("set up: {name}"))?;
            checks.push((name, check));
        }
    }
    fs::write(ready, "")?;
    while !Path::new(verify).exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut wrong = String::new();
    for (name, check) in checks {
        if let Err(error) = check() {
            wrong.push_str(&format!("{name}: {error:#}\n"));
        }
    }
    let text = if wrong.is_empty() { "pass".to_owned() } else { wrong };
    fs::write(format!("{result}.new"), text)?;
    fs::rename(format!("{result}.new"), result)?;
    Ok(())
}

type Setup = fn(IpAddr) -> Result<Check>;

const SETUPS: &[(&str, Setup)] = &[
    ("listening", listening),
    ("connected with queues", connected),
    ("connected with full queues", full),
    ("half closed", half_closed),
    ("end behind full queues", end_behind_full_queues),
    ("closed by the peer", closed_by_peer),
    ("ended both ways", ended),
    ("reset", reset),
    ("bound only", bound),
    ("options", options),
    ("datagrams", datagrams),
    ("connected datagram socket", connected_datagrams),
];

fn pair(address: IpAddr) -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((address, 0))?;
    let one = TcpStream::connect(listener.local_addr()?)?;
    Ok((one, listener.accept()?.0))
}

fn pair_of_ends(address: IpAddr) -> Result<(End, End)> {
    let (one, two) = pair(address)?;
    let seed = 2 * u64::from(one.local_addr()?.port());
    Ok(ends(one, two, seed))
}

fn listening(address: IpAddr) -> Result<Check> {
    let listener = TcpListener::bind((address, 0))?;
    let port = listener.local_addr()?.port();
    let early = TcpStream::connect(listener.local_addr()?)?;
    let (early_other, _) = listener.accept()?;
    Ok(Box::new(move || {
        ensure!(listener.local_addr()?.port() == port, "another port");
        let one = TcpStream::connect(listener.local_addr()?)?;
        let (mut one, mut two) = ends(one, listener.accept()?.0, 1);
        check_both(&mut one, &mut two)?;
        let (mut one, mut two) = ends(early, early_other, 3);
        check_both(&mut one, &mut two)
    }))
}

fn connected(address: IpAddr) -> Result<Check> {
    let (mut one, mut two) = pair_of_ends(address)?;
    one.write(10_000)?;
    two.write(20_000)?;
    let ports = (one.stream.local_addr()?.port(), one.stream.peer_addr()?.port());
    Ok(Box::new(move || {
        ensure!(ports == (one.stream.local_addr()?.port(), one.stream.peer_addr()?.port()), "other ports");
        check_both(&mut one, &mut two)
    }))
}

fn full(address: IpAddr) -> Result<Check> {
    let (mut one, mut two) = pair_of_ends(address)?;
    for _ in 0..5 {
        one.write(MANY)?;
        two.write(MANY)?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Box::new(move || check_both(&mut one, &mut two)))
}

fn half_closed(address: IpAddr) -> Result<Check> {
    let (mut one, mut two) = pair_of_ends(address)?;
    one.write(5000)?;
    one.stream.shutdown(Shutdown::Write)?;
    two.write(3000)?;
    Ok(Box::new(move || {
        two.read_to(5000)?;
        two.read_end()?;
        ensure!(two.write(7000)? == 7000, "the open direction takes nothing");
        one.read_to(10_000)?;
        ensure!(one.stream.write(b"x").is_err(), "the closed direction is open");
        drop(two);
        one.read_end()
    }))
}

fn end_behind_full_queues(address: IpAddr) -> Result<Check> {
    let (mut one, mut two) = pair_of_ends(address)?;
    for _ in 0..5 {
        one.write(MANY)?;
        std::thread::sleep(Duration::from_millis(5));
    }
    one.stream.shutdown(Shutdown::Write)?;
    Ok(Box::new(move || {
        two.read_to(one.written.1)?;
        two.read_end()?;
        two.write(10)?;
        one.read_to(10)
    }))
}

fn closed_by_peer(address: IpAddr) -> Result<Check> {
    let (mut one, mut two) = pair_of_ends(address)?;
    one.write(4000)?;
    drop(one);
    std::thread::sleep(SHORT);
    Ok(Box::new(move || {
        two.read_to(4000)?;
        two.read_end()
    }))
}

fn ended(address: IpAddr) -> Result<Check> {
    let (mut one, mut two) = pair_of_ends(address)?;
    one.write(2000)?;
    two.write(1000)?;
    one.stream.shutdown(Shutdown::Write)?;
    two.stream.shutdown(Shutdown::Write)?;
    std::thread::sleep(SHORT);
    Ok(Box::new(move || {
        for (end, length) in [(&mut one, 1000), (&mut two, 2000)] {
            end.read_to(length)?;
            end.read_end()?;
            ensure!(end.stream.write(b"x").is_err(), "writing after the end");
        }
        Ok(())
    }))
}

fn reset(address: IpAddr) -> Result<Check> {
    let (mut one, mut two) = pair_of_ends(address)?;
    one.write(600)?;
    setsockopt(&one.stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    drop(one);
    std::thread::sleep(SHORT);
    Ok(Box::new(move || {
        two.read_to(600)?;
        match two.stream.read(&mut [0; 1]) {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
            other => anyhow::bail!("{other:?} instead of a reset"),
        }
    }))
}

fn bound(address: IpAddr) -> Result<Check> {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, socket,
    };
    use std::os::fd::AsRawFd;
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fresh = || socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
    let (unbound, bound) = (fresh()?, fresh()?);
    bind(bound.as_raw_fd(), &SockaddrStorage::from(SocketAddr::from((address, 0))))?;
    let listener = TcpListener::from(bound);
    let port = listener.local_addr()?.port();
    Ok(Box::new(move || {
        let unbound = TcpStream::from(unbound);
        ensure!(unbound.local_addr()?.port() == 0, "the fresh socket is bound");
        ensure!(listener.local_addr()?.port() == port, "another port");
        listen(&listener, Backlog::new(1)?)?;
        TcpStream::connect(listener.local_addr()?)?;
        Ok(())
    }))
}

fn options(address: IpAddr) -> Result<Check> {
    let (one, two) = pair(address)?;
    one.set_nodelay(true)?;
    one.set_read_timeout(Some(Duration::from_secs(7)))?;
    one.set_nonblocking(true)?;
    setsockopt(&one, sockopt::KeepAlive, &true)?;
    setsockopt(&one, sockopt::TcpKeepIdle, &44)?;
    setsockopt(&one, sockopt::SndBuf, &90_000)?;
    setsockopt(&one, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 3 })?;
    Ok(Box::new(move || {
        use nix::sys::socket::getsockopt;
        ensure!(one.nodelay()? && !two.nodelay()?, "TCP_NODELAY");
        ensure!(one.read_timeout()? == Some(Duration::from_secs(7)), "SO_RCVTIMEO");
        ensure!(
            getsockopt(&one, sockopt::KeepAlive)? && getsockopt(&one, sockopt::TcpKeepIdle)? == 44,
            "keepalive"
        );
        ensure!(getsockopt(&one, sockopt::SndBuf)? == 180_000, "SO_SNDBUF");
        ensure!(getsockopt(&one, sockopt::Linger)?.l_linger == 3, "SO_LINGER");
        match (&one).read(&mut [0; 1]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            other => anyhow::bail!("O_NONBLOCK: {other:?}"),
        }
    }))
}

fn datagrams(address: IpAddr) -> Result<Check> {
    let (one, two) = (UdpSocket::bind((address, 0))?, UdpSocket::bind((address, 0))?);
    for length in [1, 10, 3000, 20_000] {
        one.send_to(&vec![length as u8; length], two.local_addr()?)?;
    }
    std::thread::sleep(SHORT);
    Ok(Box::new(move || {
        two.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut buffer = vec![0; 30_000];
        for length in [1, 10, 3000, 20_000] {
            let (got, from) = two.recv_from(&mut buffer)?;
            ensure!(
                got == length && buffer[..got].iter().all(|byte| *byte == length as u8),
                "{got} of {length}"
            );
            ensure!(from == one.local_addr()?, "it came from {from}");
        }
        two.send_to(b"more", one.local_addr()?)?;
        ensure!(one.recv(&mut buffer)? == 4, "afterwards");
        Ok(())
    }))
}

fn connected_datagrams(address: IpAddr) -> Result<Check> {
    let (one, two) = (UdpSocket::bind((address, 0))?, UdpSocket::bind((address, 0))?);
    one.connect(two.local_addr()?)?;
    two.connect(one.local_addr()?)?;
    one.send(b"before")?;
    std::thread::sleep(SHORT);
    Ok(Box::new(move || {
        two.set_read_timeout(Some(Duration::from_secs(20)))?;
        one.send(b"after")?;
        let mut buffer = [0; 10];
        for text in [&b"before"[..], b"after"] {
            let length = two.recv(&mut buffer)?;
            ensure!(&buffer[..length] == text, "{:?}", &buffer[..length]);
        }
        Ok(())
    }))
}
