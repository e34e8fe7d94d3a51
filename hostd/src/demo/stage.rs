//! Setting the demo up and taking it down.

use std::time::{Duration, Instant};

use super::DemoError;
use super::load;
use super::observer::{Observer, Target};
use super::scenario::{self, MachinePlan};
use super::story::Story;
use crate::client::{Client, ClientError};
use crate::lab::{Lab, LabHost, interrupt, sweep};

/// Requests a second to a machine that is not being moved.
pub const LIGHT_UDP: u32 = 20;

/// TCP messages a second to a machine that is not being moved.
pub const LIGHT_TCP: u32 = 2;

/// "When" of what happens before the load starts.
const SET_UP: f64 = -1.0;

/// How long a daemon may take to end after SIGTERM.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// How long making or deleting one machine may take.
const MACHINE_DEADLINE: Duration = Duration::from_secs(20);

/// Hosts with running machines on them.
pub fn build(story: &mut Story, mut show: impl FnMut(&Story, &str)) -> Result<Lab, DemoError> {
    let start = Instant::now();
    show(story, "makes hosts");
    let lab = Lab::new(&scenario::hosts())?;
    lab.start_daemons(scenario::adjust)?;
    story.tell(
        SET_UP,
        format!("{} hosts with their daemons after {:.1} s", lab.hosts().len(), start.elapsed().as_secs_f64()),
    );
    if let Some(reason) = lab.unlimited() {
        story.tell(SET_UP, format!("CPU quotas are NOT enforced on this machine: {reason}"));
    }
    show(story, "boots machines");
    for machine in scenario::machines() {
        interrupt::check()?;
        let client = lab.host(machine.host)?.client();
        block_on(&format!("creating {}", machine.name), MACHINE_DEADLINE, create(&client, &machine))?;
        show(story, "boots machines");
    }
    load::wait_booted(lab.observer())?;
    let count = scenario::machines().len();
    story.tell(SET_UP, format!("{count} machines answer after {:.1} s", start.elapsed().as_secs_f64()));
    Ok(lab)
}

async fn create(client: &Client, machine: &MachinePlan) -> Result<(), ClientError> {
    client.create_machine(&machine.request()).await.map(drop)
}

/// Starts to watch, lightly, every machine that may be moved.
pub fn observe(lab: &Lab) -> Result<Observer, DemoError> {
    let busy = scenario::machines().into_iter().filter(|machine| machine.pool == scenario::BUSY_POOL);
    let target = |machine: MachinePlan| Target {
        name: machine.name.to_owned(),
        address: machine.address,
        udp_per_second: LIGHT_UDP,
        tcp_per_second: LIGHT_TCP,
    };
    Ok(Observer::start(lab.observer(), busy.map(target).collect())?)
}

/// Deletes the machines through the daemons, ends the daemons, and removes everything. Returns what was still there after
/// each of these steps although it should not have been.
pub fn take_down(lab: Lab) -> Vec<String> {
    let mut leftovers = Vec::new();
    for host in lab.hosts() {
        leftovers.extend(delete_machines(host));
    }
    for host in lab.hosts() {
        if !host.stop_daemon(STOP_DEADLINE) {
            leftovers.push(format!("hostd on {} did not end by itself", host.name()));
        }
        leftovers.extend(host_leftovers(host));
    }
    leftovers.extend(sweep::leftovers(lab.prefix()).into_iter().filter(|what| what.starts_with("process")));
    let prefix = lab.prefix().to_owned();
    // What would not go is listed by the last line.
    let _ = lab.remove();
    leftovers.extend(sweep::leftovers(&prefix));
    leftovers
}

fn delete_machines(host: &LabHost) -> Vec<String> {
    let client = host.client();
    let delete = async {
        let mut failed = Vec::new();
        for machine in client.machines().await? {
            if let Err(error) = client.delete_machine(&machine.name).await {
                failed.push(format!("machine {} on {}: {error}", machine.name, host.name()));
            }
        }
        Ok(failed)
    };
    let deadline = MACHINE_DEADLINE * 2;
    block_on(&format!("deleting the machines of {}", host.name()), deadline, delete)
        .unwrap_or_else(|error| vec![error.to_string()])
}

/// Taps and files of machines that are still on a host without machines.
pub fn host_leftovers(host: &LabHost) -> Vec<String> {
    let mut found = Vec::new();
    let listing =
        host.namespace().run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).ok().and_then(Result::ok);
    let devices = listing.unwrap_or_default();
    let names = devices.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim()));
    let extra = names.filter(|name| !["lo", "up0", crate::lab::fabric::HOST_BRIDGE].contains(name));
    found.extend(extra.map(|name| format!("network device {name} on {}", host.name())));
    for folder in ["run/machines", "state/machines"] {
        let entries = std::fs::read_dir(host.directory().join(folder)).into_iter().flatten().flatten();
        found.extend(entries.map(|entry| format!("file {}", entry.path().display())));
    }
    found
}

/// Runs one question to a daemon to its end, or to the deadline.
pub fn block_on<T>(
    what: &str,
    deadline: Duration,
    work: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, DemoError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(DemoError::Runtime)?;
    let timeout = || ClientError::Timeout { what: what.to_owned(), seconds: deadline.as_secs_f64() };
    let result = runtime.block_on(async { tokio::time::timeout(deadline, work).await.map_err(|_| timeout())? });
    result.map_err(|source| DemoError::Daemon { what: what.to_owned(), source })
}
