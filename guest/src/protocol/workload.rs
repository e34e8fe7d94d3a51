//! What the guest is told to do, typed.

use core::fmt;
use core::net::Ipv4Addr;
use core::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// An IPv4 address with the length of its network prefix, written `10.0.0.2/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The guest's own address.
    pub ip: Ipv4Addr,
    /// Bits of the network prefix, 0 to 32.
    pub prefix: u8,
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.ip, self.prefix)
    }
}

/// The text is not an IPv4 address with a prefix length of at most 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidAddress;

impl fmt::Display for InvalidAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("expected an IPv4 address with its prefix length, as in 10.0.0.2/24")
    }
}

impl core::error::Error for InvalidAddress {}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let (ip, prefix) = text.split_once('/').ok_or(InvalidAddress)?;
        let ip = ip.parse().map_err(|_| InvalidAddress)?;
        match prefix.parse() {
            Ok(prefix) if prefix <= 32 => Ok(Self { ip, prefix }),
            _ => Err(InvalidAddress),
        }
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Address;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an IPv4 address with its prefix length, as in \"10.0.0.2/24\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Address, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

/// Everything the guest can be told at boot; its `Display` form is the command line. Rates and sizes may be changed later
/// over the network ([`super::message::Settings`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Workload {
    /// Address of the first network device; without one the guest has no network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<Address>,
    /// Where packets for other networks go.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<Ipv4Addr>,
    /// Working set of the memory sweeper in MiB. It is cut to the memory there is.
    pub sweep_mib: u32,
    /// Rate of the sweeper in MiB/s, counting 4 KiB for each page it touches; 0 stops it.
    pub sweep_mib_per_second: u32,
    /// How much of the first disk is written over and over, in MiB from its start. It is cut to the disk's size.
    pub disk_mib: u32,
    /// Rate of the disk writer in MiB/s; 0 stops it. What it reads back to verify comes on top.
    pub disk_mib_per_second: u32,
    /// Share of one vCPU spent on arithmetic, 0 to 100 per cent.
    pub cpu_percent: u8,
    /// Memory filled with non-zero data at boot, in MiB, outside the sweeper's area. It is cut to the memory there is.
    pub fill_mib: u32,
    /// Memory that comes and goes, in MiB: taken from what is free, filled, compared after a while, and let go.
    pub churn_mib: u32,
    /// Rate at which it is filled, in MiB/s; 0 lets all of it go.
    pub churn_mib_per_second: u32,
    /// Time between two heartbeats in milliseconds, at least 1.
    pub heartbeat_ms: u32,
}

/// Most of a size or rate that can be asked for (1 TiB, 1 TiB/s): a bound for arithmetic, far above any machine.
pub const MIB_MAX: u32 = 1 << 20;

/// Longest time between two heartbeats that can be asked for, in milliseconds.
pub const HEARTBEAT_MS_MAX: u32 = 60_000;

impl Default for Workload {
    fn default() -> Self {
        Self {
            ip: None,
            gateway: None,
            sweep_mib: 0,
            sweep_mib_per_second: 0,
            disk_mib: 0,
            disk_mib_per_second: 0,
            cpu_percent: 0,
            fill_mib: 0,
            churn_mib: 0,
            churn_mib_per_second: 0,
            heartbeat_ms: 100,
        }
    }
}

impl Workload {
    /// Cuts every field to the range that its documentation states.
    pub fn clamp(&mut self) {
        for mib in [
            &mut self.sweep_mib,
            &mut self.sweep_mib_per_second,
            &mut self.disk_mib,
            &mut self.disk_mib_per_second,
            &mut self.fill_mib,
            &mut self.churn_mib,
            &mut self.churn_mib_per_second,
        ] {
            *mib = (*mib).min(MIB_MAX);
        }
        self.cpu_percent = self.cpu_percent.min(100);
        self.heartbeat_ms = self.heartbeat_ms.clamp(1, HEARTBEAT_MS_MAX);
    }
}

/// The words of the command line, in a fixed order.
impl fmt::Display for Workload {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.ip {
            write!(formatter, "ip={address} ")?;
        }
        if let Some(gateway) = self.gateway {
            write!(formatter, "gw={gateway} ")?;
        }
        write!(
            formatter,
            "sweep={}:{} disk={}:{} cpu={} fill={} hb={}",
            self.sweep_mib,
            self.sweep_mib_per_second,
            self.disk_mib,
            self.disk_mib_per_second,
            self.cpu_percent,
            self.fill_mib,
            self.heartbeat_ms
        )?;
        if (self.churn_mib, self.churn_mib_per_second) != (0, 0) {
            write!(formatter, " churn={}:{}", self.churn_mib, self.churn_mib_per_second)?;
        }
        Ok(())
    }
}
