//! Tells the guests what load to make, and asks them how they are, over the network from the observer's namespace.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use headroom_guest::{Client, ClientError, Settings, Status};

use super::scenario::{MachinePlan, machines};
use crate::lab::namespace::Namespace;
use crate::lab::{LabError, LabResult, interrupt};

/// Port of the guest's control protocol.
const CONTROL_PORT: u16 = 9000;

/// How long one question may take: a machine that is being moved answers after its downtime.
const DEADLINE: Duration = Duration::from_millis(700);

/// How often the load is adjusted.
const TICK: Duration = Duration::from_millis(250);

/// Every so many-th tick each guest is asked for its status.
const STATUS_EVERY: u32 = 4;

/// How long a guest may take to boot.
const BOOT_DEADLINE: Duration = Duration::from_secs(30);

/// Waits until every guest says that it is ready.
///
/// # Errors
/// [`LabError::Deadline`] names the machine.
pub fn wait_booted(namespace: &Namespace) -> LabResult<()> {
    namespace.run(|| {
        for machine in machines() {
            let mut client = connect(&machine)?;
            let what = format!("{} to boot", machine.name);
            interrupt::poll(&what, BOOT_DEADLINE, Duration::from_millis(20), || {
                // No answer yet is what is waited for.
                Ok(client.status().ok().filter(|status| status.ready).map(drop))
            })?;
        }
        Ok(())
    })?
}

/// The thread that drives the guests.
pub struct Load {
    statuses: Arc<Mutex<BTreeMap<&'static str, Status>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// Starts to follow the scenario from `origin` on.
    ///
    /// # Errors
    /// When the thread or a socket cannot be made.
    pub fn start(namespace: &Namespace, origin: Instant) -> LabResult<Self> {
        let clients = namespace.run(|| {
            let machines = machines().into_iter();
            machines.map(|machine| connect(&machine).map(|client| (machine, client))).collect::<LabResult<Vec<_>>>()
        })??;
        let (statuses, stop) = (Arc::new(Mutex::default()), Arc::new(AtomicBool::new(false)));
        let driver = Driver { clients, statuses: Arc::clone(&statuses), told: BTreeMap::new(), origin };
        let thread = std::thread::Builder::new().name("load".into()).spawn({
            let stop = Arc::clone(&stop);
            move || driver.run(&stop)
        });
        let thread =
            thread.map_err(|source| LabError::Io { action: "start", path: "the load thread".into(), source })?;
        Ok(Self { statuses, stop, thread: Some(thread) })
    }

    /// The last status of each guest.
    pub fn statuses(&self) -> BTreeMap<&'static str, Status> {
        self.statuses.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Asks every guest once more; one that does not answer is missing from the result.
///
/// # Errors
/// When the namespace is gone.
pub fn final_statuses(namespace: &Namespace) -> LabResult<BTreeMap<&'static str, Status>> {
    namespace.run(|| {
        let answers = machines().into_iter().filter_map(|machine| {
            let mut client = connect(&machine).ok()?;
            client.set_deadline(Duration::from_secs(3));
            client.status().ok().map(|status| (machine.name, status))
        });
        answers.collect()
    })
}

struct Driver {
    clients: Vec<(MachinePlan, Client)>,
    statuses: Arc<Mutex<BTreeMap<&'static str, Status>>>,
    told: BTreeMap<&'static str, u8>,
    origin: Instant,
}

impl Driver {
    fn run(mut self, stop: &AtomicBool) {
        for tick in 0u32.. {
            for index in 0..self.clients.len() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                self.drive(index, tick % STATUS_EVERY == 0);
            }
            let next = self.origin + TICK * tick;
            std::thread::sleep(next.saturating_duration_since(Instant::now()).min(TICK));
        }
    }

    fn drive(&mut self, index: usize, ask: bool) {
        let Some((machine, client)) = self.clients.get_mut(index) else { return };
        let percent = machine.cpu_percent(self.origin.elapsed().as_secs_f64());
        let answer = if self.told.get(machine.name) != Some(&percent) {
            client.set(Settings { cpu_percent: Some(percent), ..Settings::default() })
        } else if ask {
            client.status()
        } else {
            return;
        };
        // A request that got lost in the downtime is made again at the next tick.
        if let Ok(status) = answer {
            self.told.insert(machine.name, percent);
            self.statuses.lock().unwrap_or_else(PoisonError::into_inner).insert(machine.name, status);
        }
    }
}

fn connect(machine: &MachinePlan) -> LabResult<Client> {
    let address = (machine.address, CONTROL_PORT).into();
    let failed = |error: ClientError| LabError::Io {
        action: "reach the control port of",
        path: machine.name.into(),
        source: std::io::Error::other(error),
    };
    let mut client = Client::connect(address).map_err(failed)?;
    client.set_deadline(DEADLINE);
    Ok(client)
}
