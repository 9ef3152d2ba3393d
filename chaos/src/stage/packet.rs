//! IPv4 packets, as far as a switch must read and change them (RFC 791, RFC 768).

use std::net::Ipv4Addr;

const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
/// Of the UDP header.
const CHECKSUM_AT: usize = 6;

/// The addresses of an IPv4 packet: from, to. `None` for anything else.
pub(super) fn addresses(packet: &[u8]) -> Option<(Ipv4Addr, Ipv4Addr)> {
    if packet.len() < 20 || packet[0] >> 4 != 4 {
        return None;
    }
    let at = |at: usize| Ipv4Addr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).expect("four bytes"));
    Some((at(12), at(16)))
}

fn udp_at(packet: &[u8]) -> Option<usize> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    (packet.get(9) == Some(&UDP) && packet.len() >= header + UDP_HEADER).then_some(header)
}

/// Length of the UDP payload; `None` if the packet is not UDP.
pub(super) fn udp_payload(packet: &[u8]) -> Option<usize> {
    Some(packet.len() - udp_at(packet)? - UDP_HEADER)
}

/// The ports of a UDP packet: from, to.
pub(super) fn udp_ports(packet: &[u8]) -> Option<(u16, u16)> {
    let udp = udp_at(packet)?;
    let at = |at: usize| u16::from_be_bytes([packet[udp + at], packet[udp + at + 1]]);
    Some((at(0), at(2)))
}

/// Gives a UDP packet other ports, and takes its checksum off.
pub(super) fn set_udp_ports(packet: &mut [u8], from: u16, to: u16) {
    let Some(udp) = udp_at(packet) else { return };
    packet[udp..udp + 2].copy_from_slice(&from.to_be_bytes());
    packet[udp + 2..udp + 4].copy_from_slice(&to.to_be_bytes());
    packet[udp + CHECKSUM_AT..udp + CHECKSUM_AT + 2].fill(0);
}

/// Flips a bit in the middle of the content. A UDP checksum is taken off (RFC 768 allows to send without), so that not the
/// kernel but the application has to notice.
pub(super) fn corrupt(packet: &mut [u8]) {
    let from = match udp_at(packet) {
        Some(udp) => {
            packet[udp + CHECKSUM_AT..udp + CHECKSUM_AT + 2].fill(0);
            udp + UDP_HEADER
        }
        None => 20,
    };
    corrupt_payload(packet.get_mut(from..).unwrap_or_default());
}

/// Flips a bit in the middle.
pub(super) fn corrupt_payload(payload: &mut [u8]) {
    let middle = payload.len() / 2;
    if let Some(byte) = payload.get_mut(middle) {
        *byte ^= 0x10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp(payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, UDP, 0, 0, 10, 77, 0, 1, 10, 77, 0, 2];
        packet.extend([1, 2, 3, 4, 0, 0, 9, 9]);
        packet.extend(payload);
        packet
    }

    #[test]
    fn a_packet_is_read_and_corrupted() {
        let mut packet = udp(b"hello");
        assert_eq!(addresses(&packet), Some(([10, 77, 0, 1].into(), [10, 77, 0, 2].into())));
        assert_eq!(udp_payload(&packet), Some(5));
        assert_eq!(udp_ports(&packet), Some((0x0102, 0x0304)));
        set_udp_ports(&mut packet, 7, 8);
        assert_eq!(udp_ports(&packet), Some((7, 8)));
        corrupt(&mut packet);
        assert_eq!(&packet[26..28], &[0, 0]);
        assert_ne!(&packet[28..], b"hello");
    }

    #[test]
    fn what_is_no_packet_is_left_alone() {
        for bytes in [&[][..], &[0x60; 40], &[0x45; 10]] {
            assert_eq!(addresses(bytes), None);
            corrupt(&mut bytes.to_vec());
        }
    }
}
