//! Checksums and segmentation, left to the kernel or not.

use std::os::fd::AsRawFd;

use super::{BASIC, BUFFER_BYTES, MAC, RX, Rig, in_namespace, ip};
use crate::device::virtio::net::feature;
use crate::device::virtio::testing::DATA;

#[test]
fn checksums_are_left_out_only_for_a_driver_that_agreed() {
    in_namespace(|| {
        for agreed in [true, false] {
            let mut rig = Rig::new(BASIC | if agreed { feature::GUEST_CSUM } else { 0 });
            ip("addr add 10.77.0.1/24 dev tap0");
            ip("neigh replace 10.77.0.2 lladdr 02:00:00:00:00:05 dev tap0");
            rig.offer(20);
            let socket = std::net::UdpSocket::bind("10.77.0.1:0").unwrap();
            socket.send_to(b"checksum", "10.77.0.2:7").unwrap();
            let (head, length) = rig.driver.wait_used(RX);
            let at = DATA + u64::from(head) * BUFFER_BYTES;
            assert_eq!(length, 12 + 14 + 20 + 8 + 8);
            let needs_checksum = rig.driver.get(at, 1)[0] & 1 == 1;
            assert_eq!(needs_checksum, agreed);
            drop(rig);
            ip("link del tap0");
        }
    });
}

/// A TCP segment of `payload` bytes, with the header that asks the kernel to cut it into pieces of 1000 (virtio 1.2, 5.1.6).
fn long_segment(payload: usize) -> Vec<u8> {
    let mut frame = vec![1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0];
    frame.extend([0xff; 6]);
    frame.extend(MAC);
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((40 + payload as u16).to_be_bytes());
    frame.extend([0, 1, 0, 0, 64, 6, 0, 0, 10, 77, 0, 1, 10, 77, 0, 2]);
    frame.extend([0x30, 0x39, 0, 7, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend((0..payload).map(|at| (at / 7) as u8));
    frame
}

#[test]
fn long_segments_arrive_whole_only_for_a_driver_that_agreed() {
    in_namespace(|| {
        let whole = feature::GUEST_CSUM | feature::GUEST_TSO4;
        for features in [whole, 0] {
            let mut rig = Rig::new(BASIC | feature::MRG_RXBUF | features);
            ip("addr add 10.77.0.1/24 dev tap0");
            let on = 1i32;
            // SAFETY: the option is an int (packet(7)).
            let result = unsafe {
                let value = (&raw const on).cast();
                libc::setsockopt(rig.wire.0.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_VNET_HDR, value, 4)
            };
            assert_eq!(result, 0);
            rig.offer(100);
            let sent = long_segment(20_000);
            rig.wire.send(&sent);
            let mut payload: Vec<u8> = Vec::new();
            let mut frames = 0;
            while payload.len() < 20_000 {
                let (head, mut length) = rig.driver.wait_used(RX);
                let mut at = DATA + u64::from(head) * BUFFER_BYTES;
                let header = rig.driver.get(at, 12);
                assert_eq!(header[1], u8::from(features != 0), "gso_type");
                let mut frame = rig.driver.get(at + 12, length as usize - 12);
                for _ in 1..header[10] {
                    let head;
                    (head, length) = rig.driver.wait_used(RX);
                    at = DATA + u64::from(head) * BUFFER_BYTES;
                    frame.extend(rig.driver.get(at, length as usize));
                }
                payload.extend(&frame[54..]);
                frames += 1;
            }
            assert_eq!(frames, if features == whole { 1 } else { 20 });
            assert!(payload == sent[64..]);
            drop(rig);
            ip("link del tap0");
        }
    });
}
