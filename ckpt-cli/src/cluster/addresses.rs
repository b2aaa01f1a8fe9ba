//! From the addresses at the dump to those at the restart.

use ckpt_common::image::manifest::NodeAddress;
use std::net::IpAddr;

/// For each address of the old node, the address that takes its place on the new one: the same
/// address where the new node has it; else one of the same family on an interface of the same name;
/// else the one at the same position among those of its family. Addresses for which there is none
/// are left out.
pub fn map(old: &[NodeAddress], new: &[NodeAddress]) -> Vec<(IpAddr, IpAddr)> {
    old.iter().filter_map(|entry| Some((entry.address, substitute(entry, old, new)?))).collect()
}

fn substitute(entry: &NodeAddress, old: &[NodeAddress], new: &[NodeAddress]) -> Option<IpAddr> {
    let alike = |other: &&NodeAddress| family(other.address) == family(entry.address);
    let here = |other: &&NodeAddress| other.interface == entry.interface;
    let (mut old, mut new): (Vec<_>, Vec<_>) =
        (old.iter().filter(alike).collect(), new.iter().filter(alike).collect());
    if new.iter().any(|other| other.address == entry.address) {
        return Some(entry.address);
    }
    if new.iter().any(here) {
        old.retain(here);
        new.retain(here);
    }
    let position = old.iter().position(|other| other.address == entry.address)?;
    new.get(position).or(new.last()).map(|other| other.address)
}

/// Addresses that can take each other's place: IPv4 or IPv6, of one link only or not.
fn family(address: IpAddr) -> (bool, bool) {
    match address {
        IpAddr::V4(address) => (true, address.is_link_local()),
        IpAddr::V6(address) => (false, address.is_unicast_link_local()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(addresses: &[(&str, &str)]) -> Vec<NodeAddress> {
        let entry = |&(interface, address): &(&str, &str)| NodeAddress {
            interface: interface.into(),
            address: address.parse().unwrap(),
        };
        addresses.iter().map(entry).collect()
    }

    fn mapped(old: &[(&str, &str)], new: &[(&str, &str)]) -> String {
        let pairs = map(&node(old), &node(new));
        pairs.iter().map(|(a, b)| format!("{a}>{b}")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn interfaces_count_first_then_the_order() {
        let old = [("eth0", "10.0.0.1"), ("ib0", "192.168.0.1"), ("eth0", "fd00::1"), ("eth0", "fe80::1")];
        let new = [("ib0", "192.168.0.7"), ("eth0", "fe80::7"), ("eth0", "10.0.0.7"), ("eth0", "fd00::7")];
        let all = "10.0.0.1>10.0.0.7 192.168.0.1>192.168.0.7 fd00::1>fd00::7 fe80::1>fe80::7";
        assert_eq!(mapped(&old, &new), all);
        assert_eq!(mapped(&old[..1], &[("enp3s0", "10.0.0.9")]), "10.0.0.1>10.0.0.9");
    }

    #[test]
    fn the_same_node_keeps_its_addresses_whatever_their_order() {
        let old = [("eth0", "10.0.0.1"), ("eth0", "10.0.0.2")];
        let new = [("eth0", "10.0.0.2"), ("eth0", "10.0.0.1")];
        assert_eq!(mapped(&old, &new), "10.0.0.1>10.0.0.1 10.0.0.2>10.0.0.2");
    }

    #[test]
    fn an_address_without_substitute_is_left_out() {
        assert_eq!(
            mapped(&[("eth0", "10.0.0.1"), ("eth0", "fd00::1")], &[("eth0", "10.0.0.2")]),
            "10.0.0.1>10.0.0.2"
        );
    }
}
