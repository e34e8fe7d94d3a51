//! Where a machine of a drained host goes.

use std::collections::BTreeMap;

use crate::api::types::{HostSummary, MachineSummary};

/// A machine that uses less than this is let in whatever the load is.
const IDLE_CORES: f64 = 0.05;

/// A host that may take machines, by what it last told of itself.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// What it told.
    pub(super) host: HostSummary,
    /// It is of the pool of the drained host.
    pub(super) own_pool: bool,
    /// Memory of machines that are on their way to it and that it does not count yet, in MiB.
    pub(super) promised_mib: f64,
}

impl Target {
    /// What speaks against it may be gone with the next answer: it is only away for a moment (or this daemon has just begun to ask
    /// its peers), or it has not told yet that the machine has left it.
    pub(super) fn may_change(&self, machine: &str) -> bool {
        !self.host.live || self.host.machines.iter().any(|there| there.name == machine)
    }

    /// How full it would be with the machine, as the larger share of memory and processors; or why it cannot take it.
    fn fullness(&self, machine: &MachineSummary) -> Result<f64, String> {
        if !self.host.live {
            return Err("does not answer".to_owned());
        }
        if self.host.draining {
            return Err("is being drained itself".to_owned());
        }
        if self.host.machines.iter().any(|there| there.name == machine.name) {
            return Err(format!("has a machine `{}` already", machine.name));
        }
        let capacity = &self.host.capacity;
        let used: u64 = self.host.machines.iter().map(|there| there.memory_mib).sum();
        let free = capacity.memory_mib - used as f64 - self.promised_mib;
        if machine.memory_mib as f64 > free {
            return Err(format!("has {:.0} MiB of memory free and it needs {}", free.max(0.0), machine.memory_mib));
        }
        let memory = 1.0 - (free - machine.memory_mib as f64) / capacity.memory_mib.max(1.0);
        let needs = machine.usage.map_or(0.0, |usage| usage.cpu_demand_cores.max(usage.cpu_cores));
        let load = self.host.usage.map_or(0.0, |usage| usage.cpu_demand_cores.max(usage.cpu_cores));
        if needs > IDLE_CORES && load + needs > capacity.cpu_cores {
            let free = (capacity.cpu_cores - load).max(0.0);
            return Err(format!("has {free:.2} cores free and it uses {needs:.2}"));
        }
        Ok(memory.max((load + needs) / capacity.cpu_cores.max(0.01)))
    }
}

/// The host that is least full with the machine, of the own pool if one of it has room; or why none takes it. `refused` has the
/// hosts that have refused it, in their words.
pub(super) fn choose(
    machine: &MachineSummary,
    targets: &[Target],
    refused: &BTreeMap<String, String>,
) -> Result<String, String> {
    let mut best: Option<(bool, f64, &str)> = None;
    let mut reasons = Vec::new();
    for target in targets {
        let name = target.host.host.as_str();
        let full = match refused.get(name) {
            Some(reason) => Err(reason.clone()),
            None => target.fullness(machine).map_err(|reason| format!("host `{name}` {reason}")),
        };
        match full {
            Ok(full) => {
                let better = best.is_none_or(|(own, least, _)| (!target.own_pool, full) < (!own, least));
                if better {
                    best = Some((target.own_pool, full, name));
                }
            }
            Err(reason) => reasons.push(reason),
        }
    }
    match best {
        Some((.., name)) => Ok(name.to_owned()),
        None if reasons.is_empty() => {
            Err("no host may take it: give hosts with `--to`, or peers in the configuration".to_owned())
        }
        None => Err(reasons.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::{Capacity, MachineStatus, MigrationLimits, Usage};

    fn machine(name: &str, memory_mib: u64, cores: f64) -> MachineSummary {
        MachineSummary {
            name: name.into(),
            status: MachineStatus::Running,
            vcpus: 1,
            memory_mib,
            disk_bytes: 0,
            disk_allocated_bytes: 0,
            limits: MigrationLimits::default(),
            usage: Some(Usage { cpu_cores: cores, cpu_demand_cores: cores, ..Usage::default() }),
            dirty: None,
        }
    }

    fn target(name: &str, own_pool: bool, memory_mib: f64, load: f64) -> Target {
        let host = HostSummary {
            host: name.into(),
            live: true,
            draining: false,
            capacity: Capacity { cpu_cores: 2.0, memory_mib, ..Capacity::default() },
            usage: Some(Usage { cpu_cores: load, cpu_demand_cores: load, ..Usage::default() }),
            machines: vec![machine("there", 100, load)],
            sampled_unix_ms: 0,
        };
        Target { host, own_pool, promised_mib: 0.0 }
    }

    fn chosen(machine: &MachineSummary, targets: &[Target]) -> Result<String, String> {
        choose(machine, targets, &BTreeMap::new())
    }

    #[test]
    fn the_emptiest_host_of_the_own_pool_is_preferred() {
        let vm = machine("vm", 100, 0.5);
        let (near, full) = (target("a2", true, 1000.0, 0.5), target("a3", true, 1000.0, 1.0));
        let far = target("b1", false, 8000.0, 0.0);
        assert_eq!(chosen(&vm, &[full.clone(), near, far.clone()]).unwrap(), "a2");
        assert_eq!(chosen(&machine("vm", 100, 1.5), &[full, far]).unwrap(), "b1", "the own pool has no room");
    }

    #[test]
    fn what_is_promised_is_not_free() {
        let mut only = target("a2", true, 300.0, 0.0);
        assert_eq!(chosen(&machine("vm", 200, 0.0), std::slice::from_ref(&only)).unwrap(), "a2");
        only.promised_mib = 1.0;
        let why = chosen(&machine("vm", 200, 0.0), &[only]).unwrap_err();
        assert_eq!(why, "host `a2` has 199 MiB of memory free and it needs 200");
    }

    #[test]
    fn every_host_says_why_it_is_not_chosen() {
        let (mut gone, mut closed, same) =
            (target("a2", true, 900.0, 0.0), target("a3", true, 900.0, 0.0), target("b1", false, 900.0, 0.0));
        (gone.host.live, closed.host.draining) = (false, true);
        let refused = BTreeMap::from([("b2".to_owned(), "host `b2` refused: no".to_owned())]);
        let targets = [gone, closed, same, target("b2", false, 900.0, 0.0)];
        let why = choose(&machine("there", 1, 0.0), &targets, &refused).unwrap_err();
        for part in
            ["`a2` does not answer", "`a3` is being drained", "`b1` has a machine `there` already", "`b2` refused"]
        {
            assert!(why.contains(part), "{why}");
        }
    }
}
