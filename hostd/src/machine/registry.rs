//! All machines of this host, and everything that is done with them.

mod disks;
mod life;
mod stop;
#[cfg(test)]
mod tests;
mod turn;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm::api::client::ClientError;
use vmm::api::{MachineInfo, MachineState};

use super::entry::{Entry, MachineRecord};
use super::launch::{last_words, launch};
use super::partial::Partial;
use super::process::{End, Process, ProcessId};
use super::{MachineError, chain, disk, name, spec};
use crate::api::types::{Capacity, CreateMachine, Machine, MachineStatus, Network};
use crate::clock::unix_ms;
use crate::config::HostConfig;
use crate::metrics::room::{Kept, Room};
use crate::security::audit::Audit;
use crate::store::Store;
use crate::store::embedded::Kind;

type Result<T> = std::result::Result<T, MachineError>;

/// The machines of this host; cheap to clone.
#[derive(Clone, Debug)]
pub struct Machines {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Arc<HostConfig>,
    store: Store,
    room: Room,
    partial: Partial,
    entries: Mutex<BTreeMap<String, Arc<Entry>>>,
}

impl Machines {
    /// No machines yet; [`Machines::recover`] finds those of an earlier hostd.
    pub fn new(config: Arc<HostConfig>, store: Store, room: Room) -> Self {
        let partial = Partial::new(config.partial_dir(), config.migration.keep_disks_s);
        Self { inner: Arc::new(Inner { config, store, room, partial, entries: Mutex::default() }) }
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Entry>>> {
        self.inner.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What this host can give.
    pub fn capacity(&self) -> Capacity {
        self.inner.room.capacity()
    }

    /// All machines, by name.
    pub fn all(&self) -> Vec<Arc<Entry>> {
        self.entries().values().cloned().collect()
    }

    /// All machines as the API shows them.
    pub fn views(&self) -> Vec<Machine> {
        self.all().iter().map(|entry| entry.view(&self.inner.config)).collect()
    }

    /// One machine.
    ///
    /// # Errors
    ///
    /// [`MachineError::Unknown`].
    pub fn get(&self, name: &str) -> Result<Arc<Entry>> {
        self.entries().get(name).cloned().ok_or_else(|| MachineError::Unknown(name.to_owned()))
    }

    /// One machine as the API shows it.
    ///
    /// # Errors
    ///
    /// [`MachineError::Unknown`].
    pub fn view(&self, name: &str) -> Result<Machine> {
        Ok(self.get(name)?.view(&self.inner.config))
    }

    /// Creates and starts a machine.
    ///
    /// # Errors
    ///
    /// Whatever failed; nothing is left behind.
    pub async fn create(&self, request: &CreateMachine) -> Result<Machine> {
        spec::check(request)?;
        let folder = self.inner.config.machine_state_dir(&request.name);
        let record = MachineRecord {
            name: request.name.clone(),
            vcpus: request.vcpus,
            memory_mib: request.memory_mib,
            kernel: request.kernel.clone(),
            initrd: request.initrd.clone(),
            cmdline: request.cmdline.clone(),
            disks: disk::plan(&folder, &request.disks, &self.inner.config.shared_dirs)?,
            networks: self.networks(request),
            balloon: request.balloon,
            probes: request.probes.clone(),
            limits: request.limits.clone(),
            created_unix_ms: unix_ms(),
            status: MachineStatus::Creating,
            process: None,
            migration: None,
            arrived: false,
            why_stopped: None,
            incomplete: false,
        };
        let (entry, _) = self.build(record, None).await?;
        entry.state().record.status = MachineStatus::Running;
        if let Err(error) = self.save(&entry) {
            self.discard(&entry).await?;
            return Err(error);
        }
        Ok(entry.view(&self.inner.config))
    }

    /// Makes everything for a machine that is to arrive from host `source` by migration `record.migration`; its VMM waits. True if its
    /// disks hold what an earlier attempt has left.
    ///
    /// # Errors
    ///
    /// Whatever failed; nothing is left behind.
    pub async fn prepare_incoming(&self, mut record: MachineRecord, source: &str) -> Result<(Arc<Entry>, bool)> {
        let folder = self.inner.config.machine_state_dir(&record.name);
        for disk in &mut record.disks {
            if !name::device_ok(&disk.id) {
                return Err(MachineError::Invalid(format!("disk id `{}` is not a name", disk.id.escape_debug())));
            }
            // That this host has it was checked.
            disk.owned = !disk.shared;
            if disk.owned {
                disk.path = folder.join(format!("{}.raw", disk.id));
            }
        }
        for network in &mut record.networks {
            network.tap = name::tap_name(&self.inner.config.host, &record.name, &network.id);
        }
        record.status = MachineStatus::Incoming;
        record.process = None;
        record.arrived = true;
        self.build(record, Some(source)).await
    }

    fn networks(&self, request: &CreateMachine) -> Vec<Network> {
        let network = |card: &crate::api::types::NewNetwork| Network {
            id: card.id.clone(),
            tap: name::tap_name(&self.inner.config.host, &request.name, &card.id),
            mac: spec::mac(&request.name, card),
        };
        request.networks.iter().map(network).collect()
    }

    /// Enters a machine, makes its disks and starts its VMM, or leaves nothing.
    async fn build(&self, record: MachineRecord, source: Option<&str>) -> Result<(Arc<Entry>, bool)> {
        if self.entries().contains_key(&record.name) {
            return Err(MachineError::Exists(record.name));
        }
        // Before the record says that they are ours: whatever goes wrong later, images of the record are removed.
        disk::check_absent(&record.disks)?;
        let entry = self.enter(record, source)?;
        let guard = EntryGuard { machines: self, entry: Some(Arc::clone(&entry)) };
        self.save(&entry)?;
        let record = entry.record();
        let folder = self.inner.config.machine_state_dir(&record.name);
        disk::make_folder(&folder)?;
        let reused = source.map(|source| self.inner.partial.hand_over(&record, source)).unwrap_or_default();
        disk::create(&folder, &record.disks, &reused)?;
        let note = |id| self.note_process(&entry, id);
        let (process, info) = launch(&self.inner.config, &record, source.is_some(), note).await?;
        self.attach(&entry, process, Some(&info));
        self.save(&entry)?;
        guard.keep();
        Ok((entry, !reused.is_empty()))
    }

    /// Takes the name and the room, both or neither.
    fn enter(&self, record: MachineRecord, source: Option<&str>) -> Result<Arc<Entry>> {
        let mut entries = self.entries();
        if entries.contains_key(&record.name) {
            return Err(MachineError::Exists(record.name));
        }
        let present: Vec<MachineRecord> = entries.values().map(|entry| entry.record()).collect();
        let partial = &self.inner.partial;
        let check = || {
            let kept = Kept {
                bytes: partial.allocated_bytes(),
                reusable: source.map_or(0, |source| partial.reusable_bytes(&record, source)),
            };
            self.inner.room.check(&self.inner.config.host, &record, &present, kept)
        };
        match check() {
            Err(MachineError::NoRoom { what: Room::DISK_SPACE, .. }) => {
                partial.make_room(&record.name);
                check()?;
            }
            checked => checked?,
        }
        let entry = Arc::new(Entry::new(&self.inner.config, record.clone()));
        entries.insert(record.name, Arc::clone(&entry));
        Ok(entry)
    }

    /// Stores what is to be remembered of a machine.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub fn save(&self, entry: &Entry) -> Result<()> {
        let record = entry.record();
        Ok(self.inner.store.put(Kind::Machine, &record.name, &record)?)
    }

    /// Stores which process is a machine's.
    fn note_process(&self, entry: &Entry, id: ProcessId) -> Result<()> {
        entry.state().record.process = Some(id);
        self.save(entry)
    }

    /// Gives an entry its process and watches for the end of it.
    fn attach(&self, entry: &Arc<Entry>, process: Process, info: Option<&MachineInfo>) {
        let process = Arc::new(process);
        {
            let mut state = entry.state();
            state.record.process = Some(process.id());
            state.process = Some(Arc::clone(&process));
            state.first_instruction_us = info.and_then(|info| info.first_instruction_us);
        }
        let machines = self.clone();
        let entry = Arc::clone(entry);
        tokio::spawn(async move {
            let mut watch = process.watch();
            let _ = watch.wait_for(Option::is_some).await;
            if let Some(end) = process.ended() {
                machines.process_ended(&entry, &end);
            }
        });
    }

    fn process_ended(&self, entry: &Entry, end: &End) {
        let name = entry.record().name;
        if *end == End::ForbiddenCall {
            // Whatever becomes of the machine: somebody should look at it, and at what else it may have done.
            Audit::new(self.inner.store.clone()).noted("alarm", &format!("machine:{name}"), &format!("its VMM {end}"));
        }
        let words = last_words(&self.inner.config.machine_run_dir(&name).join("vmm.log"));
        {
            let mut state = entry.state();
            state.usage = None;
            // Who deletes it, or waits for it to arrive, deals with this himself; why it was stopped before is known.
            if matches!(
                state.record.status,
                MachineStatus::Deleting | MachineStatus::Creating | MachineStatus::Incoming | MachineStatus::Stopped
            ) {
                return;
            }
            let why = format!("its VMM {end}; it said: {words}");
            // It may run at its destination: only the executor, once it has asked there, says that it is stopped.
            if matches!(state.record.status, MachineStatus::Migrating | MachineStatus::InDoubt) {
                state.reason = Some(why);
                return;
            }
            state.stopped(why);
        }
        tracing::warn!(machine = name, how = %end, words, "a VMM ended");
        if let Err(error) = self.save(entry) {
            tracing::error!(machine = name, error = &error as &dyn std::error::Error, "cannot store that it ended");
        }
    }

    /// Takes over what the VMM says of itself.
    pub fn observe(&self, entry: &Entry, info: &MachineInfo) {
        let changed = {
            let mut state = entry.state();
            state.first_instruction_us = info.first_instruction_us.or(state.first_instruction_us);
            let next = match (state.record.status, info.state) {
                (MachineStatus::Running | MachineStatus::Paused, MachineState::Stopped) => MachineStatus::Stopped,
                (MachineStatus::Running, MachineState::Paused) => MachineStatus::Paused,
                (MachineStatus::Paused, MachineState::Running) => MachineStatus::Running,
                (status, _) => status,
            };
            let changed = std::mem::replace(&mut state.record.status, next) != next;
            if changed && next == MachineStatus::Stopped {
                state.stopped(info.reason.clone().unwrap_or_else(|| "its guest has ended".to_owned()));
            }
            disks::observe_sizes(&mut state.record.disks, &info.disks) || changed
        };
        if changed && let Err(error) = self.save(entry) {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot store a machine's state");
        }
    }

    /// Marks a running machine as being moved by migration `id`.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] if it is not running, or is being moved already.
    pub fn begin_migration(&self, name: &str, id: &str) -> Result<Arc<Entry>> {
        let entry = self.get(name)?;
        {
            let mut state = entry.state();
            let status = state.record.status;
            if status != MachineStatus::Running || state.changing {
                let remedy = match status {
                    MachineStatus::Running => "it is being changed: try again in a moment",
                    MachineStatus::Migrating => {
                        "wait for its migration to end, or cancel it (`headroom migration list`)"
                    }
                    MachineStatus::Incoming => "it is still on its way here: move it on once it runs",
                    _ => "only a running machine can be moved",
                };
                return Err(MachineError::State { name: name.to_owned(), status, remedy });
            }
            state.record.status = MachineStatus::Migrating;
            state.record.migration = Some(id.to_owned());
        }
        self.save(&entry).inspect_err(|_| self.stays(&entry))?;
        Ok(entry)
    }

    /// A migration that could not be stored does not begin.
    pub fn stays(&self, entry: &Entry) {
        if let Err(error) = self.set_status(entry, MachineStatus::Running, None) {
            tracing::warn!(error = chain(&error), "cannot store that a machine stays");
        }
    }

    /// Sets what a machine does once a migration has ended, or is in doubt.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub fn set_status(&self, entry: &Entry, status: MachineStatus, migration: Option<&str>) -> Result<()> {
        {
            let mut state = entry.state();
            state.record.migration = migration.map(str::to_owned);
            // A process that ended meanwhile stays ended.
            let gone = state.process.as_ref().is_none_or(|process| process.ended().is_some());
            if gone && status == MachineStatus::Running {
                let why = state.reason.clone().unwrap_or_else(|| "its VMM has ended".to_owned());
                state.stopped(why);
            } else {
                state.record.status = status;
            }
        }
        self.save(entry)
    }
}

/// Calls the VMM of a machine without blocking the daemon.
///
/// # Errors
///
/// [`MachineError::Api`] if it refuses or does not answer.
pub async fn call<T: Send + 'static>(
    entry: &Entry,
    request: impl FnOnce(vmm::api::client::Client) -> std::result::Result<T, ClientError> + Send + 'static,
) -> Result<T> {
    let client = entry.client();
    let name = entry.record().name;
    match tokio::task::spawn_blocking(move || request(client)).await {
        Ok(answer) => answer.map_err(|source| MachineError::Api { name, source }),
        Err(panic) => Err(MachineError::Vmm { name, what: format!("could not be asked: {panic}"), log: String::new() }),
    }
}

/// Removes a half-made machine unless told to keep it; also when the request that made it is dropped.
struct EntryGuard<'a> {
    machines: &'a Machines,
    entry: Option<Arc<Entry>>,
}

impl EntryGuard<'_> {
    fn keep(mut self) {
        self.entry = None;
    }
}

impl Drop for EntryGuard<'_> {
    fn drop(&mut self) {
        let Some(entry) = self.entry.take() else { return };
        entry.state().record.status = MachineStatus::Deleting;
        if let Some(process) = entry.process() {
            process.kill();
        }
        if let Err(error) = self.machines.clear_away(&entry.record()) {
            tracing::error!(error = &error as &dyn std::error::Error, "a half-made machine could not be cleared away");
        }
    }
}
