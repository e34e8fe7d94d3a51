//! What a process may still open by path, by Landlock (Linux 5.13).
//!
//! Descriptors that are open already, such as a tap from hostd, stay as they are, and so do abstract and connected sockets. A file is known by its
//! inode: one that is put in its place later is out of reach, unless its folder is allowed.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use landlock::{
    ABI, Access, AccessFs, BitFlags, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    RulesetStatus, path_beneath_rules,
};

use crate::config::{DiskSource, MachineConfig};

/// Rights that are restricted where the kernel knows them. Those of later kernels (ioctl on devices, TCP ports) are left alone: the VMM opens no
/// device but those below, and which ports a migration needs is not known before.
const RIGHTS: ABI = ABI::V3;

/// Devices that a VMM opens: KVM, taps by name, missing pages of post-copy.
const DEVICES: [&str; 3] = ["/dev/kvm", "/dev/net/tun", "/dev/userfaultfd"];

/// What the kernel tells: its memory map and that of this process. Other processes' secrets in it stay out of reach, since they are not
/// confined in the same way (landlock(7), ptrace).
const TOLD: &str = "/proc";

/// A file, or a folder with all that is below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedPath {
    path: PathBuf,
    read_only: bool,
}

impl FromStr for AllowedPath {
    type Err = String;

    /// `PATH` for reading and writing, `PATH:ro` for reading.
    fn from_str(text: &str) -> Result<Self, String> {
        let (path, read_only) = text.strip_suffix(":ro").map_or((text, false), |path| (path, true));
        if path.is_empty() {
            return Err("give a file or a folder, with `:ro` at its end if it is only read".to_owned());
        }
        Ok(Self { path: path.into(), read_only })
    }
}

/// Everything that is allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    read: Vec<PathBuf>,
    write: Vec<PathBuf>,
}

impl Paths {
    /// Those of a machine's configuration and those that are `named` besides, and what every VMM needs.
    #[must_use]
    pub fn of(config: Option<&MachineConfig>, named: &[AllowedPath]) -> Self {
        let mut paths = Self { read: vec![TOLD.into()], write: DEVICES.map(PathBuf::from).into() };
        // For the names of functions in a panic's message.
        paths.read.extend(std::env::current_exe());
        for AllowedPath { path, read_only } in named {
            paths.side(*read_only).push(path.clone());
        }
        if let Some(config) = config {
            paths.read.extend(config.kernel.iter().chain(&config.initrd).cloned());
            for disk in &config.disks {
                if let DiskSource::Path(path) = &disk.source {
                    paths.side(disk.read_only).push(path.clone());
                }
            }
        }
        paths
    }

    /// These can be read as well.
    pub fn read<'a>(&mut self, more: impl Iterator<Item = &'a PathBuf>) {
        self.read.extend(more.cloned());
    }

    fn side(&mut self, read_only: bool) -> &mut Vec<PathBuf> {
        if read_only { &mut self.read } else { &mut self.write }
    }
}

/// Confines the calling thread, and those that it will start, to `paths`; those that are not there are left out. Returns whether the
/// kernel does it, at least in part.
///
/// # Errors
///
/// If the kernel refuses it.
pub(super) fn limit(paths: &Paths) -> Result<bool, RulesetError> {
    let rules = |paths: &[PathBuf], rights: BitFlags<AccessFs>| {
        path_beneath_rules(paths.iter().filter(|path| exists(path)).cloned().collect::<Vec<_>>(), rights)
    };
    // Nothing is executed, no device is made.
    let write = AccessFs::from_all(RIGHTS) & !AccessFs::Execute & !AccessFs::MakeChar & !AccessFs::MakeBlock;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let status: RestrictionStatus = Ruleset::default()
        .handle_access(AccessFs::from_all(RIGHTS))?
        .create()?
        .add_rules(rules(&paths.read, read))?
        .add_rules(rules(&paths.write, write))?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

/// Of one that is missing the machine's own error says more.
fn exists(path: &Path) -> bool {
    path.exists()
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, OpenOptions};
    use std::io::ErrorKind::{NotFound, PermissionDenied};
    use std::io::{self, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// In a thread of its own, which is all that is confined. False if this kernel cannot.
    fn confined(paths: &Paths, action: impl FnOnce() + Send) -> bool {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let enforced = limit(paths).unwrap();
                if enforced {
                    action();
                }
                enforced
            });
            thread.join().unwrap()
        })
    }

    fn refused<T>(result: io::Result<T>) -> bool {
        result.is_err_and(|error| error.kind() == PermissionDenied)
    }

    #[test]
    fn what_is_named_can_be_used_and_nothing_else() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        for folder in ["run", "tls", "other"] {
            fs::create_dir(at(folder)).unwrap();
        }
        for file in ["kernel", "disk.raw", "cd.raw", "other.raw", "tls/key.pem", "other/secret"] {
            fs::write(at(file), "content").unwrap();
        }
        std::os::unix::fs::symlink(at("other/secret"), at("run/link")).unwrap();
        let config = serde_json::json!({"name": "m", "memory_mib": 64, "kernel": at("kernel"), "disks": [
            {"id": "d", "path": at("disk.raw")}, {"id": "c", "path": at("cd.raw"), "read_only": true},
            {"id": "e", "path": at("not-there.raw")}]});
        let config: MachineConfig = serde_json::from_value(config).unwrap();
        let named = [at("run").display().to_string(), format!("{}:ro", at("tls").display())];
        let named: Vec<AllowedPath> = named.iter().map(|text| text.parse().unwrap()).collect();
        let paths = Paths::of(Some(&config), &named);
        let writing = |name: &str| OpenOptions::new().read(true).write(true).open(at(name));
        let enforced = confined(&paths, || {
            assert_eq!(fs::read(at("kernel")).unwrap(), b"content");
            assert!(refused(writing("kernel")));
            writing("disk.raw").unwrap().set_len(4096).unwrap();
            assert!(File::open(at("cd.raw")).is_ok() && refused(writing("cd.raw")));
            assert!(fs::read(at("tls/key.pem")).is_ok() && refused(fs::write(at("tls/key.pem"), "")));
            assert!(refused(fs::write(at("tls/new"), "")));
            File::create(at("run/console.log")).unwrap().write_all(b"x").unwrap();
            fs::rename(at("run/console.log"), at("run/console.log.old")).unwrap();
            drop(UnixListener::bind(at("run/api.sock")).unwrap());
            fs::remove_file(at("run/api.sock")).unwrap();
            assert!(fs::read_to_string("/proc/self/smaps").is_ok());
            for outside in ["other.raw", "other/secret", "run/link", "run/../other/secret"] {
                assert!(refused(File::open(at(outside))), "{outside}");
            }
            assert!(refused(File::open("/etc/passwd")) && refused(fs::read_dir("/")));
            assert!(refused(fs::write(at("other/new"), "")) && refused(fs::remove_file(at("other.raw"))));
            let missing = File::open(at("not-there.raw")).unwrap_err();
            assert_eq!(missing.kind(), NotFound, "a missing file is told from one that is out of reach");
        });
        assert!(fs::read(at("other.raw")).is_ok(), "the test's own thread is free");
        if !enforced {
            eprintln!("skipped: this kernel has no Landlock");
        }
    }

    #[test]
    fn paths_are_read_from_their_words() {
        let path = |text: &str| text.parse::<AllowedPath>();
        assert_eq!(path("/run/vm"), Ok(AllowedPath { path: "/run/vm".into(), read_only: false }));
        assert_eq!(path("/etc/tls:ro"), Ok(AllowedPath { path: "/etc/tls".into(), read_only: true }));
        assert_eq!(path("/a:b"), Ok(AllowedPath { path: "/a:b".into(), read_only: false }));
        assert!(path("").is_err() && path(":ro").is_err());
    }
}
