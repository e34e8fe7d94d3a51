//! CPU capacity that is enforced: one control group a host, with a quota, for its daemon and its machines.
//!
//! Version 1 (`cpu.cfs_quota_us`) and version 2 (`cpu.max`) are both supported; which of them carries the `cpu` controller is
//! read from `/proc/self/mountinfo`. Where neither can be used (a container without a writable hierarchy, for example)
//! [`Controller::find`] says why, and hosts then share the processors without a limit.
//!
//! The period is 10 ms and not the kernel's default of 100 ms: a host that has used up its share is stopped for the rest of
//! the period, and with the default a machine would be silent for up to 100 ms.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::{LabError, LabResult};

/// Weight of a group against everything else on this computer, as a multiple of an ordinary group's: what else runs here shall
/// not look like contention of a host that is within its quota.
const WEIGHT: u64 = 64;

/// Length of an accounting period in microseconds.
pub const PERIOD_US: u64 = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The hierarchy that carries the `cpu` controller, at the place where groups can be made.
#[derive(Clone, Debug)]
pub struct Controller {
    version: Version,
    base: PathBuf,
}

impl Controller {
    /// Looks for a hierarchy in which this process can make groups with a CPU quota.
    ///
    /// # Errors
    /// In words, why there is none.
    pub fn find() -> Result<Self, String> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").map_err(|error| error.to_string())?;
        let own = std::fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
        if let Some(base) = version_one(&mounts, &own) {
            return writable(&base).map(|()| Self { version: Version::One, base });
        }
        let Some(base) = version_two(&mounts) else { return Err("no cgroup hierarchy is mounted".into()) };
        let controllers = std::fs::read_to_string(base.join("cgroup.controllers")).unwrap_or_default();
        if !controllers.split_whitespace().any(|name| name == "cpu") {
            return Err(format!("{} does not offer the cpu controller", base.display()));
        }
        writable(&base)?;
        std::fs::write(base.join("cgroup.subtree_control"), "+cpu")
            .map_err(|error| format!("the cpu controller cannot be enabled in {}: {error}", base.display()))?;
        Ok(Self { version: Version::Two, base })
    }

    /// Makes a group whose threads get processor time before others; with `cores`, no more of it than that.
    ///
    /// # Errors
    /// When the kernel refuses the group or the quota.
    pub fn create(&self, name: &str, cores: Option<f64>) -> LabResult<Cgroup> {
        let path = self.base.join(name);
        std::fs::create_dir(&path).map_err(LabError::io("create", &path))?;
        let group = Cgroup { path };
        match self.version {
            Version::One => group.write("cpu.shares", &(1024 * WEIGHT).to_string())?,
            Version::Two => group.write("cpu.weight", &(100 * WEIGHT).to_string())?,
        }
        if let Some(cores) = cores {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few cores times 10,000")]
            // The kernel's smallest quota is one millisecond.
            let quota = ((cores.clamp(0.1, 1024.0) * PERIOD_US as f64) as u64).max(1000);
            match self.version {
                Version::One => {
                    group.write("cpu.cfs_period_us", &PERIOD_US.to_string())?;
                    group.write("cpu.cfs_quota_us", &quota.to_string())?;
                    group.write_optional("cpu.cfs_burst_us", &quota.min(PERIOD_US).to_string());
                }
                Version::Two => {
                    group.write("cpu.max", &format!("{quota} {PERIOD_US}"))?;
                    group.write_optional("cpu.max.burst", &quota.min(PERIOD_US).to_string());
                }
            }
        }
        Ok(group)
    }

    /// Groups whose names begin with `prefix`.
    pub(crate) fn list(&self, prefix: &str) -> Vec<Cgroup> {
        let Ok(entries) = std::fs::read_dir(&self.base) else { return Vec::new() };
        let named = |path: &PathBuf| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix))
                && path.is_dir()
        };
        entries.flatten().map(|entry| entry.path()).filter(named).map(|path| Cgroup { path }).collect()
    }
}

/// One control group.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes `command` start inside the group.
    ///
    /// # Errors
    /// When the group is gone.
    pub fn place(&self, command: &mut Command) -> LabResult<()> {
        let path = self.path.join("cgroup.procs");
        let procs = File::options().write(true).open(&path).map_err(LabError::io("open", path))?;
        // SAFETY: between fork and exec the closure only calls write(2), which is async-signal-safe; 0 means the writer.
        unsafe {
            command.pre_exec(move || (&procs).write_all(b"0"));
        }
        Ok(())
    }

    /// Processes in it.
    pub fn processes(&self) -> Vec<i32> {
        let text = std::fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.trim().parse().ok()).collect()
    }

    /// In how many periods its threads were stopped because the quota was used up, and for how long in all, in
    /// microseconds.
    pub fn throttled(&self) -> (u64, u64) {
        let text = std::fs::read_to_string(self.path.join("cpu.stat")).unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|value| value.trim().parse::<u64>().ok())
        };
        let microseconds = field("throttled_usec").or_else(|| field("throttled_time").map(|ns| ns / 1000));
        (field("nr_throttled").unwrap_or(0), microseconds.unwrap_or(0))
    }

    /// Removes it; it must be empty.
    pub(crate) fn remove(&self) -> std::io::Result<()> {
        match std::fs::remove_dir(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// What was not used of one period may be used in the next: short bursts are not stopped. Since Linux 5.14; without it
    /// they are.
    fn write_optional(&self, file: &str, value: &str) {
        let _ = std::fs::write(self.path.join(file), value);
    }

    fn write(&self, file: &str, value: &str) -> LabResult<()> {
        let path = self.path.join(file);
        std::fs::write(&path, value).map_err(LabError::io("write", path))
    }
}

fn writable(base: &Path) -> Result<(), String> {
    nix::unistd::access(base, nix::unistd::AccessFlags::W_OK).map_err(|error| format!("{}: {error}", base.display()))
}

/// Mount point of a version 1 hierarchy with the `cpu` controller, joined with the group this process is in.
fn version_one(mounts: &str, own: &str) -> Option<PathBuf> {
    let has_cpu = |list: &str| list.split(',').any(|name| name == "cpu");
    let (root, point) = mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut kind = kind.split(' ');
        let (name, options) = (kind.next()?, kind.nth(1)?);
        let mut fields = mount.split(' ').skip(3);
        (name == "cgroup" && has_cpu(options)).then_some((fields.next()?, fields.next()?))
    })?;
    let group = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        has_cpu(fields.next()?).then(|| fields.next())?
    })?;
    // In a container the mount shows a subtree of what /proc tells.
    let inside = group.strip_prefix(root).unwrap_or("").trim_start_matches('/');
    Some(Path::new(point).join(inside))
}

/// Mount point of the version 2 hierarchy. Groups are made at its root: below a group that holds processes, as this
/// process's own does, the kernel allows none with controllers.
fn version_two(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ").then(|| mount.split(' ').nth(4)).flatten().map(PathBuf::from)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
                      40 31 0:37 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";

    #[test]
    fn version_one_is_found_below_our_own_group() {
        let own = "2:memory:/x\n1:cpu,cpuacct:/user/session\n0::/\n";
        assert_eq!(version_one(V1, own), Some(PathBuf::from("/sys/fs/cgroup/cpu,cpuacct/user/session")));
    }

    #[test]
    fn a_container_sees_its_subtree_at_the_mount_point() {
        let mounts = V1.replace("0:29 / ", "0:29 /docker/abc ");
        let own = "1:cpu,cpuacct:/docker/abc\n";
        assert_eq!(version_one(&mounts, own), Some(PathBuf::from("/sys/fs/cgroup/cpu,cpuacct")));
    }

    #[test]
    fn version_two_alone() {
        let mounts = "25 20 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(version_one(mounts, "0::/init.scope\n"), None);
        assert_eq!(version_two(mounts), Some(PathBuf::from("/sys/fs/cgroup")));
    }
}
