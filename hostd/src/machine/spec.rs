//! Checks of what an operator or a peer asks for, before anything is made.

use std::collections::HashSet;

use migration::throttle::PERCENT_MAX;
use vmm::disk::SECTOR_BYTES;

use super::name::{derive_mac, device_ok, machine_ok, parse_mac};
use super::{MachineError, MachineRecord};
use crate::api::types::{CreateMachine, Disk, DiskSize, MigrationLimits, Network, NewDisk, NewNetwork, StopMachine};

/// Longest kernel command line, in bytes (x86 Linux: `COMMAND_LINE_SIZE` 2048), less what the VMM appends.
const CMDLINE_MAX: usize = 1536;

/// Largest disk in MiB: 16 TiB.
const DISK_MIB_MAX: u64 = 16 << 20;

/// Largest number of disks, of cards and of probes.
const DEVICES_MAX: usize = 8;

/// Checks the whole request.
///
/// # Errors
///
/// [`MachineError::Invalid`] with the first mistake, where it is, and what to do.
pub fn check(spec: &CreateMachine) -> Result<(), MachineError> {
    ensure(machine_ok(&spec.name), || {
        format!(
            "name `{}`: use 1 to 64 letters, digits, `-` and `_`, the first a letter or digit",
            spec.name.escape_debug()
        )
    })?;
    ensure((1..=64).contains(&spec.vcpus), || format!("vcpus {}: use 1 to 64", spec.vcpus))?;
    ensure((16..=1_048_576).contains(&spec.memory_mib), || {
        format!("memory_mib {}: use 16 to 1048576", spec.memory_mib)
    })?;
    ensure(spec.cmdline.len() <= CMDLINE_MAX, || {
        format!("cmdline has {} bytes: use at most {CMDLINE_MAX}", spec.cmdline.len())
    })?;
    ensure(spec.cmdline.bytes().all(|byte| (b' '..=b'~').contains(&byte)), || {
        "cmdline has characters that are not printable ASCII: remove them".to_owned()
    })?;
    ensure(spec.probes.len() <= DEVICES_MAX, || format!("{} probes: use at most {DEVICES_MAX}", spec.probes.len()))?;
    disks(&spec.disks)?;
    networks(&spec.networks)?;
    limits(&spec.limits)
}

/// Checks a machine that a peer wants to send: what it says becomes folders, files and interfaces here.
///
/// # Errors
///
/// As [`check`].
pub fn check_arrival(record: &MachineRecord) -> Result<(), MachineError> {
    for disk in &record.disks {
        ensure((1..=DISK_MIB_MAX << 20).contains(&disk.bytes), || {
            format!(
                "disk `{}` has {} bytes: at most {DISK_MIB_MAX} MiB can be received",
                disk.id.escape_debug(),
                disk.bytes
            )
        })?;
    }
    let disk = |disk: &Disk| NewDisk {
        id: disk.id.clone(),
        size_mib: (!disk.shared).then(|| disk.bytes.div_ceil(1 << 20)),
        path: disk.shared.then(|| disk.path.clone()),
        read_only: disk.read_only,
        shared: disk.shared,
    };
    let network = |network: &Network| NewNetwork { id: network.id.clone(), mac: Some(network.mac.clone()) };
    check(&CreateMachine {
        name: record.name.clone(),
        vcpus: record.vcpus,
        memory_mib: record.memory_mib,
        kernel: record.kernel.clone(),
        initrd: None,
        cmdline: record.cmdline.clone(),
        disks: record.disks.iter().map(disk).collect(),
        networks: record.networks.iter().map(network).collect(),
        balloon: record.balloon,
        probes: record.probes.clone(),
        limits: record.limits.clone(),
    })
}

/// Checks the size that a disk is to have.
///
/// # Errors
///
/// As [`check`].
pub fn disk_size(size: &DiskSize) -> Result<(), MachineError> {
    let sectors = size.bytes.is_multiple_of(SECTOR_BYTES);
    ensure(sectors && (1..=DISK_MIB_MAX << 20).contains(&size.bytes), || {
        format!(
            "disk `{}`: bytes {}: use a multiple of {SECTOR_BYTES}, at most {DISK_MIB_MAX} MiB",
            size.id.escape_debug(),
            size.bytes
        )
    })
}

/// Checks how a machine is to be stopped.
///
/// # Errors
///
/// As [`check`].
pub fn stop(how: &StopMachine) -> Result<(), MachineError> {
    ensure((1..=3600).contains(&how.timeout_s), || format!("timeout_s {}: use 1 to 3600", how.timeout_s))
}

/// Checks the limits of a migration.
///
/// # Errors
///
/// As [`check`].
pub fn limits(limits: &MigrationLimits) -> Result<(), MachineError> {
    ensure((1..=16).contains(&limits.streams), || format!("limits.streams {}: use 1 to 16", limits.streams))?;
    ensure(limits.downtime_ms >= 1, || "limits.downtime_ms 0: allow at least 1 ms".to_owned())?;
    ensure(limits.timeout_s >= 1, || "limits.timeout_s 0: allow at least 1 s".to_owned())?;
    ensure(limits.max_rounds >= 1, || "limits.max_rounds 0: allow at least 1 round".to_owned())?;
    ensure(limits.throttle_max_percent <= PERCENT_MAX, || {
        format!("limits.throttle_max_percent {}: use 0 (off) to {PERCENT_MAX}", limits.throttle_max_percent)
    })?;
    bandwidth(limits.bandwidth_bytes_per_second).map_err(|text| MachineError::Invalid(format!("limits.{text}")))
}

/// Whether a limit of bytes per second can be worked with.
///
/// # Errors
///
/// What is wrong with it.
pub fn bandwidth(limit: Option<u64>) -> Result<(), &'static str> {
    match limit {
        Some(..0x10_0000) => Err("bandwidth_bytes_per_second: allow at least 1 MiB/s, or leave it out"),
        _ => Ok(()),
    }
}

/// Checks a disk that a machine with disks `there` is to get.
///
/// # Errors
///
/// As [`check`].
pub fn another_disk(new: &NewDisk, there: &[Disk]) -> Result<(), MachineError> {
    ensure(there.len() < DEVICES_MAX, || format!("it has {} disks: more are not possible", there.len()))?;
    disk(new, &mut there.iter().map(|disk| disk.id.as_str()).collect())
}

fn disks(disks: &[NewDisk]) -> Result<(), MachineError> {
    ensure(disks.len() <= DEVICES_MAX, || format!("{} disks: use at most {DEVICES_MAX}", disks.len()))?;
    let mut ids = HashSet::new();
    disks.iter().try_for_each(|new| disk(new, &mut ids))
}

fn disk<'a>(disk: &'a NewDisk, ids: &mut HashSet<&'a str>) -> Result<(), MachineError> {
    let id = &disk.id;
    device_id("disk", id, ids)?;
    match (disk.size_mib, &disk.path) {
        (Some(size), None) => ensure((1..=DISK_MIB_MAX).contains(&size), || {
            format!("disk `{id}`: size_mib {size}: use 1 to {DISK_MIB_MAX}")
        })?,
        (None, Some(path)) => ensure(path.is_absolute(), || {
            format!("disk `{id}`: path `{}` is not absolute: write it from `/` on", path.display())
        })?,
        _ => return Err(MachineError::Invalid(format!("disk `{id}`: give either size_mib or path"))),
    }
    ensure(!disk.shared || disk.path.is_some(), || {
        format!("disk `{id}`: only an image that is there can be shared: give its path instead of size_mib")
    })
}

fn networks(networks: &[NewNetwork]) -> Result<(), MachineError> {
    ensure(networks.len() <= DEVICES_MAX, || format!("{} networks: use at most {DEVICES_MAX}", networks.len()))?;
    let mut ids = HashSet::new();
    for network in networks {
        device_id("network", &network.id, &mut ids)?;
        if let Some(mac) = &network.mac {
            ensure(parse_mac(mac).is_some(), || {
                format!(
                    "network `{}`: mac `{}`: use a unicast address such as 02:00:00:00:00:05",
                    network.id,
                    mac.escape_debug()
                )
            })?;
        }
    }
    Ok(())
}

fn device_id<'a>(kind: &str, id: &'a str, seen: &mut HashSet<&'a str>) -> Result<(), MachineError> {
    ensure(device_ok(id), || format!("{kind} id `{}`: use 1 to 32 letters, digits, `-` and `_`", id.escape_debug()))?;
    ensure(seen.insert(id), || format!("{kind} id `{id}` is there twice: ids are unique in a machine"))
}

fn ensure(ok: bool, message: impl FnOnce() -> String) -> Result<(), MachineError> {
    if ok { Ok(()) } else { Err(MachineError::Invalid(message())) }
}

/// The MAC address of a card: as given, or derived.
pub fn mac(machine: &str, network: &NewNetwork) -> String {
    network.mac.as_ref().map_or_else(|| derive_mac(machine, &network.id), |mac| mac.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(change: impl FnOnce(&mut serde_json::Value)) -> Result<(), String> {
        let mut json = serde_json::json!({"name": "vm1", "memory_mib": 64,
            "disks": [{"id": "disk0", "size_mib": 8}], "networks": [{"id": "net0"}]});
        change(&mut json);
        let spec: CreateMachine = serde_json::from_value(json).map_err(|error| error.to_string())?;
        check(&spec).map_err(|error| error.to_string())
    }

    #[test]
    fn each_mistake_has_its_own_words() {
        spec(|_| ()).unwrap();
        type Change = fn(&mut serde_json::Value);
        let cases: [(Change, &str); 12] = [
            (|json| json["name"] = "../etc".into(), "name `../etc`"),
            (|json| json["vcpus"] = 0.into(), "vcpus 0"),
            (|json| json["memory_mib"] = 1.into(), "memory_mib 1"),
            (|json| json["memory_gib"] = 1.into(), "unknown field"),
            (|json| json["cmdline"] = "a\nb".into(), "printable"),
            (|json| json["disks"][0]["path"] = "/x".into(), "either size_mib or path"),
            (|json| json["disks"][0] = serde_json::json!({"id": "d", "path": "x"}), "not absolute"),
            (|json| json["disks"][0]["size_mib"] = 0.into(), "size_mib 0"),
            (|json| json["disks"] = serde_json::json!([{"id":"d","size_mib":1},{"id":"d","size_mib":1}]), "twice"),
            (|json| json["networks"][0]["mac"] = "ff:ff:ff:ff:ff:ff".into(), "unicast"),
            (|json| json["limits"] = serde_json::json!({"streams": 0}), "limits.streams"),
            (|json| json["limits"] = serde_json::json!({"downtime": 5}), "unknown field"),
        ];
        for (change, expected) in cases {
            let error = spec(change).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }
}
