//! Names: they become folders, sockets and interface names, so they are checked before anything is made of them.

use crate::digest::{hex, sha256};

/// Whether `name` can name a machine: 1 to 64 letters, digits, `-` and `_`, the first a letter or digit.
pub fn machine_ok(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
}

/// Whether `id` can name a disk or a network card: like a machine's name, at most 32.
pub fn device_ok(id: &str) -> bool {
    id.len() <= 32 && machine_ok(id)
}

/// Whether `id` can be the id of a migration, plan or event: `kind-` and hexadecimal digits.
pub fn id_ok(id: &str) -> bool {
    id.len() <= 64 && machine_ok(id)
}

/// A MAC address as six bytes; `None` unless it is `xx:xx:xx:xx:xx:xx`, unicast and not all zeroes.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part =
            parts.next().filter(|part| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && bytes[0] & 1 == 0 && bytes != [0; 6]).then_some(bytes)
}

/// A locally administered unicast MAC address that is the same for the same machine and card everywhere.
pub fn derive_mac(machine: &str, card: &str) -> String {
    let digest = sha256(format!("mac/{machine}/{card}").as_bytes());
    format!("02:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", digest[0], digest[1], digest[2], digest[3], digest[4])
}

/// Name of the tap of a card: 14 characters (an interface name takes 15), different for each host, machine and card.
pub fn tap_name(host: &str, machine: &str, card: &str) -> String {
    let digest = sha256(format!("tap/{host}/{machine}/{card}").as_bytes());
    format!("hr{}", hex(&digest[..6]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_folder() {
        for good in ["vm1", "a", "Web_1-x", &"x".repeat(64)] {
            assert!(machine_ok(good), "{good}");
        }
        for bad in ["", ".", "..", "../x", "a/b", "a\0", "-a", "_a", "ä", "a b", &"x".repeat(65)] {
            assert!(!machine_ok(bad), "{bad}");
        }
    }

    #[test]
    fn mac_addresses_are_unicast() {
        assert_eq!(parse_mac("02:00:00:00:00:05"), Some([2, 0, 0, 0, 0, 5]));
        for bad in
            ["", "02:00:00:00:00", "02:00:00:00:00:05:06", "01:00:00:00:00:05", "2:0:0:0:0:5", "02:00:00:00:00:+5"]
        {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
        assert!(parse_mac(&derive_mac("vm1", "net0")).is_some());
        assert_ne!(derive_mac("vm1", "net0"), derive_mac("vm1", "net1"));
    }

    #[test]
    fn taps_of_different_hosts_differ() {
        assert_eq!(tap_name("a1", "vm1", "net0").len(), 14);
        assert_ne!(tap_name("a1", "vm1", "net0"), tap_name("a2", "vm1", "net0"));
    }
}
