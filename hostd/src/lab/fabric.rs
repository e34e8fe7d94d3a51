//! The network that joins the hosts: a bridge in a namespace of its own, with one cable (a veth pair) to each host and one
//! to the observer.
//!
//! ```text
//!  namespace a1          namespace fabric                namespace b1
//!  tap─┐                ┌───────────────┐                 ┌─tap
//!  tap─┴─br0──up0 ══════╪═ a1       b1 ═╪══════ up0──br0──┴─tap
//!                       │    bridge     │
//!                       │   observer    │
//!                       └──────╫────────┘
//!                        eth0 (namespace observer)
//! ```

use std::net::Ipv4Addr;

use super::error::LabResult;
use super::namespace::{Namespace, batch};

/// Bridge in a host's namespace that the taps of its machines are attached to.
pub const HOST_BRIDGE: &str = "br0";

/// Length of the network part of all addresses of a lab.
pub const PREFIX_LENGTH: u8 = 16;

/// The bridge between the hosts.
#[derive(Debug)]
pub struct Fabric {
    namespace: Namespace,
}

impl Fabric {
    /// Makes the namespace and the bridge in it.
    ///
    /// # Errors
    /// When `ip` fails.
    pub(crate) fn create(name: &str) -> LabResult<Self> {
        let namespace = Namespace::create(name)?;
        namespace.batch(&bridge_lines("fabric", None))?;
        Ok(Self { namespace })
    }

    /// Plugs a host in: its `br0` with `address` on it, and the cable.
    pub(crate) fn attach_host(&self, host: &Namespace, port: &str, address: Ipv4Addr) -> LabResult<()> {
        self.cable(host, "up0", port)?;
        // With an address of its own the bridge keeps it when taps come and go; else it takes the lowest one of its ports.
        let mut lines = bridge_lines(HOST_BRIDGE, Some(mac(address)));
        lines.push(format!("addr add {address}/{PREFIX_LENGTH} dev {HOST_BRIDGE}"));
        lines.push(format!("link set dev up0 master {HOST_BRIDGE}"));
        lines.push("link set dev up0 up".to_owned());
        host.batch(&lines)
    }

    /// Plugs in somebody who is not a host: `eth0` with an address.
    pub(crate) fn attach_plain(&self, namespace: &Namespace, port: &str, address: Ipv4Addr) -> LabResult<()> {
        self.cable(namespace, "eth0", port)?;
        namespace.batch(&[
            format!("link set dev eth0 address {}", mac(address)),
            format!("addr add {address}/{PREFIX_LENGTH} dev eth0"),
            "link set dev eth0 up".to_owned(),
        ])
    }

    fn cable(&self, namespace: &Namespace, device: &str, port: &str) -> LabResult<()> {
        let (inside, fabric) = (namespace.name(), self.namespace.name());
        batch(&[], &[format!("link add name {device} netns {inside} type veth peer name {port} netns {fabric}")])?;
        self.namespace.batch(&[format!("link set dev {port} master fabric"), format!("link set dev {port} up")])
    }

    /// Pulls a host's cable out, or plugs it in again.
    ///
    /// # Errors
    /// When there is no such port.
    pub fn set_link(&self, port: &str, up: bool) -> LabResult<()> {
        self.namespace.batch(&[format!("link set dev {port} {}", if up { "up" } else { "down" })])
    }

    /// Limits what can be sent **to** a host, in bytes a second; `None` lifts the limit.
    ///
    /// # Errors
    /// When `tc` fails.
    pub fn shape(&self, port: &str, bytes_per_second: Option<u64>) -> LabResult<()> {
        let Some(rate) = bytes_per_second else { return self.namespace.tc(&format!("qdisc del dev {port} root")) };
        // A bucket of 10 ms, and never less than one segmentation-offload frame, which could not pass at all.
        let burst = (rate / 100).max(128 * 1024);
        self.namespace.tc(&format!("qdisc replace dev {port} root tbf rate {rate}bps burst {burst} latency 50ms"))
    }

    /// Its namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }
}

fn bridge_lines(name: &str, mac: Option<String>) -> Vec<String> {
    let address = mac.map(|mac| format!(" address {mac}")).unwrap_or_default();
    vec![
        // No spanning tree and no snooping: a new port forwards at once.
        format!("link add name {name}{address} type bridge forward_delay 0 stp_state 0 mcast_snooping 0"),
        format!("link set dev {name} up"),
    ]
}

/// A locally administered MAC address made from an IPv4 address.
fn mac(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("02:fe:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}
