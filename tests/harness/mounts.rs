//! Hosts whose file systems differ from those of this computer: the daemon, and the VMMs that it starts, get a mount
//! namespace of their own, which vanishes with them.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use hostd::lab::{LabHost, binary};

use crate::world::World;

/// Starts the daemon of `host` anew after the lines of shell in `mounts` were run where only it sees what they mount.
///
/// # Panics
/// When they fail, or the daemon does not answer afterwards.
pub fn restart(world: &World, host: &str, mounts: &str) {
    let host = world.host(host);
    host.kill_daemon();
    let program = write_program(host, mounts);
    host.spawn_daemon(&program).expect("a daemon with mounts of its own");
    host.wait_ready().expect("a daemon that answers");
}

/// Starts the daemon of `host` anew with the file systems that everybody sees.
///
/// # Panics
/// When it does not answer.
pub fn restart_plain(world: &World, host: &str) {
    let host = world.host(host);
    host.kill_daemon();
    host.spawn_daemon(&binary("hostd").expect("hostd")).expect("a daemon");
    host.wait_ready().expect("a daemon that answers");
}

/// A program that makes the mounts and then becomes the daemon, under its own process id.
fn write_program(host: &LabHost, mounts: &str) -> PathBuf {
    let path = host.directory().join("hostd-with-mounts");
    let daemon = binary("hostd").expect("hostd");
    let script = format!(
        "#!/bin/sh\nexec unshare --mount --propagation private /bin/sh -ec '{mounts}\nexec {} \"$@\"' hostd \"$@\"\n",
        daemon.display()
    );
    std::fs::write(&path, script).expect("a script");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).expect("an executable script");
    path
}

/// Runs shell where the daemon of `host` sees its mounts, for example to repair one.
///
/// # Panics
/// When it fails.
pub fn run(world: &World, host: &str, shell: &str) {
    let pid = world.host(host).daemon_pid().expect("a running daemon");
    let output = Command::new("nsenter")
        .args(["--mount", "--target", &pid.to_string(), "/bin/sh", "-ec", shell])
        .output()
        .expect("nsenter (Debian's package util-linux)");
    assert!(output.status.success(), "{shell}: {}", String::from_utf8_lossy(&output.stderr));
}

/// `path` as the daemon of `host` sees it.
///
/// # Panics
/// When it does not run.
pub fn seen(world: &World, host: &str, path: &Path) -> PathBuf {
    let pid = world.host(host).daemon_pid().expect("a running daemon");
    Path::new("/proc").join(pid.to_string()).join("root").join(path.strip_prefix("/").unwrap_or(path))
}
