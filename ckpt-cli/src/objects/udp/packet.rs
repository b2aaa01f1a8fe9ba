//! UDP datagrams as packets: RFC 768 in RFC 791 or RFC 8200.

use ckpt_common::image::socket::Address;
use std::net::IpAddr;

const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
const HOPS: u8 = 64;

/// A packet from `source` to `target`, both of one family; `None` where the data does not fit.
pub(super) fn build(source: Address, target: Address, data: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(UDP_HEADER + data.len()).ok()?;
    let (mut packet, pseudo) = match (source.ip, target.ip) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = length.checked_add(20)?;
            // The kernel fills in the identification and the checksum of the header.
            let mut packet = vec![0x45, 0];
            packet.extend(total.to_be_bytes());
            packet.extend([0, 0, 0, 0, HOPS, UDP, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            (packet, [from.octets(), to.octets()].concat())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend(length.to_be_bytes());
            packet.extend([UDP, HOPS]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            (packet, [from.octets(), to.octets()].concat())
        }
        _ => return None,
    };
    let mut datagram = Vec::with_capacity(usize::from(length));
    for number in [source.port, target.port, length, 0] {
        datagram.extend(number.to_be_bytes());
    }
    datagram.extend(data);
    let sum = checksum(&[&pseudo, &[0, UDP], &length.to_be_bytes(), &datagram]);
    // Zero would mean that there is none.
    let sum = if sum == 0 { u16::MAX } else { sum };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    packet.extend(datagram);
    Some(packet)
}

/// The Internet checksum of parts of which only the last may have an odd length (RFC 1071).
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 =
        words.map(|word| u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| u32::from(*low))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(ip: &str, port: u16) -> Address {
        Address { ip: ip.parse().unwrap(), port, scope: 0 }
    }

    #[test]
    fn checksums_close() {
        for (from, to) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let packet = build(address(from, 1000), address(to, 53), b"odd").unwrap();
            let header = packet.len() - UDP_HEADER - 3;
            let ips = if header == 20 { &packet[12..20] } else { &packet[8..40] };
            assert_eq!(checksum(&[ips, &[0, UDP], &[0, 11], &packet[header..]]), 0, "{from}");
            assert_eq!(&packet[header..header + 4], &[1000_u16.to_be_bytes(), 53_u16.to_be_bytes()].concat());
        }
    }

    #[test]
    fn what_cannot_be_is_nothing() {
        let (four, six) = (address("10.0.0.1", 1), address("fd00::1", 1));
        assert!(build(four, six, b"").is_none());
        assert!(build(four, four, &vec![0; 65_508]).is_none());
        assert!(build(four, four, &vec![0; 65_507]).is_some());
    }
}
