//! The address map of a restart: where the addresses of the old nodes are now.

use ckpt_common::image::socket::Address;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Old address to new address. An address that is not in it stays as it is; loopback and wildcard
/// addresses mean "this node" everywhere and are never in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressMap {
    pairs: BTreeMap<IpAddr, IpAddr>,
}

impl AddressMap {
    /// No address changes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says where an address is now. A pair of unequal families, or with an address that means
    /// "this node", is left out.
    pub fn insert(&mut self, old: IpAddr, new: IpAddr) {
        let (old, new) = (old.to_canonical(), new.to_canonical());
        let anywhere = |ip: IpAddr| ip.is_loopback() || ip.is_unspecified();
        if old.is_ipv4() == new.is_ipv4() && !anywhere(old) && !anywhere(new) {
            self.pairs.insert(old, new);
        }
    }

    /// Where an IP address is now, in the form it was given: an IPv4-mapped one stays mapped.
    pub fn ip(&self, old: IpAddr) -> IpAddr {
        let Some(new) = self.pairs.get(&old.to_canonical()) else { return old };
        match (old, new) {
            (IpAddr::V6(_), IpAddr::V4(four)) => IpAddr::V6(four.to_ipv6_mapped()),
            _ => *new,
        }
    }

    /// Where an address is now. The interface number of a link-local address stays.
    pub fn address(&self, old: Address) -> Address {
        Address { ip: self.ip(old.ip), ..old }
    }

    /// All pairs.
    pub fn iter(&self) -> impl Iterator<Item = (IpAddr, IpAddr)> + '_ {
        self.pairs.iter().map(|(old, new)| (*old, *new))
    }
}

impl FromIterator<(IpAddr, IpAddr)> for AddressMap {
    fn from_iter<I: IntoIterator<Item = (IpAddr, IpAddr)>>(pairs: I) -> Self {
        let mut map = Self::new();
        for (old, new) in pairs {
            map.insert(old, new);
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_move_in_the_form_they_have() {
        let map: AddressMap = [("10.0.0.1", "10.0.0.9"), ("fd00::1", "fd00::9")]
            .map(|(a, b)| (ip(a), ip(b)))
            .into_iter()
            .collect();
        assert_eq!(map.ip(ip("10.0.0.1")), ip("10.0.0.9"));
        assert_eq!(map.ip(ip("::ffff:10.0.0.1")), ip("::ffff:10.0.0.9"));
        assert_eq!(map.ip(ip("fd00::1")), ip("fd00::9"));
        assert_eq!(map.ip(ip("10.0.0.2")), ip("10.0.0.2"));
        assert_eq!(map.iter().count(), 2);
    }

    #[test]
    fn addresses_of_this_node_stay() {
        let mut map = AddressMap::new();
        for (old, new) in
            [("127.0.0.1", "10.0.0.9"), ("::", "fd00::9"), ("10.0.0.1", "fd00::9"), ("10.0.0.1", "0.0.0.0")]
        {
            map.insert(ip(old), ip(new));
        }
        assert_eq!(map, AddressMap::new());
    }
}
