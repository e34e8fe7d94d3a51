//! `headroom machine`.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Failure;
use super::machine_text::{balloon, details, dirty_rate, reason, table};
use super::output::Output;
use crate::api::types::{
    CreateMachine, DirtyRateRequest, Disk, DiskSize, KernelChoice, MigrationLimits, NewDisk, NewNetwork, ProbeSpec,
    StopMachine,
};
use crate::client::Client;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Create and start a machine.
    #[command(after_help = EXAMPLES)]
    Create(Box<Create>),
    /// List the machines of this host.
    #[command(visible_alias = "ls")]
    List,
    /// Show one machine.
    Show {
        /// Machine.
        name: String,
    },
    /// Start a stopped machine again.
    Start {
        /// Machine.
        name: String,
    },
    /// Stop a machine. Its disks stay, and it can be started again.
    #[command(
        after_help = "Its guest is asked to shut down, as by Ctrl-Alt-Del on a PC, and runs on if it does not within the timeout. --force pulls \
        the plug instead: what the guest has not written to its disks is lost. Refused while the machine moves."
    )]
    Stop {
        /// Machine.
        name: String,
        /// How long the guest may take, in seconds: 1 to 3600.
        #[arg(long, value_name = "SECONDS", default_value_t = StopMachine::default().timeout_s)]
        timeout: u64,
        /// Do not ask the guest.
        #[arg(long)]
        force: bool,
    },
    /// Show a machine's balloon, or ask the guest to give memory back to the host.
    #[command(
        after_help = "The guest gives back what it can spare, and that takes a while: ask again to see how far it is. What it reports \
        as free it gives back by itself. Needs a machine that was created with --balloon."
    )]
    Balloon {
        /// Machine.
        name: String,
        /// Ask for so much in MiB; 0 returns all of it to the guest.
        #[arg(long, value_name = "MIB")]
        target: Option<u64>,
    },
    /// Make a disk of a machine larger.
    #[command(
        after_help = "The guest sees the new size at once, and its file system has to be enlarged in it. A disk cannot shrink. An image \
        that is a file grows here, and takes room only as it is written; a block device, or an image that the guest may only read, is \
        enlarged first. Refused while the machine moves."
    )]
    Resize {
        /// Machine.
        name: String,
        /// Disk.
        disk: String,
        /// Its size in MiB.
        #[arg(value_name = "MIB")]
        size: u64,
    },
    /// Give a stopped machine another disk.
    #[command(
        after_help = "It becomes the last one in the order in which the guest sees them. A guest cannot be told that a disk comes, so it has to \
        be stopped first. Refused while the machine moves."
    )]
    Attach {
        /// Machine.
        name: String,
        /// As for `create`: its size in MiB, or the path of an image on the host, with `:ro` or `:shared` at its end.
        #[arg(value_name = "MIB|PATH")]
        disk: String,
        /// Its name; without one the first `diskN` that is free.
        #[arg(long)]
        id: Option<String>,
    },
    /// Take a disk from a stopped machine. Its image stays where it is.
    #[command(
        after_help = "A guest cannot be told that a disk goes, so it has to be stopped first. The disks behind it move up by one in the \
        order in which the guest sees them. Refused while the machine moves."
    )]
    Detach {
        /// Machine.
        name: String,
        /// Disk.
        disk: String,
    },
    /// Estimate how fast a machine dirties its memory, without a migration.
    #[command(
        after_help = "A sample of its pages is compared with what they held; the guest does not notice, and a migration is not disturbed: \
        while one is under way, its own measurement is the answer."
    )]
    DirtyRate {
        /// Machine.
        name: String,
        /// How long to look, in seconds: 0.1 to 10.
        #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
        seconds: f64,
    },
    /// Stop a machine and delete it with its disks.
    #[command(visible_alias = "rm")]
    Delete {
        /// Machine.
        name: String,
    },
}

const EXAMPLES: &str = "\
Examples:
  headroom machine create vm1 --memory 128 --disk 64 --network --cmdline 'ip=10.0.0.5/24 sweep=16:50 hb=100'
  headroom machine create db --memory 2048 --vcpus 2 --kernel /boot/vmlinux --disk /srv/db.raw --ping 10.0.0.7
  headroom machine create --file vm.json        all options of the API, `-` reads from standard input";

/// What a new machine is to be.
#[derive(Debug, Args)]
pub(super) struct Create {
    /// Name: letters, digits, `-` and `_`.
    #[arg(required_unless_present = "file", conflicts_with = "file")]
    name: Option<String>,
    /// Read the whole request as JSON from a file; `-` is standard input.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// RAM in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    memory: u64,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1)]
    vcpus: u16,
    /// Kernel: `bundled`, or a file on the host.
    #[arg(long, default_value = "bundled")]
    kernel: String,
    /// Initial RAM disk, a file on the host.
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, default_value = "")]
    cmdline: String,
    /// A disk: its size in MiB, or the path of an image on the host (`:ro` at its end makes it read-only,
    /// `:shared` says that the other hosts have it under the same path, so that it need not be copied). Repeatable.
    #[arg(long = "disk", value_name = "MIB|PATH")]
    disks: Vec<String>,
    /// A network card, with a MAC address if one is given. Repeatable.
    #[arg(long = "network", value_name = "MAC", num_args = 0..=1, default_missing_value = "")]
    networks: Vec<String>,
    /// A balloon: the guest's driver gives free memory back, and migrations do not send it.
    #[arg(long)]
    balloon: bool,
    /// After a migration this address must answer a ping. Repeatable.
    #[arg(long = "ping", value_name = "ADDRESS")]
    pings: Vec<IpAddr>,
    /// After a migration this address must accept a TCP connection. Repeatable.
    #[arg(long = "tcp", value_name = "ADDRESS:PORT")]
    tcps: Vec<SocketAddr>,
    /// After a migration this address must echo over TCP. Repeatable.
    #[arg(long = "tcp-echo", value_name = "ADDRESS:PORT")]
    echos: Vec<SocketAddr>,
}

impl Create {
    fn request(self) -> Result<CreateMachine, Failure> {
        if let Some(path) = self.file {
            let text =
                if path.as_os_str() == "-" { io::read_to_string(io::stdin()) } else { std::fs::read_to_string(&path) };
            let text = text.map_err(|error| Failure::Other(format!("cannot read {}: {error}", path.display())))?;
            let parsed = serde_json::from_str(&text);
            return parsed.map_err(|error| Failure::Other(format!("{} is not a machine: {error}", path.display())));
        }
        let pings = self.pings.into_iter().map(ProbeSpec::Ping);
        let tcps = self.tcps.into_iter().map(ProbeSpec::Tcp);
        let echos = self.echos.into_iter().map(ProbeSpec::TcpEcho);
        Ok(CreateMachine {
            name: self.name.unwrap_or_default(),
            vcpus: self.vcpus,
            memory_mib: self.memory,
            kernel: KernelChoice::from(self.kernel),
            initrd: self.initrd,
            cmdline: self.cmdline,
            disks: self.disks.iter().enumerate().map(|(index, text)| disk(disk_id(index), text)).collect(),
            networks: self.networks.iter().enumerate().map(|(index, mac)| network(index, mac)).collect(),
            balloon: self.balloon,
            probes: pings.chain(tcps).chain(echos).collect(),
            limits: MigrationLimits::default(),
        })
    }
}

fn disk_id(index: usize) -> String {
    format!("disk{index}")
}

/// The first that none of `disks` has.
fn free_id(disks: &[Disk]) -> String {
    let free = |id: &String| disks.iter().all(|disk| disk.id != *id);
    (0..).map(disk_id).find(free).unwrap_or_default()
}

fn disk(id: String, text: &str) -> NewDisk {
    if let Ok(size) = text.parse() {
        return NewDisk { id, size_mib: Some(size), path: None, read_only: false, shared: false };
    }
    let (path, read_only) = flag(text, ":ro");
    let (path, shared) = flag(path, ":shared");
    NewDisk { id, size_mib: None, path: Some(path.into()), read_only, shared }
}

/// Takes `name` off the end of `text`, if it is there.
fn flag<'a>(text: &'a str, name: &str) -> (&'a str, bool) {
    text.strip_suffix(name).map_or((text, false), |rest| (rest, true))
}

fn network(index: usize, mac: &str) -> NewNetwork {
    NewNetwork { id: format!("net{index}"), mac: (!mac.is_empty()).then(|| mac.to_owned()) }
}

pub(super) async fn run(client: &Client, output: &Output, command: Command) -> Result<(), Failure> {
    match command {
        Command::Create(create) => {
            let machine = client.create_machine(&create.request()?).await?;
            output.print(&machine, |machine| {
                format!("{} runs on host {}\n{}", machine.name, machine.host, details(machine))
            })?;
        }
        Command::List => output.print(&client.machines().await?, |machines| table(machines))?,
        Command::Show { name } => output.print(&client.machine(&name).await?, details)?,
        Command::Start { name } => {
            output.print(&client.start_machine(&name).await?, |machine| format!("{} runs again", machine.name))?;
        }
        Command::Stop { name, timeout, force } => {
            let how = StopMachine { timeout_s: timeout, force };
            output.print(&client.stop_machine(&name, &how).await?, |machine| {
                format!("{} is stopped{}", machine.name, reason(machine))
            })?;
        }
        Command::Balloon { name, target } => {
            let info = match target {
                Some(target) => client.inflate(&name, target).await?,
                None => client.balloon(&name).await?,
            };
            output.print(&info, balloon)?;
        }
        Command::Resize { name, disk, size } => {
            // Too much to count is too much, which is refused in words.
            let size = DiskSize { id: disk, bytes: size.saturating_mul(1 << 20) };
            output.print(&client.resize_disk(&name, &size).await?, details)?;
        }
        Command::Attach { name, disk: text, id } => {
            let id = match id {
                Some(id) => id,
                None => free_id(&client.machine(&name).await?.disks),
            };
            output.print(&client.attach_disk(&name, &disk(id, &text)).await?, details)?;
        }
        Command::Detach { name, disk } => {
            output.print(&client.detach_disk(&name, &disk).await?, |disk| {
                format!("{} is detached from {name}; its image stays: {}", disk.id, disk.path.display())
            })?;
        }
        Command::DirtyRate { name, seconds } => {
            // What makes no sense becomes 0 or the largest number, and is refused in words.
            let request = DirtyRateRequest { interval_ms: (seconds * 1000.0).round() as u64 };
            output.print(&client.dirty_rate(&name, &request).await?, |rate| dirty_rate(&name, rate))?;
        }
        Command::Delete { name } => {
            client.delete_machine(&name).await?;
            output.print(&serde_json::json!({"deleted": name}), |_| format!("{name} is deleted"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_sizes_or_paths() {
        assert_eq!(disk(disk_id(0), "64").size_mib, Some(64));
        let image = disk(disk_id(1), "/srv/x.raw:ro");
        assert_eq!((image.id.as_str(), image.path, image.read_only), ("disk1", Some("/srv/x.raw".into()), true));
        let image = disk(disk_id(1), "/mnt/x.raw:shared:ro");
        assert_eq!((image.path, image.read_only, image.shared), (Some("/mnt/x.raw".into()), true, true));
        assert_eq!(network(0, "").mac, None);
        let used = |id: &str| Disk {
            id: id.into(),
            path: "/x".into(),
            bytes: 1,
            owned: true,
            read_only: false,
            shared: false,
        };
        assert_eq!(free_id(&[]), "disk0");
        assert_eq!(free_id(&[used("disk0"), used("disk2"), used("data")]), "disk1");
    }
}
