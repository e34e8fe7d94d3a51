//! From a record to a running VMM process whose API answers.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use vmm::api::MachineInfo;
use vmm::api::client::Client;
use vmm::config::{BalloonConfig, DiskConfig, DiskSource, MachineConfig, NetworkConfig, SerialConfig, TapSource};

use super::entry::MachineRecord;
use super::process::{Process, ProcessId, Program, log_tail};
use super::{MachineError, disk, tap};
use crate::api::types::KernelChoice;
use crate::config::HostConfig;
use crate::digest::{hex, sha256};

/// How long a VMM may take until its API answers: its RAM is only reserved, so this is long even on a busy host.
const START_PATIENCE: Duration = Duration::from_secs(20);

/// Where the program is: as configured, beside the running program, or in `PATH`.
///
/// # Errors
///
/// [`MachineError::NoVmm`] with the place where it should be.
pub fn find_vmm(configured: Option<&Path>) -> Result<PathBuf, MachineError> {
    if let Some(path) = configured {
        return if path.is_file() { Ok(path.to_owned()) } else { Err(MachineError::NoVmm { path: path.to_owned() }) };
    }
    let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(|folder| folder.join("headroom-vmm")));
    let in_path = std::env::var_os("PATH").unwrap_or_default();
    let places =
        beside.iter().cloned().chain(std::env::split_paths(&in_path).map(|folder| folder.join("headroom-vmm")));
    for place in places {
        if place.is_file() {
            return Ok(place);
        }
    }
    Err(MachineError::NoVmm { path: beside.unwrap_or_else(|| "headroom-vmm".into()) })
}

/// Starts the VMM of `record` and waits until its API answers. With `incoming` it waits for a migration.
///
/// Should hostd be killed meanwhile, no process is left that nobody knows of: `note` is told of it before it is told what to do, and
/// without that it ends by itself.
///
/// # Errors
///
/// With the VMM's own last words where it has some, or that of `note`. Neither process nor tap nor file is left behind.
pub async fn launch(
    config: &HostConfig,
    record: &MachineRecord,
    incoming: bool,
    note: impl FnOnce(ProcessId) -> Result<(), MachineError>,
) -> Result<(Process, MachineInfo), MachineError> {
    let folder = config.machine_run_dir(&record.name);
    let guard = FolderGuard { folder: Some(folder.clone()) };
    let _ = std::fs::remove_dir_all(&folder);
    disk::make_folder(&folder)?;
    // The VMM leaves its mark there when the machine arrives, and cannot be allowed a folder that is made later.
    disk::make_folder(&config.machine_state_dir(&record.name))?;
    let log = folder.join("vmm.log");
    let (program, machine) = prepare(config, record, incoming, &folder, &log)?;
    let path = program.path.clone();
    let (process, mut input) = Process::spawn(program).map_err(|source| MachineError::Spawn { path, source })?;
    let process = KillGuard { process: Some(process) };
    note(process.get().id())?;
    // One that has ended meanwhile says why in its log.
    let _ = input.write_all(&machine).await;
    drop(input);
    let info = wait_for_api(&record.name, process.get(), &folder.join("api.sock"), &log).await?;
    guard.keep();
    Ok((process.keep(), info))
}

/// The command line of a VMM, with taps open, and its configuration.
fn prepare(
    config: &HostConfig,
    record: &MachineRecord,
    incoming: bool,
    folder: &Path,
    log: &Path,
) -> Result<(Program, Vec<u8>), MachineError> {
    let vmm = find_vmm(config.vmm.as_deref())?;
    let (descriptors, networks) = open_taps(config, record)?;
    let kernel = if incoming { None } else { Some(kernel_path(config, &record.kernel)?) };
    let machine = MachineConfig {
        name: record.name.clone(),
        vcpus: record.vcpus,
        memory_mib: record.memory_mib,
        kernel,
        initrd: record.initrd.clone().filter(|_| !incoming),
        cmdline: record.cmdline.clone(),
        disks: record.disks.iter().map(disk_config).collect(),
        networks,
        balloon: record.balloon.then(BalloonConfig::default),
        serial: SerialConfig::File(folder.join("console.log")),
        dirty_tracking: config.migration.dirty_tracking,
    };
    // It reads its standard input; the file is for whoever wants to know what it was.
    let machine = write_json(&folder.join("machine.json"), &machine)?;
    let mut arguments = vec!["--config".into(), "-".into(), "--api-socket".into(), folder.join("api.sock").into()];
    if incoming {
        arguments.push("--incoming".into());
    }
    for (path, access) in reach(config, record, folder) {
        let mut allowed = path.into_os_string();
        allowed.push(access);
        arguments.extend(["--allow-path".into(), allowed]);
    }
    Ok((Program { path: vmm, arguments, log: log.to_owned(), descriptors }, machine))
}

/// What a VMM opens besides what its configuration names: its sockets and logs, what hostd makes for the machine, and the identity of
/// this host when it migrates. Of that the folders, since a new certificate is another file.
fn reach(config: &HostConfig, record: &MachineRecord, folder: &Path) -> Vec<(PathBuf, &'static str)> {
    let mut reach = vec![(folder.to_owned(), ""), (config.machine_state_dir(&record.name), "")];
    for file in [&config.tls.ca, &config.tls.certificate, &config.tls.key] {
        let identity = (file.parent().unwrap_or(file).to_owned(), ":ro");
        if !reach.contains(&identity) {
            reach.push(identity);
        }
    }
    reach
}

pub(super) fn disk_config(disk: &crate::api::types::Disk) -> DiskConfig {
    let source = DiskSource::Path(disk.path.clone());
    DiskConfig { id: disk.id.clone(), source, read_only: disk.read_only, shared: disk.shared }
}

type Taps = (Vec<OwnedFd>, Vec<NetworkConfig>);

fn open_taps(config: &HostConfig, record: &MachineRecord) -> Result<Taps, MachineError> {
    let mut descriptors = Vec::new();
    let mut networks = Vec::new();
    for network in &record.networks {
        let tap = tap::create(&network.tap, config.bridge.as_deref())?;
        let source = TapSource::Fd(tap.as_raw_fd());
        networks.push(NetworkConfig { id: network.id.clone(), source, mac: network.mac.clone() });
        descriptors.push(tap);
    }
    Ok((descriptors, networks))
}

async fn wait_for_api(name: &str, process: &Process, socket: &Path, log: &Path) -> Result<MachineInfo, MachineError> {
    let deadline = Instant::now() + START_PATIENCE;
    let mut ended = process.watch();
    loop {
        let client = Client::new(socket).with_timeout(Duration::from_secs(5));
        let answer = tokio::task::spawn_blocking(move || client.machine()).await;
        if let Ok(Ok(info)) = answer {
            return Ok(info);
        }
        let failed = |what: String| MachineError::Vmm { name: name.to_owned(), what, log: last_words(log) };
        if Instant::now() >= deadline {
            return Err(failed(format!("did not answer within {} s", START_PATIENCE.as_secs())));
        }
        tokio::select! {
            _ = ended.wait_for(Option::is_some) => {
                let how = process.ended().map(|end| end.to_string());
                return Err(failed(how.unwrap_or_default()));
            }
            () = tokio::time::sleep(Duration::from_millis(2)) => {}
        }
    }
}

/// The end of a VMM's log, or a word about its absence.
pub fn last_words(log: &Path) -> String {
    match log_tail(log, 3) {
        words if words.is_empty() => "(nothing)".to_owned(),
        words => words,
    }
}

/// The kernel as a file; the bundled one is written once for each version of it.
fn kernel_path(config: &HostConfig, kernel: &KernelChoice) -> Result<PathBuf, MachineError> {
    match kernel {
        KernelChoice::Path(path) => {
            let missing = |error| {
                MachineError::Invalid(format!(
                    "kernel {}: {error}; give a file on this host, or `bundled`",
                    path.display()
                ))
            };
            std::fs::File::open(path).map_err(missing)?;
            Ok(path.clone())
        }
        KernelChoice::Bundled => bundled_kernel(&config.run_dir),
    }
}

/// Writes the bundled guest into `folder` unless it is there already, and returns its path.
///
/// # Errors
///
/// If it cannot be written.
pub fn bundled_kernel(folder: &Path) -> Result<PathBuf, MachineError> {
    let image = headroom_guest::IMAGE;
    let path = folder.join(format!("guest-{}.elf", hex(&sha256(image)[..6])));
    if path.is_file() {
        return Ok(path);
    }
    // Written aside and renamed: another machine that starts at this moment sees all of it or nothing.
    let unique = crate::digest::new_id("guest").map_err(|error| MachineError::Invalid(error.to_string()))?;
    let aside = folder.join(format!(".{unique}"));
    let write = || -> io::Result<()> {
        std::fs::write(&aside, image)?;
        std::fs::rename(&aside, &path)
    };
    write().map_err(|source| {
        let _ = std::fs::remove_file(&aside);
        MachineError::File { action: "write the bundled guest to", path: path.clone(), source }
    })?;
    Ok(path)
}

/// Returns what was written.
fn write_json<T: serde::Serialize>(path: &Path, value: &T) -> Result<Vec<u8>, MachineError> {
    let write = || -> io::Result<Vec<u8>> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        let text = serde_json::to_vec_pretty(value)?;
        file.write_all(&text)?;
        Ok(text)
    };
    write().map_err(|source| MachineError::File { action: "write", path: path.to_owned(), source })
}

/// Removes a machine's sockets and logs unless told to keep them.
struct FolderGuard {
    folder: Option<PathBuf>,
}

impl FolderGuard {
    fn keep(mut self) {
        self.folder = None;
    }
}

impl Drop for FolderGuard {
    fn drop(&mut self) {
        if let Some(folder) = &self.folder {
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

/// Ends a process unless told to keep it.
struct KillGuard {
    process: Option<Process>,
}

impl KillGuard {
    fn get(&self) -> &Process {
        // Only `keep` empties it, and that consumes the guard.
        self.process.as_ref().unwrap_or_else(|| unreachable!("the guard holds its process until it is consumed"))
    }

    fn keep(mut self) -> Process {
        self.process.take().unwrap_or_else(|| unreachable!("the guard holds its process until it is consumed"))
    }
}

impl Drop for KillGuard {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            process.kill();
        }
    }
}
