//! What another kernel makes of an announcement: its tables of neighbours follow the guest.

use super::*;

const ELSEWHERE: &str = "02:00:00:00:00:99";
const HERE: &str = "02:00:00:00:00:05";

/// Asks for a neighbour, so that the card learns the guest's address. Its checksum is wrong: the kernel must not learn from it.
fn solicitation(address: Ipv6Addr) -> Vec<u8> {
    let mut frame = vec![0x33, 0x33, 0xff, 0, 0, 1];
    frame.extend(MAC);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255]);
    frame.extend(address.octets());
    frame.extend("ff02::1:ff00:1".parse::<Ipv6Addr>().unwrap().octets());
    frame.extend([135, 0, 0, 0, 0, 0, 0, 0]);
    frame.extend("fd00::1".parse::<Ipv6Addr>().unwrap().octets());
    frame.extend([1, 1]);
    frame.extend(MAC);
    frame
}

/// What the kernel knows of a neighbour.
fn known(address: &str) -> String {
    let output = Command::new("ip").args(["neigh", "show", address, "dev", "tap0"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_kernel_that_knew_the_guest_elsewhere_finds_it_here() {
    in_namespace(|| {
        let mut rig = Rig::new(BASIC);
        let addresses = ["10.0.0.2", "fd00::5"];
        std::fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "0").expect("IPv6 in this kernel");
        // Otherwise what the kernel has just learned is not replaced for a second.
        std::fs::write("/proc/sys/net/ipv4/neigh/tap0/locktime", "0").unwrap();
        ip("addr add 10.0.0.1/24 dev tap0");
        ip("addr add fd00::1/64 dev tap0 nodad");
        rig.transmit(&arp([10, 0, 0, 2]));
        rig.transmit(&solicitation("fd00::5".parse().unwrap()));
        for address in addresses {
            ip(&format!("neigh replace {address} lladdr {ELSEWHERE} dev tap0 nud stale"));
            assert!(known(address).contains(ELSEWHERE), "{}", known(address));
        }
        rig.net.announce();
        for address in addresses {
            let end = Instant::now() + Duration::from_secs(10);
            while !known(address).contains(HERE) {
                assert!(Instant::now() < end, "{address} is still elsewhere: {}", known(address));
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    });
}
