//! `headroom run`: one machine in this terminal, without a daemon.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use vmm::config::{DirtyTracking, DiskConfig, DiskSource, MachineConfig, NetworkConfig, SerialConfig, TapSource};

use super::Failure;
use crate::digest::new_id;
use crate::machine::launch::{bundled_kernel, find_vmm};
use crate::machine::name::derive_mac;

/// What to run.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  headroom run                                                   the bundled guest with 64 MiB
  headroom run --memory 512 --kernel vmlinux --cmdline 'console=ttyS0' --disk root.raw
  headroom run --disk 64 --tap tap0 --cmdline 'ip=10.0.0.5/24'   a new disk of 64 MiB, gone afterwards

The machine's serial console is this terminal. Ctrl-C ends the machine and removes what was made for it.
Exit codes: 0 the machine was turned off, 1 it could not start, 3 it failed, 130 it was interrupted.")]
pub(super) struct Arguments {
    /// RAM in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    memory: u64,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1)]
    vcpus: u16,
    /// Kernel: ELF with a PVH note, vmlinux or bzImage; without it the bundled guest.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// Kernel command line; without it the bundled guest's usual workload.
    #[arg(long)]
    cmdline: Option<String>,
    /// A disk: a size in MiB for one that is gone afterwards, or the path of an image (`:ro` makes it read-only). Repeatable.
    #[arg(long = "disk", value_name = "MIB|PATH")]
    disks: Vec<String>,
    /// An existing tap device for a network card. Repeatable.
    #[arg(long = "tap", value_name = "NAME")]
    taps: Vec<String>,
    /// headroom-vmm; without it the one beside this program, or in PATH.
    #[arg(long)]
    vmm: Option<PathBuf>,
    /// What the VMM logs to standard error: error, warn, info, debug.
    #[arg(long, default_value = "warn")]
    log: String,
}

/// A folder that is removed with everything in it, whatever happens.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(super) async fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    let vmm = find_vmm(arguments.vmm.as_deref()).map_err(|error| Failure::other(&error))?;
    let id = new_id("headroom-run").map_err(|error| Failure::other(&error))?;
    let scratch = Scratch(std::env::temp_dir().join(&id));
    crate::machine::disk::make_folder(&scratch.0).map_err(|error| Failure::other(&error))?;
    let config = machine(&arguments, &scratch.0)?;
    let path = scratch.0.join("machine.json");
    std::fs::write(&path, serde_json::to_vec(&config).map_err(|error| Failure::other(&error))?)?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut command = Command::new(&vmm);
    command.arg("--config").arg(&path).arg("--log").arg(&arguments.log).kill_on_drop(true);
    // Its disks and kernel are named in the configuration; everything else of this user is none of the guest's business.
    command.arg("--allow-path").arg(&scratch.0);
    // SAFETY: prctl(2) is async-signal-safe and touches nothing of the parent. The runtime has one thread, so the parent of
    // the process is this thread, which lives as long as this program.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child =
        command.spawn().map_err(|error| Failure::Other(format!("cannot start {}: {error}", vmm.display())))?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
    let mut interrupted = false;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status?,
            // The terminal's Ctrl-C reaches the VMM, too; one that was sent to this process alone does not.
            _ = interrupt.recv() => interrupted = true,
            _ = terminate.recv() => interrupted = true,
        }
        if let Some(pid) = pid.filter(|_| interrupted) {
            let _ = kill(pid, Signal::SIGTERM);
        }
    };
    drop(scratch);
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(match (interrupted, code, status.signal()) {
        (true, ..) => ExitCode::from(130),
        (false, Some(code), _) => ExitCode::from(code),
        (false, None, _) => ExitCode::from(1),
    })
}

fn machine(arguments: &Arguments, scratch: &Path) -> Result<MachineConfig, Failure> {
    let bundled = arguments.kernel.is_none();
    let kernel = match &arguments.kernel {
        Some(kernel) => kernel.clone(),
        None => bundled_kernel(scratch).map_err(|error| Failure::other(&error))?,
    };
    let usual = || if bundled { headroom_guest::Workload::default().to_string() } else { String::new() };
    let disks = arguments.disks.iter().enumerate().map(|(index, text)| disk(index, text, scratch));
    let network = |(index, tap): (usize, &String)| {
        let id = format!("net{index}");
        NetworkConfig { source: TapSource::Tap(tap.clone()), mac: derive_mac("run", &id), id }
    };
    Ok(MachineConfig {
        name: "run".to_owned(),
        vcpus: arguments.vcpus,
        memory_mib: arguments.memory,
        kernel: Some(kernel),
        initrd: arguments.initrd.clone(),
        cmdline: arguments.cmdline.clone().unwrap_or_else(usual),
        disks: disks.collect::<Result<_, _>>()?,
        networks: arguments.taps.iter().enumerate().map(network).collect(),
        balloon: None,
        serial: SerialConfig::Stdio,
        dirty_tracking: DirtyTracking::default(),
    })
}

fn disk(index: usize, text: &str, scratch: &Path) -> Result<DiskConfig, Failure> {
    let id = format!("disk{index}");
    if let Ok(mib) = text.parse::<u64>() {
        let path = scratch.join(format!("{id}.raw"));
        let bytes = mib.checked_mul(1 << 20).filter(|bytes| *bytes > 0);
        let bytes = bytes.ok_or_else(|| Failure::Other(format!("--disk {text}: not a size in MiB")))?;
        std::fs::File::create_new(&path)?.set_len(bytes)?;
        return Ok(DiskConfig { id, source: DiskSource::Path(path), read_only: false, shared: false });
    }
    let (path, read_only) = text.strip_suffix(":ro").map_or((text, false), |path| (path, true));
    Ok(DiskConfig { id, source: DiskSource::Path(path.into()), read_only, shared: false })
}
