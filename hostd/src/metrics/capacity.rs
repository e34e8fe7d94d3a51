//! What this host may hand out: as configured, else as measured.

use std::path::{Path, PathBuf};

use crate::api::types::Capacity;
use crate::config::HostConfig;

/// Where nothing else is known: one common SSD.
const DISK_BYTES_PER_SECOND: f64 = 500e6;

/// Where nothing else is known: 10 Gbit/s.
const NETWORK_BYTES_PER_SECOND: f64 = 1.25e9;

/// Share of measured memory that is left to the host itself.
const HOST_MEMORY_SHARE: f64 = 0.05;

/// The capacity of the host with this configuration.
pub fn measure(config: &HostConfig) -> Capacity {
    let groups = Groups::of_self();
    let given = &config.capacity;
    Capacity {
        cpu_cores: given
            .cpu_cores
            .unwrap_or_else(|| groups.cpu_quota().unwrap_or(f64::INFINITY).min(online_processors())),
        memory_mib: given.memory_mib.unwrap_or_else(|| {
            let total = memory_total_mib().unwrap_or(1024.0);
            groups.memory_limit_mib().unwrap_or(f64::INFINITY).min(total) * (1.0 - HOST_MEMORY_SHARE)
        }),
        disk_bytes_per_second: given.disk_bytes_per_second.unwrap_or(DISK_BYTES_PER_SECOND),
        network_bytes_per_second: given.network_bytes_per_second.unwrap_or(NETWORK_BYTES_PER_SECOND),
    }
}

fn online_processors() -> f64 {
    // `available_parallelism` would fold in the cgroup's quota rounded to whole cores; the affinity mask alone is wanted.
    nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).map_or(1.0, |set| {
        (0..nix::sched::CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).count().max(1) as f64
    })
}

fn memory_total_mib() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}

/// The control groups of a process, version 1, 2 or both (cgroups(7)).
#[derive(Debug, Default)]
pub struct Groups {
    cpu_v1: Option<PathBuf>,
    memory_v1: Option<PathBuf>,
    unified: Option<PathBuf>,
}

impl Groups {
    /// Those of this process.
    pub fn of_self() -> Self {
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self::parse(&groups, &mounts)
    }

    fn parse(groups: &str, mounts: &str) -> Self {
        let mut found = Self::default();
        for line in groups.lines() {
            let mut fields = line.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
                continue;
            };
            if controllers.is_empty() {
                found.unified = group_folder(mounts, "cgroup2", None, path);
            }
            for controller in controllers.split(',') {
                let folder = || group_folder(mounts, "cgroup", Some(controller), path);
                match controller {
                    "cpu" => found.cpu_v1 = folder(),
                    "memory" => found.memory_v1 = folder(),
                    _ => {}
                }
            }
        }
        found
    }

    /// The smallest CPU quota of the group and its parents, in cores; `None` if there is none.
    pub fn cpu_quota(&self) -> Option<f64> {
        let v1 = smallest(self.cpu_v1.as_deref(), |folder| {
            let quota: f64 = number(&folder.join("cpu.cfs_quota_us"))?;
            let period: f64 = number(&folder.join("cpu.cfs_period_us"))?;
            (quota > 0.0 && period > 0.0).then(|| quota / period)
        });
        let v2 = smallest(self.unified.as_deref(), |folder| {
            let text = std::fs::read_to_string(folder.join("cpu.max")).ok()?;
            let (quota, period) = text.trim().split_once(' ')?;
            Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?)
        });
        [v1, v2].into_iter().flatten().reduce(f64::min)
    }

    /// The smallest memory limit of the group and its parents, in MiB.
    pub fn memory_limit_mib(&self) -> Option<f64> {
        let v1 = smallest(self.memory_v1.as_deref(), |folder| number(&folder.join("memory.limit_in_bytes")));
        let v2 = smallest(self.unified.as_deref(), |folder| number(&folder.join("memory.max")));
        [v1, v2].into_iter().flatten().reduce(f64::min).map(|bytes| bytes / f64::from(1 << 20))
    }

    /// For how long the group's tasks were held back by its quota since its start, in seconds, summed over processors;
    /// `None` if the kernel does not tell.
    pub fn throttled_s(&self) -> Option<f64> {
        let field = |folder: &Option<PathBuf>, name: &str| {
            let text = std::fs::read_to_string(folder.as_ref()?.join("cpu.stat")).ok()?;
            text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok())
        };
        let v1 = field(&self.cpu_v1, "throttled_time ").map(|nanoseconds| nanoseconds / 1e9);
        v1.or_else(|| field(&self.unified, "throttled_usec ").map(|microseconds| microseconds / 1e6))
    }
}

/// The folder of a group: where its hierarchy is mounted, and the group's path below that mount's root.
fn group_folder(mounts: &str, kind: &str, controller: Option<&str>, group: &str) -> Option<PathBuf> {
    for line in mounts.lines() {
        // ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [TAGS...] - KIND SOURCE SUPEROPTIONS (proc(5)).
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (root, mount) = (before.next()?, before.next()?);
        let mut after = after.split(' ');
        let (this_kind, _, options) = (after.next()?, after.next()?, after.next().unwrap_or_default());
        let wanted = controller.is_none_or(|controller| options.split(',').any(|option| option == controller));
        if this_kind == kind && wanted {
            let below = group.strip_prefix(root.trim_end_matches('/')).unwrap_or(group);
            return Some(Path::new(mount).join(below.trim_start_matches('/')));
        }
    }
    None
}

/// The smallest value that `read` finds in a group's folder and those above it.
fn smallest(folder: Option<&Path>, read: impl Fn(&Path) -> Option<f64>) -> Option<f64> {
    folder?.ancestors().filter_map(read).reduce(f64::min)
}

fn number(path: &Path) -> Option<f64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_where_they_are_mounted() {
        let mounts = "30 25 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n\
                      31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      32 30 0:28 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      33 30 0:29 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        let groups = "4:cpu,cpuacct:/lab/a1\n3:memory:/docker/x/lab\n0::/user.slice\n";
        let found = Groups::parse(groups, mounts);
        assert_eq!(found.cpu_v1, Some("/sys/fs/cgroup/cpu,cpuacct/lab/a1".into()));
        assert_eq!(found.memory_v1, Some("/sys/fs/cgroup/memory/lab".into()));
        assert_eq!(found.unified, Some("/sys/fs/cgroup/unified/user.slice".into()));
    }

    #[test]
    fn the_smallest_quota_on_the_way_up_counts() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("outer/inner");
        std::fs::create_dir_all(&inner).unwrap();
        std::fs::write(folder.path().join("outer/cpu.max"), "80000 100000\n").unwrap();
        std::fs::write(inner.join("cpu.max"), "max 100000\n").unwrap();
        std::fs::write(inner.join("cpu.stat"), "nr_throttled 3\nthrottled_usec 2500000\n").unwrap();
        std::fs::write(inner.join("memory.max"), "max\n").unwrap();
        let groups = Groups { unified: Some(inner.clone()), ..Groups::default() };
        assert_eq!((groups.cpu_quota(), groups.memory_limit_mib()), (Some(0.8), None));
        assert_eq!(groups.throttled_s(), Some(2.5));
        std::fs::write(inner.join("cpu.cfs_quota_us"), "50000").unwrap();
        std::fs::write(inner.join("cpu.cfs_period_us"), "100000").unwrap();
        let groups = Groups { cpu_v1: Some(inner), ..Groups::default() };
        assert_eq!(groups.cpu_quota(), Some(0.5));
    }
}
