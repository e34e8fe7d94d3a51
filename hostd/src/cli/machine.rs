//! `headroom machine`.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use vmm::api::BalloonInfo;

use super::Failure;
use super::output::{Output, Table, bytes, duration, or_dash, word};
use crate::api::types::{
    CreateMachine, DirtyRate, DirtyRateRequest, DirtyRateSource, DiskSize, KernelChoice, Machine, MigrationLimits,
    NewDisk, NewNetwork, ProbeSpec, Usage,
};
use crate::client::Client;
use crate::clock::utc;

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
    /// Take a disk from a stopped machine. Its image stays where it is.
    #[command(
        after_help = "A guest cannot be told that a disk goes, so it has to be turned off first. The disks behind it move up by one in the \
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
            disks: self.disks.iter().enumerate().map(|(index, text)| disk(index, text)).collect(),
            networks: self.networks.iter().enumerate().map(|(index, mac)| network(index, mac)).collect(),
            balloon: self.balloon,
            probes: pings.chain(tcps).chain(echos).collect(),
            limits: MigrationLimits::default(),
        })
    }
}

fn disk(index: usize, text: &str) -> NewDisk {
    let id = format!("disk{index}");
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

fn table(machines: &[Machine]) -> String {
    let mut table = Table::new(&["NAME", "STATUS", "VCPUS", "MEMORY", "CPU", "RESIDENT", "DISK/S", "NETWORK/S"]);
    for machine in machines {
        let usage = |show: fn(&Usage) -> String| or_dash(machine.usage.as_ref().map(show));
        table.row(vec![
            machine.name.clone(),
            word(machine.status),
            machine.vcpus.to_string(),
            format!("{} MiB", machine.memory_mib),
            usage(|usage| format!("{:.2}", usage.cpu_cores)),
            usage(|usage| format!("{:.0} MiB", usage.memory_mib)),
            usage(|usage| bytes(usage.disk_bytes_per_second)),
            usage(|usage| bytes(usage.network_bytes_per_second)),
        ]);
    }
    table.text("no machines on this host; `headroom machine create --help` shows how to make one")
}

fn balloon(info: &BalloonInfo) -> String {
    let mut text = format!(
        "balloon   {} given back, {} asked for\nreported  {} as free since the machine came to this host, each time anew\n",
        bytes(info.actual_bytes as f64),
        bytes(info.target_bytes as f64),
        bytes(info.reported_bytes as f64),
    );
    let told = &info.statistics;
    let figures = [("total", told.total_bytes), ("free", told.free_bytes), ("available", told.available_bytes)];
    let figures: Vec<String> = figures
        .into_iter()
        .filter_map(|(what, figure)| figure.map(|figure| format!("{what} {}", bytes(figure as f64))))
        .collect();
    if !figures.is_empty() {
        text.push_str(&format!("guest     {}\n", figures.join(", ")));
    }
    text
}

fn dirty_rate(name: &str, rate: &DirtyRate) -> String {
    let Some(value) = rate.bytes_per_second.map(bytes) else {
        return format!("{name}: a migration is under way and has measured no dirty rate yet\n");
    };
    match rate.source {
        DirtyRateSource::Stopped => return format!("{name} does not run, and dirties nothing\n"),
        DirtyRateSource::Migration => {
            let held = match rate.throttle_percent {
                0 => String::new(),
                percent => format!("; its vCPUs are held for up to {percent} % of their time, it would dirty more"),
            };
            return format!(
                "{name} dirties {value}/s with its disks, as the migration that is under way measured{held}\n"
            );
        }
        DirtyRateSource::Sampled => {}
    }
    let bound = |value: Option<f64>| or_dash(value.map(bytes));
    let after_ms = rate.looks.last().map_or(0.0, |look| look.after_ms);
    let mut text = format!(
        "{name} dirties {}{value}/s ({} to {} with 95 %; {} pages sampled for {})\n",
        if rate.lower_bound { "at least " } else { "" },
        bound(rate.low_bytes_per_second),
        bound(rate.high_bytes_per_second),
        rate.sampled_pages,
        duration(after_ms),
    );
    if rate.lower_bound {
        text.push_str(
            "nearly all of its memory was different: it may be faster by any factor, look for a shorter time\n",
        );
    }
    if let Some(set) = rate.working_set_bytes.map(bytes) {
        let peak = bound(rate.peak_bytes_per_second);
        text.push_str(&format!("it writes {set} again and again, and {peak}/s before it comes to the same pages\n"));
    }
    text
}

fn details(machine: &Machine) -> String {
    let mut text = format!(
        "status    {}{}\nhost      {} (pool {})\nsize      {} vCPU, {} MiB\nkernel    {}\n",
        word(machine.status),
        machine.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default(),
        machine.host,
        machine.pool,
        machine.vcpus,
        machine.memory_mib,
        String::from(machine.kernel.clone()),
    );
    if !machine.cmdline.is_empty() {
        text.push_str(&format!("cmdline   {}\n", machine.cmdline));
    }
    if machine.balloon {
        text.push_str("balloon   the guest gives free memory back\n");
    }
    for disk in &machine.disks {
        let shared = if disk.shared { ", shared" } else { "" };
        text.push_str(&format!("disk      {} {} {}{shared}\n", disk.id, bytes(disk.bytes as f64), disk.path.display()));
    }
    for network in &machine.networks {
        text.push_str(&format!("network   {} {} on {}\n", network.id, network.mac, network.tap));
    }
    if let Some(usage) = &machine.usage {
        text.push_str(&format!(
            "usage     {:.2} cores, {:.0} MiB, disk {}/s, network {}/s\n",
            usage.cpu_cores,
            usage.memory_mib,
            bytes(usage.disk_bytes_per_second),
            bytes(usage.network_bytes_per_second)
        ));
    }
    if let Some(migration) = &machine.migration {
        text.push_str(&format!("moved by  {migration}\n"));
    }
    text.push_str(&format!("created   {} UTC\n", utc(machine.created_unix_ms)));
    text.push_str(&format!("process   {}\n", or_dash(machine.pid.map(|pid| pid.to_string()))));
    text.push_str(&format!("console   {}\n", machine.console.display()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dirty_rate_reads_well() {
        let mib = |count: f64| Some(count * 1048576.0);
        let mut rate = DirtyRate {
            bytes_per_second: mib(48.0),
            low_bytes_per_second: mib(44.0),
            high_bytes_per_second: mib(52.5),
            sampled_pages: 2048,
            ..DirtyRate::default()
        };
        let text = dirty_rate("vm1", &rate);
        assert!(text.starts_with("vm1 dirties 48.0 MiB/s (44.0 MiB to 52.5 MiB with 95 %; 2048 pages"), "{text}");
        (rate.lower_bound, rate.working_set_bytes, rate.peak_bytes_per_second) = (true, mib(48.0), mib(100.0));
        let text = dirty_rate("vm1", &rate);
        assert!(
            text.contains("at least 48.0 MiB/s") && text.contains("writes 48.0 MiB again and again, and 100.0 MiB/s")
        );
        (rate.source, rate.throttle_percent) = (DirtyRateSource::Migration, 70);
        assert!(dirty_rate("vm1", &rate).contains("up to 70 %"));
        rate.bytes_per_second = None;
        assert!(dirty_rate("vm1", &rate).contains("no dirty rate yet"));
    }

    #[test]
    fn disks_are_sizes_or_paths() {
        assert_eq!(disk(0, "64").size_mib, Some(64));
        let image = disk(1, "/srv/x.raw:ro");
        assert_eq!((image.id.as_str(), image.path, image.read_only), ("disk1", Some("/srv/x.raw".into()), true));
        let image = disk(1, "/mnt/x.raw:shared:ro");
        assert_eq!((image.path, image.read_only, image.shared), (Some("/mnt/x.raw".into()), true, true));
        assert_eq!(network(0, "").mac, None);
    }
}
