//! Which TCP connections are inside the job, and what is on its way in them.

use ckpt_common::{
    image::manifest::{Channel, ChannelEnd, NodeAddress},
    wire::Connection,
};
use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

/// What one node reported.
pub struct NodeView<'a> {
    /// Its connections.
    pub connections: &'a [Connection],
    /// Its addresses.
    pub addresses: &'a [NodeAddress],
}

/// An end: node and index in its connections.
type End = (usize, usize);

/// The connections of a job.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sorted {
    /// Both ends are in the job.
    pub inside: Vec<[End; 2]>,
    /// The other end is in the job's nodes, but closed already: nothing more will come from it.
    pub closed: Vec<End>,
    /// The other end is elsewhere.
    pub outside: Vec<End>,
}

/// An IPv4 address in IPv6 clothes is the IPv4 address.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Finds the other end of every connection. Loopback addresses are matched within a node; where
/// several nodes have a connection between the same two addresses (those of private bridges may
/// exist on each), the node that owns the remote address is taken.
pub fn sort(nodes: &[NodeView<'_>]) -> Sorted {
    let mut by_address: HashMap<(SocketAddr, SocketAddr), Vec<End>> = HashMap::new();
    for (node, view) in nodes.iter().enumerate() {
        for (index, connection) in view.connections.iter().enumerate() {
            let key = (canonical(connection.local), canonical(connection.remote));
            by_address.entry(key).or_default().push((node, index));
        }
    }
    let owns = |node: usize, address: IpAddr| {
        let mut addresses = nodes[node].addresses.iter();
        addresses.any(|own| own.address.to_canonical() == address)
    };
    let mut sorted = Sorted::default();
    for (node, view) in nodes.iter().enumerate() {
        for (index, connection) in view.connections.iter().enumerate() {
            let (local, remote) = (canonical(connection.local), canonical(connection.remote));
            let others = by_address.get(&(remote, local)).map(Vec::as_slice).unwrap_or_default();
            let others = others.iter().filter(|end| **end != (node, index));
            let peer = if remote.ip().is_loopback() {
                others.clone().find(|(other, _)| *other == node)
            } else {
                others.clone().find(|(other, _)| owns(*other, remote.ip())).or(others.clone().next())
            };
            let near = remote.ip().is_loopback() || (0..nodes.len()).any(|node| owns(node, remote.ip()));
            match peer {
                // Each pair once.
                Some(&peer) if (node, index) < peer => sorted.inside.push([(node, index), peer]),
                Some(_) => {}
                None if connection.peer_closed && near => sorted.closed.push((node, index)),
                None => sorted.outside.push((node, index)),
            }
        }
    }
    sorted
}

/// The channel table at the cut.
///
/// # Errors
/// Which connection has no position, has lost a byte, or was given one.
pub fn table(nodes: &[NodeView<'_>], inside: &[[End; 2]]) -> Result<Vec<Channel>, String> {
    let end = |&(node, index): &End| {
        let connection = &nodes[node].connections[index];
        let position = connection.position.ok_or(format!("TCP {} has no position", connection.local))?;
        Ok::<_, String>(ChannelEnd { node: node as u32, position })
    };
    let channel = |[a, b]: &[End; 2]| {
        let channel = Channel { ends: [end(a)?, end(b)?] };
        channel.check().map(|()| channel)
    };
    inside.iter().map(channel).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ckpt_common::image::tcp::Position;

    fn connection(local: &str, remote: &str) -> Connection {
        let (local, remote) = (local.parse().unwrap(), remote.parse().unwrap());
        Connection { pid: 1, fd: 3, local, remote, peer_closed: false, position: None }
    }

    fn address(address: &str) -> NodeAddress {
        NodeAddress { interface: "eth0".into(), address: address.parse().unwrap() }
    }

    fn sorted(nodes: &[(&[Connection], &[NodeAddress])]) -> Sorted {
        let view = |(connections, addresses)| NodeView { connections, addresses };
        sort(&nodes.iter().copied().map(view).collect::<Vec<_>>())
    }

    #[test]
    fn ends_are_found_across_nodes_and_families() {
        let one = [connection("10.0.0.1:6379", "10.0.0.2:40000"), connection("10.0.0.1:6379", "10.9.9.9:1")];
        let two = [connection("[::ffff:10.0.0.2]:40000", "[::ffff:10.0.0.1]:6379")];
        let sorted = sorted(&[(&one, &[address("10.0.0.1")]), (&two, &[address("10.0.0.2")])]);
        assert_eq!(sorted.inside, [[(0, 0), (1, 0)]]);
        assert_eq!(sorted.outside, [(0, 1)]);
    }

    #[test]
    fn loopback_stays_on_its_node() {
        let both = [connection("127.0.0.1:1", "127.0.0.1:2"), connection("127.0.0.1:2", "127.0.0.1:1")];
        let half = [connection("127.0.0.1:1", "127.0.0.1:2")];
        let sorted = sorted(&[(&both, &[]), (&both, &[]), (&half, &[])]);
        assert_eq!(sorted.inside, [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]);
        assert_eq!(sorted.outside, [(2, 0)]);
    }

    #[test]
    fn private_bridges_with_the_same_addresses_are_told_apart() {
        let both = [connection("172.17.0.1:1", "172.17.0.2:2"), connection("172.17.0.2:2", "172.17.0.1:1")];
        let sorted = sorted(&[(&both, &[]), (&[], &[])]);
        assert_eq!(sorted.inside, [[(0, 0), (0, 1)]]);
    }

    #[test]
    fn a_connection_to_itself_has_no_other_end_outside() {
        // TCP simultaneous open onto the own port: one socket is both ends.
        let one = [connection("127.0.0.1:5", "127.0.0.1:5")];
        assert_eq!(sorted(&[(&one, &[])]).outside, [(0, 0)]);
    }

    #[test]
    fn an_end_whose_peer_has_closed_is_no_outside_connection() {
        let mut one = [connection("10.0.0.1:1", "10.0.0.1:2"), connection("10.0.0.1:1", "10.0.0.9:2")];
        one.iter_mut().for_each(|connection| connection.peer_closed = true);
        let sorted = sorted(&[(&one, &[address("10.0.0.1")])]);
        assert_eq!((sorted.closed, sorted.outside), (vec![(0, 0)], vec![(0, 1)]));
    }

    #[test]
    fn the_table_refuses_lost_bytes() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap().into();
        let end = |local, peer, [send_start, send_end, receive_next]: [u32; 3]| Position {
            local: address(local),
            peer: address(peer),
            send_start,
            send_end,
            receive_next,
            window_end: receive_next,
            finished: false,
            peer_finished: false,
        };
        let mut both = [connection("127.0.0.1:1", "127.0.0.1:2"), connection("127.0.0.1:2", "127.0.0.1:1")];
        both[0].position = Some(end("127.0.0.1:1", "127.0.0.1:2", [5, 30, 7]));
        let mut with = |position: Option<u32>| {
            both[1].position = position.map(|next| end("127.0.0.1:2", "127.0.0.1:1", [7, 7, next]));
            table(&[NodeView { connections: &both, addresses: &[] }], &[[(0, 0), (0, 1)]])
        };
        let found = with(Some(10)).unwrap();
        assert_eq!((found[0].in_flight(0), found[0].in_flight(1)), (20, 0));
        assert!(with(Some(31)).unwrap_err().contains("had not written"));
        assert!(with(Some(4)).unwrap_err().contains("not captured"));
        assert!(with(None).unwrap_err().contains("no position"));
    }
}
