//! The traffic hold: held sockets stand still, others do not, and nothing of it outlives its owner.

use anyhow::{Context, Result, ensure};
use ckpt_cli::network::hold::{Hold, SocketCookie};
use ckpt_tests::cluster::Cluster;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

const SHORT: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_secs(20);

/// Two ends of a connection, the first on node 1.
fn connection(cluster: &Cluster, address: IpAddr) -> Result<(TcpStream, TcpStream)> {
    let listener = cluster.node(2).in_network(|| TcpListener::bind((address, 0)))??;
    let to: SocketAddr = listener.local_addr()?;
    let one = cluster.node(1).in_network(|| TcpStream::connect(to))??;
    let (two, _) = listener.accept()?;
    for stream in [&one, &two] {
        stream.set_nodelay(true)?;
    }
    Ok((one, two))
}

fn arrives(mut from: &TcpStream, mut to: &TcpStream, within: Duration) -> Result<bool> {
    from.write_all(b"x")?;
    received(&mut to, within)
}

fn received(to: &mut &TcpStream, within: Duration) -> Result<bool> {
    to.set_read_timeout(Some(within))?;
    match to.read(&mut [0; 1]) {
        Ok(length) => Ok(length == 1),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[test]
fn held_connections_stand_still_and_others_do_not() -> Result<()> {
    let cluster = Cluster::start(2)?;
    let node2 = cluster.node(2).clone();
    for address in [IpAddr::from(node2.ip4), IpAddr::from(node2.ip6)] {
        let (one, two) = connection(&cluster, address)?;
        let (free_one, free_two) = connection(&cluster, address)?;
        let mut hold = Hold::load()?;
        ensure!(arrives(&one, &two, LONG)?, "before the hold");
        let cookie = SocketCookie::of(&two)?;
        hold.add([cookie])?;
        ensure!(!arrives(&one, &two, SHORT)?, "into a held socket");
        ensure!(!arrives(&two, &one, SHORT)?, "out of a held socket");
        ensure!(arrives(&free_one, &free_two, LONG)? && arrives(&free_two, &free_one, LONG)?, "others");
        let dropped = hold.dropped(cookie)?.context("not held")?;
        ensure!(dropped.ingress > 0 && dropped.egress > 0, "{dropped:?}");
        ensure!(hold.dropped(SocketCookie::of(&one)?)?.is_none(), "the other end is not held");
        let all = hold.release()?;
        ensure!(all.ingress >= dropped.ingress && all.egress >= dropped.egress, "{all:?}");
        ensure!(received(&mut &one, LONG)? && received(&mut &two, LONG)?, "after the hold");
    }
    Ok(())
}

#[test]
fn datagrams_to_a_held_socket_are_lost() -> Result<()> {
    let cluster = Cluster::start(2)?;
    let bind = |node: usize| -> Result<UdpSocket> {
        let node = cluster.node(node);
        let socket = node.in_network(|| UdpSocket::bind((node.ip4, 0)))??;
        socket.set_read_timeout(Some(SHORT))?;
        Ok(socket)
    };
    let (one, two) = (bind(1)?, bind(2)?);
    let mut hold = Hold::load()?;
    hold.add([SocketCookie::of(&two)?])?;
    one.send_to(b"lost", two.local_addr()?)?;
    ensure!(two.recv(&mut [0; 9]).is_err(), "in");
    ensure!(two.send_to(b"refused", one.local_addr()?).is_err(), "out");
    drop(hold);
    one.send_to(b"comes", two.local_addr()?)?;
    two.set_read_timeout(Some(LONG))?;
    ensure!(two.recv(&mut [0; 9])? == 5, "after the hold");
    Ok(())
}

/// Not a test of its own: the process that [`a_killed_holder_holds_nothing`] kills.
#[test]
fn holder() -> Result<()> {
    let Ok(cookie) = std::env::var("CKPT_TEST_HOLD") else { return Ok(()) };
    let mut hold = Hold::load()?;
    hold.add([SocketCookie(cookie.parse()?)])?;
    writeln!(std::io::stdout(), "\nholding")?;
    std::thread::sleep(Duration::from_secs(60));
    Ok(())
}

#[test]
fn a_killed_holder_holds_nothing() -> Result<()> {
    let cluster = Cluster::start(2)?;
    let (one, two) = connection(&cluster, cluster.node(2).ip4.into())?;
    let mut holder = Command::new(std::env::current_exe()?)
        .args(["--exact", "holder", "--nocapture"])
        .env("CKPT_TEST_HOLD", SocketCookie::of(&two)?.0.to_string())
        .stdout(Stdio::piped())
        .spawn()?;
    let lines = BufReader::new(holder.stdout.take().context("output")?).lines();
    let holding = lines.map_while(Result::ok).any(|line| line == "holding");
    let while_held = arrives(&one, &two, SHORT);
    holder.kill()?;
    holder.wait()?;
    ensure!(holding && !while_held?, "not held");
    ensure!(received(&mut &two, LONG)?, "after the holder's death");
    Ok(())
}
