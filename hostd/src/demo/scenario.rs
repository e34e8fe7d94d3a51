//! What happens in the demo, and when: hosts, machines, their load over time, and the declared event.
//!
//! Only the load that the guests are told to make is invented. Which machine moves, when and where to is the planner's
//! decision.

use std::net::Ipv4Addr;
use std::time::Duration;

use headroom_guest::Workload;

use crate::api::types::{CreateMachine, EventTarget, KernelChoice, NewDisk, NewEvent, NewNetwork, ProbeSpec, Usage};
use crate::config::{HostConfig, PlannerConfig};
use crate::lab::{HostSpec, Lab};
use vmm::config::MigrationLimits;

/// Pool whose load grows.
pub const BUSY_POOL: &str = "a";

/// Rate of a planned migration in bytes a second: at full speed it would use up the quota of its host, and its guests would
/// feel that.
const BANDWIDTH: u64 = 64_000_000;

/// How often the daemons measure.
pub const SAMPLE: Duration = Duration::from_millis(500);

/// When the load begins to grow, in seconds.
const RAMP_START_S: f64 = 12.0;

/// When it has grown.
const RAMP_END_S: f64 = 40.0;

/// When the event is declared.
pub const DECLARE_S: f64 = 14.0;

/// When the event begins.
pub const EVENT_S: f64 = 46.0;

/// How long it lasts, in seconds.
const EVENT_DURATION_S: f64 = 30.0;

/// Load that the event adds to each machine of the busy pool, in per cent of a core.
const EVENT_PERCENT: u8 = 30;

/// When the demo ends: late enough to see what the event did.
pub const END_S: f64 = 58.0;

/// One machine of the demo.
#[derive(Clone, Debug, PartialEq)]
pub struct MachinePlan {
    /// Its name.
    pub name: &'static str,
    /// Host that it starts on.
    pub host: &'static str,
    /// Pool that it starts in.
    pub pool: &'static str,
    /// Its address.
    pub address: Ipv4Addr,
    /// RAM in MiB.
    memory_mib: u64,
    /// Processor load at the start and at the end of the ramp, in per cent of a core.
    load: (u8, u8),
}

/// Hosts of both pools. The quotas leave room for a migration and for an observer who asks 1,000 times a second.
pub fn hosts() -> [HostSpec; 3] {
    [
        HostSpec::new("a1", "a").with_cpu_cores(0.65).with_memory_mib(1024.0),
        HostSpec::new("a2", "a").with_cpu_cores(0.65).with_memory_mib(1024.0),
        HostSpec::new("b1", "b").with_cpu_cores(0.8).with_memory_mib(1536.0),
    ]
}

/// The machines: four in the busy pool, two in the other one.
pub fn machines() -> [MachinePlan; 6] {
    let plan = |number: u16, name, host, memory_mib, load| MachinePlan {
        name,
        host,
        pool: if host == "b1" { "b" } else { "a" },
        address: Lab::machine_address(number - 1),
        memory_mib,
        load,
    };
    [
        plan(1, "vm1", "a1", 192, (4, 11)),
        plan(2, "vm2", "a1", 256, (3, 9)),
        plan(3, "vm3", "a2", 256, (4, 11)),
        plan(4, "vm4", "a2", 192, (3, 9)),
        plan(5, "vm5", "b1", 192, (3, 3)),
        plan(6, "vm6", "b1", 192, (2, 2)),
    ]
}

impl MachinePlan {
    /// Processor load in per cent of a core that the guest is told to make `at_s` seconds after the start.
    pub fn cpu_percent(&self, at_s: f64) -> u8 {
        let (from, to) = (f64::from(self.load.0), f64::from(self.load.1));
        let grown = ((at_s - RAMP_START_S) / (RAMP_END_S - RAMP_START_S)).clamp(0.0, 1.0);
        let event = self.pool == BUSY_POOL && (EVENT_S..EVENT_S + EVENT_DURATION_S).contains(&at_s);
        let percent = from + (to - from) * grown + if event { f64::from(EVENT_PERCENT) } else { 0.0 };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=100")]
        let percent = percent.round().clamp(0.0, 100.0) as u8;
        percent
    }

    /// What the guest does from its boot: memory sweeper, disk writer and load.
    pub fn workload(&self) -> Workload {
        Workload {
            ip: Some(headroom_guest::Address { ip: self.address, prefix: crate::lab::fabric::PREFIX_LENGTH }),
            sweep_mib: 16,
            sweep_mib_per_second: 8,
            disk_mib: 16,
            disk_mib_per_second: 1,
            cpu_percent: self.cpu_percent(0.0),
            fill_mib: u32::try_from(self.memory_mib / 3).unwrap_or(64),
            ..Workload::default()
        }
    }

    /// The request to its host.
    pub fn request(&self) -> CreateMachine {
        CreateMachine {
            name: self.name.to_owned(),
            vcpus: 1,
            memory_mib: self.memory_mib,
            kernel: KernelChoice::Bundled,
            initrd: None,
            cmdline: self.workload().to_string(),
            disks: vec![NewDisk {
                id: "disk0".into(),
                size_mib: Some(64),
                path: None,
                read_only: false,
                shared: false,
            }],
            networks: vec![NewNetwork { id: "net0".into(), mac: None }],
            balloon: false,
            probes: vec![
                ProbeSpec::Ping(self.address.into()),
                ProbeSpec::TcpEcho((self.address, super::observer::ECHO_PORT).into()),
            ],
            limits: MigrationLimits::default(),
        }
    }
}

/// The event, declared at [`DECLARE_S`].
pub fn event() -> NewEvent {
    let machines = machines().iter().filter(|machine| machine.pool == BUSY_POOL).count();
    NewEvent {
        name: "evening campaign".to_owned(),
        target: EventTarget::Pool(BUSY_POOL.to_owned()),
        starts_unix_ms: None,
        starts_in_s: Some(EVENT_S - DECLARE_S),
        duration_s: EVENT_DURATION_S,
        repeats: None,
        adds: Usage { cpu_cores: f64::from(EVENT_PERCENT) / 100.0 * machines as f64, ..Usage::default() },
        confidence: 0.9,
    }
}

/// Adjusts a host's configuration to the pace of the demo: seconds where production has minutes.
pub fn adjust(config: &mut HostConfig) {
    config.sample_interval_ms = u64::try_from(SAMPLE.as_millis()).unwrap_or(500);
    config.planner = PlannerConfig {
        enabled: config.pool == BUSY_POOL,
        horizon_s: 30.0,
        start_score: 0.75,
        confirmations: 4,
        cooldown_s: 60.0,
        lead_s: 12.0,
        limits: Some(MigrationLimits { bandwidth_bytes_per_second: Some(BANDWIDTH), ..MigrationLimits::default() }),
        ..PlannerConfig::default()
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_of_the_busy_pool_grows_past_its_capacity_only_with_the_event() {
        let capacity: f64 =
            hosts().iter().filter(|host| host.pool == BUSY_POOL).filter_map(|host| host.cpu_cores).sum();
        let load = |at_s| {
            let busy = machines().into_iter().filter(|machine| machine.pool == BUSY_POOL);
            busy.map(|machine| f64::from(machine.cpu_percent(at_s)) / 100.0).sum::<f64>()
        };
        assert!(load(0.0) < load(EVENT_S - 1.0));
        assert!(load(EVENT_S - 1.0) < capacity);
        assert!(load(EVENT_S + 1.0) > load(EVENT_S - 1.0));
    }

    #[test]
    fn machines_have_names_and_addresses_of_their_own() {
        let machines = machines();
        let mut addresses: Vec<_> = machines.iter().map(|machine| machine.address).collect();
        addresses.dedup();
        assert_eq!(addresses.len(), machines.len());
        assert!(machines.iter().all(|machine| hosts().iter().any(|host| host.name == machine.host)));
    }

    #[test]
    fn the_event_is_declared_before_it_begins_and_seen_before_the_end() {
        const { assert!(DECLARE_S < EVENT_S && EVENT_S < END_S) };
        assert_eq!(event().starts_in_s, Some(EVENT_S - DECLARE_S));
    }
}
