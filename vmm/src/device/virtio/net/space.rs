//! Configuration space (virtio 1.2, section 5.1.4).

/// Offset of the link status in the configuration space (section 5.1.4).
pub const CONFIG_STATUS: usize = 6;
/// The link is up.
const LINK_UP: u8 = 1;
/// In the same place: the guest is asked to announce itself.
pub const ANNOUNCE: u8 = 2;

/// As it is at first.
pub fn config_space(mac: [u8; 6]) -> Vec<u8> {
    let mut space = mac.to_vec();
    space.extend([LINK_UP, 0]);
    // One pair of queues.
    space.extend([1, 0]);
    space
}
