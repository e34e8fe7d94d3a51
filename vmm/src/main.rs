//! `headroom-vmm`: one process, one virtual machine.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use vmm::api::MachineState;
use vmm::api::server::{Socket, SocketFile};
use vmm::config::{MachineConfig, SerialConfig, TapSource};
use vmm::sandbox::{AllowedPath, Paths};
use vmm::service::{Service, Started};
use vmm::terminal::Terminal;
use vmm::vm::Machine;
use vmm::{sandbox, signals, snapshot};
use vmm_sys_util::eventfd::EventFd;

/// Longest configuration that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Runs one virtual machine under KVM.
///
/// The machine starts at once, waits for a migration (--incoming), or goes on from a snapshot (--restore). With an API socket
/// the process stays until it is told to quit, so that the state of a stopped machine can be asked for; without, it ends with
/// the machine.
#[derive(Parser)]
#[command(name = "headroom-vmm", version, after_help = EXAMPLES)]
struct Arguments {
    /// The machine as JSON; `-` reads it from standard input.
    #[arg(long, value_name = "FILE", required_unless_present = "restore")]
    config: Option<PathBuf>,

    /// Where the API listens, for example /run/vm1.sock. Only its owner can connect.
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,

    /// A listening unix socket that the parent left open, instead of --api-socket.
    #[arg(long, value_name = "FD", conflicts_with = "api_socket")]
    api_fd: Option<i32>,

    /// Wait for a machine to arrive by migration, as PUT /v1/migration/receive says.
    #[arg(long, conflicts_with = "restore", requires = "config")]
    incoming: bool,

    /// Go on from a snapshot made by PUT /v1/machine/save. --config, if given, replaces the saved configuration.
    #[arg(long, value_name = "DIR")]
    restore: Option<PathBuf>,

    /// What to log to standard error: error, warn, info, debug, trace, or filters such as vmm=debug.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log: String,

    /// Confine the process to this file or folder, `:ro` for reading only, and to what its configuration names (kernel, initial RAM disk, disks). May be
    /// given several times; folders of the API socket and the console's file, identities for migrations and places for snapshots need it
    /// too. Without it files can be opened wherever the user of this process may.
    #[arg(long, value_name = "PATH[:ro]")]
    allow_path: Vec<AllowedPath>,

    /// Do not confine the process, for debugging: it keeps its capabilities, and no system call is refused. Whoever breaks out of the guest
    /// then has all that the user of this process may do.
    #[arg(long)]
    no_sandbox: bool,
}

const EXAMPLES: &str = "\
A configuration: {\"name\": \"vm1\", \"memory_mib\": 256, \"kernel\": \"vmlinux\", \"cmdline\": \"console=ttyS0\", \"serial\": \"stdio\",
  \"disks\": [{\"id\": \"disk0\", \"path\": \"disk.raw\"}], \"networks\": [{\"id\": \"net0\", \"tap\": \"tap0\", \"mac\": \"02:00:00:00:00:05\"}]}

Exit codes: 0 the machine was turned off or the process was asked to end, 1 it could not start, 2 wrong arguments,
  3 the machine failed.";

fn main() -> ExitCode {
    let started = Started::now();
    let arguments = Arguments::parse();
    match run(&arguments, started) {
        Ok(code) => code,
        Err(error) => {
            let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
            let mut text = String::new();
            for cause in causes {
                if !text.contains(&cause) {
                    text = if text.is_empty() { cause } else { format!("{text}: {cause}") };
                }
            }
            tracing::error!("{text}");
            ExitCode::from(1)
        }
    }
}

fn run(arguments: &Arguments, started: Started) -> anyhow::Result<ExitCode> {
    let filter = &arguments.log;
    vmm::log::start(filter).with_context(|| format!("--log {filter} is no filter: try info, debug or vmm=trace"))?;
    // Blocked before the first thread exists: they all inherit it, and the signals arrive where they are waited for.
    let signals = signals::Signals::block().context("cannot wait for signals")?;
    let quit = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).context("cannot make an event descriptor")?;
    let config = arguments.config.as_deref().map(read_config).transpose()?;
    confine(arguments, config.as_ref())?;
    let (config, machine) = machine(arguments, config)?;
    let console = machine.clone().filter(|_| config.serial == SerialConfig::Stdio);
    let service = Arc::new(Service::new(config, machine.clone(), started, quit.try_clone()?));
    let api = serve(arguments, &service)?;
    if let Some(machine) = &machine {
        machine.resume()?;
        tracing::info!(machine = machine.config().name, "machine runs");
    } else {
        tracing::info!("waiting for a migration");
    }
    let terminal = console.map(|machine| Terminal::start(machine.console().clone())).transpose()?;
    let watched = machine.as_ref().filter(|_| api.is_none());
    signals.wait(&quit, watched.map(|machine| machine.stopped_event()))?;
    drop(terminal);
    let failed = machine.is_some_and(|machine| {
        machine.state() == MachineState::Stopped
            && matches!(machine.stop_reason(), Some(vmm::vcpu::StopReason::Failure(_)))
    });
    tracing::info!("ending");
    drop(api);
    let code = if failed { 3 } else { 0 };
    if service.may_hang() {
        // Not through the destructors, which would join them.
        std::process::exit(code);
    }
    Ok(ExitCode::from(code as u8))
}

/// Before the first thread.
fn confine(arguments: &Arguments, config: Option<&MachineConfig>) -> anyhow::Result<()> {
    if arguments.no_sandbox {
        tracing::warn!("this process is not confined (--no-sandbox)");
        return Ok(());
    }
    let by_name =
        |config: &MachineConfig| config.networks.iter().any(|network| matches!(network.source, TapSource::Tap(_)));
    let paths = (!arguments.allow_path.is_empty()).then(|| {
        let mut paths = Paths::of(config, &arguments.allow_path);
        paths.read(arguments.restore.iter());
        paths
    });
    // What a snapshot has is not known yet.
    sandbox::enter(config.is_none_or(by_name), paths.as_ref())?;
    tracing::debug!("this process is confined");
    Ok(())
}

fn machine(
    arguments: &Arguments,
    config: Option<MachineConfig>,
) -> anyhow::Result<(MachineConfig, Option<Arc<Machine>>)> {
    if let Some(directory) = &arguments.restore {
        let machine = snapshot::restore(directory, config)?;
        return Ok((machine.config().clone(), Some(Arc::new(machine))));
    }
    let config = config.context("no configuration was given: use --config FILE")?;
    if arguments.incoming {
        config.validate()?;
        anyhow::ensure!(
            arguments.api_socket.is_some() || arguments.api_fd.is_some(),
            "--incoming needs --api-socket or --api-fd: the migration is announced there"
        );
        // A host without KVM is found now and not when the migration arrives.
        vmm::kvm::Host::open()?;
        return Ok((config, None));
    }
    let machine = Machine::boot(config.clone())?;
    Ok((config, Some(Arc::new(machine))))
}

fn serve(arguments: &Arguments, service: &Arc<Service>) -> anyhow::Result<Option<SocketFile>> {
    let socket = match (&arguments.api_socket, arguments.api_fd) {
        (Some(path), _) => Socket::bind(path)?,
        (None, Some(fd)) => Socket::inherited(fd)?,
        (None, None) => return Ok(None),
    };
    Ok(Some(socket.serve(Arc::clone(service))?))
}

fn read_config(path: &Path) -> anyhow::Result<MachineConfig> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(MAX_CONFIG_BYTES + 1).read_to_string(&mut text)
    } else {
        let file =
            std::fs::File::open(path).with_context(|| format!("cannot open the configuration {}", path.display()))?;
        file.take(MAX_CONFIG_BYTES + 1).read_to_string(&mut text)
    };
    let read = read.with_context(|| format!("cannot read the configuration {}", path.display()))?;
    anyhow::ensure!(read as u64 <= MAX_CONFIG_BYTES, "the configuration {} is longer than 1 MiB", path.display());
    serde_json::from_str(&text).with_context(|| {
        format!("the configuration {} is not one of a machine (see headroom-vmm --help for an example)", path.display())
    })
}
