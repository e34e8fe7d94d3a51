//! Where both sides run: two hosts of a lab with a tap each, and an observer.

use std::net::Ipv4Addr;

use anyhow::Result;
use headroom_guest::Workload;
use hostd::lab::{HostSpec, Lab};

use crate::scenario::Scenario;

/// The tap on either host.
pub const TAP: &str = "bench0";

/// The guest's MAC address.
pub const GUEST_MAC: &str = "02:00:00:00:00:77";

/// Number of the machine among the addresses of the lab.
const NUMBER: u16 = 0;

/// The guest's address.
pub fn guest_address() -> Ipv4Addr {
    Lab::machine_address(NUMBER)
}

/// The scenario's workload at that address.
pub fn workload(scenario: Scenario) -> Workload {
    let ip = format!("{}/16", guest_address()).parse().ok();
    Workload { ip, ..scenario.workload() }
}

/// Makes the hosts and their taps.
pub fn build() -> Result<Lab> {
    let lab = Lab::new(&[HostSpec::new("host1", "one"), HostSpec::new("host2", "two")])?;
    for host in lab.hosts() {
        host.namespace().batch(&[
            format!("tuntap add dev {TAP} mode tap vnet_hdr"),
            format!("link set {TAP} master {}", hostd::lab::fabric::HOST_BRIDGE),
            format!("link set {TAP} up"),
        ])?;
    }
    Ok(lab)
}
