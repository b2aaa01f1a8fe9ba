//! UDP sockets, captured on one node and rebuilt on another.

use anyhow::{Result, ensure};
use ckpt_cli::network::addresses::AddressMap;
use ckpt_cli::objects::udp;
use ckpt_common::image::udp::UdpSocket as Record;
use ckpt_tests::cluster::{Cluster, Node};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

fn socket(node: &Node, ip: IpAddr) -> Result<UdpSocket> {
    Ok(node.in_network(|| UdpSocket::bind((ip, 0)))??)
}

fn rebuild(node: &Node, record: &Record, map: &AddressMap) -> Result<UdpSocket> {
    Ok(node.in_network(|| udp::rebuild(record, map))??.into())
}

/// Everything in the queue, and who sent it.
fn drain(socket: &UdpSocket) -> Result<Vec<(Vec<u8>, SocketAddr)>> {
    socket.set_nonblocking(true)?;
    let mut all = Vec::new();
    let mut buffer = vec![0; 70_000];
    while let Ok((length, source)) = socket.recv_from(&mut buffer) {
        all.push((buffer[..length].to_vec(), source));
    }
    socket.set_nonblocking(false)?;
    Ok(all)
}

#[test]
fn queues_move_with_their_senders() -> Result<()> {
    let cluster = Cluster::start(4)?;
    let node = |number| cluster.node(number);
    let pairs = [(1, 3), (2, 4)];
    let four = pairs.map(|(old, new)| (IpAddr::from(node(old).ip4), IpAddr::from(node(new).ip4)));
    let six = pairs.map(|(old, new)| (IpAddr::from(node(old).ip6), IpAddr::from(node(new).ip6)));
    let map: AddressMap = four.into_iter().chain(six).collect();
    let any = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let cases: [(IpAddr, IpAddr, IpAddr); 4] = [
        (node(2).ip4.into(), node(1).ip4.into(), node(2).ip4.into()),
        (node(2).ip6.into(), node(1).ip6.into(), node(2).ip6.into()),
        (any, node(1).ip4.into(), node(2).ip4.into()),
        (any, node(1).ip6.into(), node(2).ip6.into()),
    ];
    for (bound, from, to) in cases {
        let receiver = socket(node(2), bound)?;
        let senders = [socket(node(1), from)?, socket(node(1), from)?];
        let target = SocketAddr::from((to, receiver.local_addr()?.port()));
        let sizes = [1, 0, 1400, 3, 60_000, 0, 0, 9000];
        for (number, size) in sizes.into_iter().enumerate() {
            senders[number % 2].send_to(&vec![number as u8; size], target)?;
        }
        let connected = receiver.try_clone()?;
        connected.connect(senders[0].local_addr()?)?;
        receiver.set_read_timeout(Some(Duration::from_secs(7)))?;
        std::thread::sleep(Duration::from_millis(20));

        let record = udp::capture(receiver.as_fd())?;
        assert_eq!(record.received.len(), sizes.len(), "{bound}");
        let mut seen = record.clone();
        seen.received.retain(|datagram| !datagram.data.is_empty());
        ensure!(udp::capture(receiver.as_fd())? == seen, "{bound}: capturing changes something");
        let original = drain(&receiver)?;
        assert_eq!(original.len(), sizes.len(), "capturing takes nothing away");

        let new = rebuild(node(4), &record, &map)?;
        let again = udp::capture(new.as_fd())?;
        assert_eq!(again.settings.buffer_locks, record.settings.buffer_locks);
        assert_eq!(again.settings.receive_buffer, record.settings.receive_buffer);
        assert_eq!(new.read_timeout()?, Some(Duration::from_secs(7)));
        let moved = |old: SocketAddr| {
            let mut new = old;
            new.set_ip(map.ip(old.ip()));
            new
        };
        let expected: Vec<_> = original.into_iter().map(|(data, source)| (data, moved(source))).collect();
        ensure!(drain(&new)? == expected, "{bound}: other datagrams");
        assert_eq!(new.peer_addr()?, moved(connected.peer_addr()?));

        // And it goes on: with its peer, and with nobody else.
        let peer = node(3).in_network(|| UdpSocket::bind(moved(senders[0].local_addr()?)))??;
        let stranger = socket(node(3), map.ip(from))?;
        let target = moved(target);
        stranger.send_to(b"stranger", target)?;
        peer.send_to(b"friend", target)?;
        let mut buffer = [0; 20];
        assert_eq!(new.recv(&mut buffer)?, 6);
        new.send(b"back")?;
        peer.set_read_timeout(Some(Duration::from_secs(20)))?;
        assert_eq!(peer.recv(&mut buffer)?, 4);
    }
    Ok(())
}

#[test]
fn sockets_without_a_queue_come_back() -> Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    let cluster = Cluster::start(2)?;
    let (one, two) = (cluster.node(1), cluster.node(2));
    let map: AddressMap = [(IpAddr::from(one.ip4), IpAddr::from(two.ip4))].into_iter().collect();
    let bound = socket(one, one.ip4.into())?;
    bound.set_broadcast(true)?;
    setsockopt(&bound, sockopt::RcvBuf, &50_000)?;
    setsockopt(&bound, sockopt::Ipv4PacketInfo, &true)?;
    setsockopt(&bound, sockopt::BindToDevice, &"eth0".into())?;
    let record = udp::capture(bound.as_fd())?;
    let new = rebuild(two, &record, &map)?;
    let again = udp::capture(new.as_fd())?;
    let sorted = |mut record: Record| {
        record.settings.options.sort_by_key(|option| (option.level, option.name));
        record.settings
    };
    assert_eq!(sorted(again), sorted(record));
    assert_eq!(new.local_addr()?, SocketAddr::from((two.ip4, bound.local_addr()?.port())));

    let fresh = ckpt_cli::objects::inet::Protocol::Udp.socket(true)?;
    let record = udp::capture(fresh.as_fd())?;
    ensure!(
        record.local.is_none() && record.peer.is_none() && record.settings.options.is_empty(),
        "{record:?}"
    );
    let new = rebuild(two, &record, &map)?;
    assert_eq!(udp::capture(new.as_fd())?, record);
    Ok(())
}
