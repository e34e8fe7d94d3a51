//! Mistakes in a configuration: one sentence each, with the field, the value, and what to do.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};

use super::RETRIES_MAX;
use super::{HostConfig, PlannerConfig};
use crate::security::access;

/// Longest path of a unix socket, in bytes (`sun_path` in unix(7), with its closing zero).
const SOCKET_PATH_MAX: usize = 107;

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Where, for example `peers[1].host`.
    pub field: String,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.field, self.message)
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: give an existing file with --config, or make one with `headroom init`", path.display())]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// It is not JSON of the right shape.
    #[error("the configuration {} is malformed at line {}, column {}", path.display(), source.line(), source.column())]
    Parse {
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// Its values do not make sense.
    #[error("the configuration {} has {} mistake(s):{}", path.display(), mistakes.len(), list(mistakes))]
    Invalid {
        /// File.
        path: PathBuf,
        /// All of them.
        mistakes: Vec<Mistake>,
    },
}

fn list(mistakes: &[Mistake]) -> String {
    mistakes.iter().map(|mistake| format!("\n  {mistake}")).collect()
}

/// Collects mistakes.
#[derive(Default)]
struct Findings(Vec<Mistake>);

impl Findings {
    fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(Mistake { field: field.into(), message: message.into() });
    }

    fn check(&mut self, ok: bool, field: &str, message: impl FnOnce() -> String) {
        if !ok {
            self.add(field, message());
        }
    }

    fn absolute(&mut self, field: &str, path: &Path) {
        self.check(path.is_absolute(), field, || {
            format!("`{}` is not an absolute path: write it from `/` on", path.display())
        });
    }

    fn range(&mut self, field: &str, value: f64, low: f64, high: f64) {
        self.check(value.is_finite() && (low..=high).contains(&value), field, || {
            format!("{value} is out of range: use {low} to {high}")
        });
    }
}

/// Whether `name` can be a host's name: it stands in a certificate and in URLs.
pub(crate) fn host_name_ok(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 64
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'))
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.ends_with(|last: char| last.is_ascii_alphanumeric())
}

/// Every mistake that can be seen without touching the system.
pub(super) fn mistakes(config: &HostConfig) -> Vec<Mistake> {
    let mut findings = Findings::default();
    names(config, &mut findings);
    paths(config, &mut findings);
    peers(config, &mut findings);
    capacity(config, &mut findings);
    planner(&config.planner, config.sample_interval_ms, &mut findings);
    for (index, rule) in config.access.iter().enumerate() {
        if let Err(error) = access::check_rule(rule) {
            findings.add(format!("access[{index}]"), error);
        }
    }
    findings.0
}

fn names(config: &HostConfig, findings: &mut Findings) {
    for (field, name) in [("host", &config.host), ("pool", &config.pool)] {
        findings.check(host_name_ok(name), field, || {
            format!(
                "`{name}` is not a name: use 1 to 64 letters, digits, `-` and `.`, with a letter or digit at both ends"
            )
        });
    }
    if let Some(bridge) = &config.bridge {
        let ok = (1..=15).contains(&bridge.len()) && bridge.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
        findings
            .check(ok, "bridge", || format!("`{bridge}` is not an interface name: use 1 to 15 printable characters"));
    }
}

fn paths(config: &HostConfig, findings: &mut Findings) {
    findings.absolute("run_dir", &config.run_dir);
    findings.absolute("state_dir", &config.state_dir);
    for folder in &config.shared_dirs {
        findings.absolute("shared_dirs", folder);
    }
    for folder in &config.image_dirs {
        findings.absolute("image_dirs", folder);
    }
    findings.absolute("socket", &config.socket);
    findings.absolute("tls.ca", &config.tls.ca);
    findings.absolute("tls.certificate", &config.tls.certificate);
    findings.absolute("tls.key", &config.tls.key);
    if let Some(vmm) = &config.vmm {
        findings.absolute("vmm", vmm);
    }
    let socket = config.socket.as_os_str().len();
    findings.check(socket <= SOCKET_PATH_MAX, "socket", || {
        format!("the path has {socket} bytes, and a unix socket takes {SOCKET_PATH_MAX}: choose a shorter one")
    });
    // The longest that hostd makes itself: RUN_DIR/machines/<64 characters>/api.sock.
    let longest = config.run_dir.as_os_str().len() + "/machines/".len() + "/api.sock".len();
    findings.check(longest + 16 <= SOCKET_PATH_MAX, "run_dir", || {
        format!(
            "`{}` is so long that the socket of a machine would not fit into {SOCKET_PATH_MAX} bytes: choose a shorter one",
            config.run_dir.display()
        )
    });
}

fn peers(config: &HostConfig, findings: &mut Findings) {
    let mut seen = HashSet::from([config.host.as_str()]);
    let mut addresses = HashSet::from([config.listen]);
    for (index, peer) in config.peers.iter().enumerate() {
        let field = format!("peers[{index}]");
        findings.check(host_name_ok(&peer.host), &format!("{field}.host"), || {
            format!("`{}` is not a host name: use 1 to 64 letters, digits, `-` and `.`", peer.host)
        });
        findings.check(host_name_ok(&peer.pool), &format!("{field}.pool"), || {
            format!("`{}` is not a pool name: use 1 to 64 letters, digits, `-` and `.`", peer.pool)
        });
        findings.check(seen.insert(&peer.host), &format!("{field}.host"), || {
            format!("`{}` is there twice, or is this host itself: every host has one name", peer.host)
        });
        findings.check(addresses.insert(peer.address), &format!("{field}.address"), || {
            format!("{} belongs to another host already: every daemon listens on its own address", peer.address)
        });
        findings.check(peer.address.port() != 0, &format!("{field}.address"), || {
            format!("{} has port 0: give the port of that host's `listen`", peer.address)
        });
    }
    findings.check(config.listen.port() != 0, "listen", || {
        format!("{} has port 0: peers must know the port, so choose one, for example 7420", config.listen)
    });
    findings.check(!config.migration_address.is_unspecified(), "migration_address", || {
        format!("{} is no address that a peer can connect to: give this host's own", config.migration_address)
    });
}

fn capacity(config: &HostConfig, findings: &mut Findings) {
    let capacity = &config.capacity;
    for (field, value) in [
        ("capacity.cpu_cores", capacity.cpu_cores),
        ("capacity.memory_mib", capacity.memory_mib),
        ("capacity.disk_bytes_per_second", capacity.disk_bytes_per_second),
        ("capacity.network_bytes_per_second", capacity.network_bytes_per_second),
        ("capacity.disk_space_mib", capacity.disk_space_mib),
    ] {
        if let Some(value) = value {
            findings.check(value.is_finite() && value > 0.0, field, || {
                format!("{value} is not a capacity: give more than 0, or leave it out")
            });
        }
    }
    findings.check((50..=60_000).contains(&config.sample_interval_ms), "sample_interval_ms", || {
        format!("{} is out of range: use 50 to 60000", config.sample_interval_ms)
    });
    let migration = &config.migration;
    findings.check(
        migration.bandwidth_bytes_per_second.is_none_or(|rate| rate >= 1 << 20),
        "migration.bandwidth_bytes_per_second",
        || "allow at least 1048576 (1 MiB/s), or leave it out".to_owned(),
    );
    findings.check((1..=604_800).contains(&migration.recover_s), "migration.recover_s", || {
        format!("{} is out of range: use 1 to 604800", migration.recover_s)
    });
    findings.check(migration.keep_disks_s <= 604_800, "migration.keep_disks_s", || {
        format!("{} is out of range: use 0 to 604800", migration.keep_disks_s)
    });
    findings.check(migration.retries <= RETRIES_MAX, "migration.retries", || {
        format!("{} is out of range: use 0 to {RETRIES_MAX}", migration.retries)
    });
    findings.check((1..=64).contains(&config.concurrent_migrations), "concurrent_migrations", || {
        format!("{} is out of range: use 1 to 64", config.concurrent_migrations)
    });
}

fn planner(planner: &PlannerConfig, sample_interval_ms: u64, findings: &mut Findings) {
    findings.range("planner.horizon_s", planner.horizon_s, 0.1, 86_400.0);
    let steps = planner.horizon_s * 1000.0 / sample_interval_ms.max(1) as f64;
    findings.check(steps <= predictor::bank::LONGEST_HORIZON as f64, "planner.horizon_s", || {
        format!(
            "{} s are {steps:.0} sampling intervals, and the forecasts reach {}: shorten it, or raise sample_interval_ms",
            planner.horizon_s,
            predictor::bank::LONGEST_HORIZON
        )
    });
    findings.range("planner.start_score", planner.start_score, 0.0, 1.0);
    findings.range("planner.stop_score", planner.stop_score, 0.0, 1.0);
    findings.check(planner.stop_score <= planner.start_score, "planner.stop_score", || {
        format!(
            "{} is above start_score ({}): the trigger would never rest; make it smaller",
            planner.stop_score, planner.start_score
        )
    });
    findings.check((1..=1000).contains(&planner.confirmations), "planner.confirmations", || {
        format!("{} is out of range: use 1 to 1000", planner.confirmations)
    });
    findings.range("planner.cooldown_s", planner.cooldown_s, 0.0, 86_400.0);
    findings.range("planner.backoff", planner.backoff, 1.0, 10.0);
    findings.range("planner.machine_cooldown_s", planner.machine_cooldown_s, 0.0, 604_800.0);
    findings.range("planner.target_use", planner.target_use, 0.05, 1.0);
    findings.range("planner.target_score", planner.target_score, 0.0, 1.0);
    findings.range("planner.lead_s", planner.lead_s, 0.0, 86_400.0);
    findings.range("planner.early_risk", planner.early_risk, 0.01, 0.99);
    findings.range("planner.minimum_benefit_minutes", planner.minimum_benefit_minutes, 0.0, 1e6);
    findings.range("planner.lessons", planner.lessons as f64, 0.0, 1e6);
    let sizing = planner.capacity;
    findings.range("planner.capacity.risk", sizing.risk, 0.0001, 0.5);
    findings.range("planner.capacity.lead_s", sizing.lead_s, 0.0, 86_400.0);
    findings.range("planner.capacity.hold_s", sizing.hold_s, 0.0, 604_800.0);
    findings.range("planner.capacity.least_hosts", sizing.least_hosts as f64, 0.0, 1e6);
    findings.range("planner.capacity.most_hosts", sizing.most_hosts as f64, sizing.least_hosts as f64, 1e6);
    let (thresholds, weights) = (planner.thresholds, planner.weights);
    for (name, threshold, weight) in [
        ("cpu", thresholds.cpu, weights.cpu),
        ("memory", thresholds.memory, weights.memory),
        ("io", thresholds.io, weights.io),
        ("network", thresholds.network, weights.network),
    ] {
        findings.range(&format!("planner.thresholds.{name}"), threshold, 0.05, 10.0);
        findings.range(&format!("planner.weights.{name}"), weight, 0.0, 1.0);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn good() -> Value {
        json!({"host": "a1", "pool": "a", "run_dir": "/run/headroom", "state_dir": "/var/lib/headroom",
            "socket": "/run/headroom/hostd.sock", "listen": "10.1.0.1:7420", "migration_address": "10.1.0.1",
            "tls": {"ca": "/e/ca.pem", "certificate": "/e/a1.pem", "key": "/e/a1.key"}, "bridge": "br0",
            "peers": [{"host": "b1", "pool": "b", "address": "10.1.0.2:7420"}]})
    }

    /// The error that a configuration with one change gives, with its causes.
    fn error(change: impl FnOnce(&mut Value)) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hostd.json");
        let mut json = good();
        change(&mut json);
        std::fs::write(&path, json.to_string()).unwrap();
        HostConfig::load(&path).err().map(|error| crate::machine::chain(&error))
    }

    #[test]
    fn the_example_is_in_order() {
        assert_eq!(error(|_| ()), None);
    }

    #[test]
    fn each_mistake_is_told_with_its_field() {
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 18] = [
            (|json| json["host"] = "../a1".into(), "host: `../a1` is not a name"),
            (|json| json["pool"] = "".into(), "pool: `` is not a name"),
            (|json| json["run_dir"] = "run".into(), "run_dir: `run` is not an absolute path"),
            (|json| json["run_dir"] = format!("/{}", "x".repeat(90)).into(), "run_dir: "),
            (|json| json["socket"] = format!("/{}", "x".repeat(120)).into(), "socket: the path has 121 bytes"),
            (|json| json["listen"] = "10.1.0.1:0".into(), "listen: 10.1.0.1:0 has port 0"),
            (|json| json["migration_address"] = "0.0.0.0".into(), "migration_address: 0.0.0.0"),
            (|json| json["bridge"] = "a/b".into(), "bridge: `a/b`"),
            (|json| json["peers"][0]["host"] = "a1".into(), "peers[0].host: `a1` is there twice"),
            (|json| json["peers"][0]["address"] = "10.1.0.1:7420".into(), "peers[0].address: 10.1.0.1:7420 belongs"),
            (|json| json["capacity"] = json!({"cpu_cores": 0}), "capacity.cpu_cores: 0 is not a capacity"),
            (|json| json["sample_interval_ms"] = 1.into(), "sample_interval_ms: 1 is out of range"),
            (|json| json["sample_interval_ms"] = 100.into(), "planner.horizon_s: 600 s are 6000 sampling intervals"),
            (
                |json| json["planner"] = json!({"start_score": 0.2, "stop_score": 0.3}),
                "planner.stop_score: 0.3 is above",
            ),
            (|json| json["planner"] = json!({"weights": {"cpu": 2.0}}), "planner.weights.cpu: 2 is out of range"),
            (|json| json["access"] = json!([{"who": {"uid": 5}}]), "access[0]: allows and denies nothing"),
            (|json| json["planer"] = json!({}), "unknown field `planer`"),
            (|json| json["listen"] = "here".into(), "is malformed at line 1"),
        ];
        for (change, expected) in cases {
            let error = error(change).unwrap_or_else(|| panic!("no error, expected {expected}"));
            assert!(error.contains(expected), "expected {expected}: {error}");
        }
    }

    #[test]
    fn all_mistakes_are_told_at_once() {
        let error = error(|json| {
            json["host"] = "-".into();
            json["capacity"] = json!({"memory_mib": -1});
        });
        let error = error.unwrap();
        assert!(
            error.contains("has 2 mistake(s)") && error.contains("host:") && error.contains("memory_mib:"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_file_says_how_to_make_one() {
        let error = HostConfig::load(Path::new("/nonexistent/hostd.json")).unwrap_err();
        assert!(error.to_string().contains("headroom init"), "{error}");
    }
}
