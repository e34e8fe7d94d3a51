//! What the process does: it holds one machine, or waits for one, and serves requests about it.

mod error;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::api::{
    BalloonInfo, BalloonTarget, ChangedLimits, DirtyRate, DirtyRateRequest, DirtyRateSource, DiskSize, MachineDigest,
    MachineInfo, MachineState, Metrics, MigrationStatus, Receiving, Settle,
};
use crate::config::{BalloonConfig, MachineConfig, ReceiveConfig, SendConfig};
use crate::dirty_rate::{self, INTERVAL_MS, Turns};
use crate::memory::Usage;
use crate::migrate::Job;
use crate::snapshot;
use crate::vcpu::StopReason;
use crate::vm::{Machine, MachineError};

pub use error::ServiceError;

/// When the process began.
#[derive(Clone, Copy, Debug)]
pub struct Started {
    main: Instant,
    /// Processor time that the loader had spent by then: the part before `main` that can be measured.
    before_main: Duration,
}

impl Started {
    /// To be called first of all in `main`.
    pub fn now() -> Self {
        Self { main: Instant::now(), before_main: process_time() }
    }

    fn until(&self, moment: Instant) -> Duration {
        moment.saturating_duration_since(self.main) + self.before_main
    }
}

/// The process's view of itself.
pub struct Service {
    config: MachineConfig,
    started: Started,
    machine: Arc<Mutex<Option<Arc<Machine>>>>,
    job: Mutex<Option<Arc<Job>>>,
    estimates: Turns,
    quit: EventFd,
}

impl Service {
    /// A service that holds `machine`, or waits for one. `quit` is written to when the process is to end.
    pub fn new(config: MachineConfig, machine: Option<Arc<Machine>>, started: Started, quit: EventFd) -> Self {
        Self {
            config,
            started,
            machine: Arc::new(Mutex::new(machine)),
            job: Mutex::default(),
            estimates: Turns::default(),
            quit,
        }
    }

    /// What the machine is doing.
    pub fn info(&self) -> MachineInfo {
        let machine = self.present();
        let first_entry = machine.as_ref().and_then(|machine| machine.first_entry());
        MachineInfo {
            name: self.config.name.clone(),
            state: machine.as_ref().map_or(MachineState::Incoming, |machine| machine.state()),
            reason: machine.as_ref().and_then(|machine| machine.stop_reason()).map(|reason| reason.to_string()),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            vcpus: self.config.vcpus,
            memory_bytes: self.config.memory_mib << 20,
            disks: machine.as_ref().map(|machine| machine.disk_sizes()).unwrap_or_default(),
            dirty_tracking: machine.as_ref().map(|machine| machine.tracking().kind),
            dirty_tracking_reason: machine.as_ref().and_then(|machine| machine.tracking().reason.clone()),
            first_instruction_us: first_entry.map(|entry| self.started.until(entry).as_micros() as u64),
        }
    }

    /// Pauses the machine.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if there is none, it migrates, or a device fails.
    pub fn pause(&self) -> Result<MachineInfo, ServiceError> {
        let job = lock(&self.job);
        refuse_active(job.as_ref())?;
        self.machine()?.pause()?;
        Ok(self.info())
    }

    /// Resumes the machine.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if there is none, it migrates, or it is fenced.
    pub fn resume(&self) -> Result<MachineInfo, ServiceError> {
        let job = lock(&self.job);
        refuse_active(job.as_ref())?;
        self.machine()?.resume()?;
        Ok(self.info())
    }

    /// Asks the guest to shut down. The machine is `stopped` once it has.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if there is none, it migrates or does not run, or its guest does not listen.
    pub fn ask_to_shut_down(&self) -> Result<MachineInfo, ServiceError> {
        let job = lock(&self.job);
        refuse_active(job.as_ref())?;
        self.machine()?.ask_to_shut_down()?;
        Ok(self.info())
    }

    /// Saves the paused machine to a new directory.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if it is not paused, or the directory cannot be written.
    pub fn save(&self, path: &Path) -> Result<MachineInfo, ServiceError> {
        // Held until the last page is written: nobody resumes or migrates the machine meanwhile.
        let job = lock(&self.job);
        refuse_active(job.as_ref())?;
        snapshot::save(&*self.machine()?, path)?;
        Ok(self.info())
    }

    /// Hashes the stopped machine.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if it runs, or a disk cannot be read.
    pub fn digest(&self) -> Result<MachineDigest, ServiceError> {
        let job = lock(&self.job);
        refuse_active(job.as_ref())?;
        Ok(self.machine()?.digest()?)
    }

    /// Counters.
    pub fn metrics(&self) -> Metrics {
        let empty = || Metrics { overhead_bytes: Usage::now(None).other_bytes, ..Metrics::default() };
        let counted = self.present().map_or_else(empty, |machine| machine.metrics());
        Metrics { process_us: process_time().as_micros() as u64, ..counted }
    }

    /// Estimates how fast the machine dirties its memory, and takes the interval asked for. While a migration is under way, or if
    /// one begins meanwhile, what that has measured is the answer, at once; see [`dirty_rate`].
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if there is no machine, the interval is out of range, or another estimate is under way.
    pub fn dirty_rate(&self, request: DirtyRateRequest) -> Result<DirtyRate, ServiceError> {
        if !INTERVAL_MS.contains(&request.interval_ms) {
            return Err(ServiceError::Interval(request.interval_ms));
        }
        let stopped =
            || DirtyRate { source: DirtyRateSource::Stopped, bytes_per_second: Some(0.0), ..DirtyRate::default() };
        let (machine, turn) = {
            // A migration that begins after this finds the turn taken, and ends it.
            let job = lock(&self.job);
            if let Some(job) = job.as_ref().filter(|job| job.ended().is_none()) {
                return Ok(rate_of(job));
            }
            let machine = self.machine()?;
            match machine.state() {
                MachineState::Running => {}
                MachineState::Incoming => return Err(ServiceError::NoMachine),
                MachineState::Paused | MachineState::Fenced | MachineState::Stopped => return Ok(stopped()),
            }
            (machine, self.estimates.take().ok_or(ServiceError::Estimating)?)
        };
        let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0);
        tracing::debug!(seed, request.interval_ms, "the dirty rate is estimated");
        let interval = Duration::from_millis(request.interval_ms);
        match dirty_rate::count(machine.memory(), interval, seed, &turn)? {
            None => Ok(rate_of(&*self.job()?)),
            Some(_) if machine.state() != MachineState::Running => Err(ServiceError::StoppedMeanwhile),
            Some(counted) => Ok(dirty_rate::estimate(&counted)),
        }
    }

    /// What was given back through the balloon.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if there is no machine, or it has none.
    pub fn balloon(&self) -> Result<BalloonInfo, ServiceError> {
        let machine = self.machine()?;
        let balloon = machine.balloon().ok_or(ServiceError::NoBalloon)?;
        Ok(balloon.info().map_err(MachineError::from)?)
    }

    /// Asks the guest to give memory back, or to take it.
    ///
    /// # Errors
    ///
    /// As [`Service::balloon`], or if the target is not less than the machine's memory.
    pub fn inflate(&self, target: &BalloonTarget) -> Result<BalloonInfo, ServiceError> {
        let machine = self.machine()?;
        let balloon = machine.balloon().ok_or(ServiceError::NoBalloon)?;
        let target_mib = target.target_mib;
        BalloonConfig { target_mib, ..BalloonConfig::default() }.check(self.config.memory_mib)?;
        balloon.set_target(target_mib).map_err(MachineError::from)?;
        self.balloon()
    }

    /// Makes a disk larger. A migration that is asked for meanwhile begins after it.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if there is no machine or no such disk, a migration is under way, or the disk cannot have that size.
    pub fn resize_disk(&self, size: &DiskSize) -> Result<DiskSize, ServiceError> {
        let job = lock(&self.job);
        refuse_active(job.as_ref())?;
        self.machine()?.grow_disk(&size.id, size.bytes)?;
        Ok(size.clone())
    }

    /// Listens for a machine.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if a machine is here, or the address is not free.
    pub fn receive(&self, config: ReceiveConfig) -> Result<Receiving, ServiceError> {
        let mut job = lock(&self.job);
        refuse_active(job.as_ref())?;
        if self.present().is_some() {
            return Err(ServiceError::Occupied);
        }
        let (started, address) = Job::receive(self.config.clone(), Arc::clone(&self.machine), config)?;
        *job = Some(Arc::new(started));
        Ok(Receiving { address })
    }

    /// Starts to send the machine.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if there is none, it is not running or paused, or a migration is under way.
    pub fn send(&self, config: SendConfig) -> Result<MigrationStatus, ServiceError> {
        let mut job = lock(&self.job);
        refuse_active(job.as_ref())?;
        let machine = self.machine()?;
        let refuse = |state, remedy| Err(MachineError::State { state, action: "migrated", remedy }.into());
        match machine.state() {
            MachineState::Running => {}
            // It would run at the destination.
            MachineState::Paused => return refuse(MachineState::Paused, ", resume it first"),
            state => return refuse(state, ""),
        }
        let started = Arc::new(Job::send(machine, config)?);
        // What it measures is better, and nobody looks at the memory beside it.
        self.estimates.end();
        *job = Some(Arc::clone(&started));
        Ok(started.status())
    }

    /// The last migration.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NoMigration`].
    pub fn migration(&self) -> Result<MigrationStatus, ServiceError> {
        Ok(self.job()?.status())
    }

    /// Cancels the migration.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if there is none, or Commit was sent.
    pub fn cancel(&self) -> Result<MigrationStatus, ServiceError> {
        let job = self.job()?;
        if job.ended().is_none() {
            job.cancel()?;
        }
        Ok(job.status())
    }

    /// Gives up a post-copy whose link is lost. It has no effect on any other migration.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NoMigration`].
    pub fn abandon(&self) -> Result<MigrationStatus, ServiceError> {
        let job = self.job()?;
        job.abandon();
        Ok(job.status())
    }

    /// Changes limits of a migration that leaves from here, while it runs.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if there is none that could be changed, or a limit is out of range; nothing is changed then.
    pub fn change_limits(&self, limits: &ChangedLimits) -> Result<MigrationStatus, ServiceError> {
        let job = self.leaving()?;
        job.change_limits(limits)?;
        Ok(job.status())
    }

    /// Lets a migration go on that was held before its switchover.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if none leaves from here.
    pub fn proceed(&self) -> Result<MigrationStatus, ServiceError> {
        let job = self.leaving()?;
        job.proceed();
        Ok(job.status())
    }

    /// Whether threads of this process may never end: those of a machine that lost memory in post-copy, or still waits for
    /// it, cannot be joined.
    pub fn may_hang(&self) -> bool {
        let stopped = |machine: &Arc<Machine>| machine.state() == MachineState::Stopped;
        let Some(machine) = self.present().filter(stopped) else { return false };
        let arriving = lock(&self.job).as_ref().is_some_and(|job| !job.leaves() && job.ended().is_none());
        arriving || matches!(machine.stop_reason(), Some(StopReason::Failure(_)))
    }

    /// Ends the doubt about a Commit that was not answered.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotInDoubt`] if there is none.
    pub fn settle(&self, settle: Settle) -> Result<MachineInfo, ServiceError> {
        let slot = lock(&self.job);
        let machine = self.machine()?;
        let doubtful = slot.as_ref().is_some_and(|job| job.in_doubt());
        if !doubtful || machine.state() != MachineState::Fenced {
            return Err(ServiceError::NotInDoubt);
        }
        match settle {
            Settle::RunsThere => {}
            Settle::RunsHere => {
                machine.unfence()?;
                machine.resume()?;
            }
        }
        if let Some(job) = slot.as_ref() {
            job.settle();
        }
        Ok(self.info())
    }

    /// Asks the process to end.
    pub fn quit(&self) {
        let _ = self.quit.write(1);
    }

    fn present(&self) -> Option<Arc<Machine>> {
        lock(&self.machine).clone()
    }

    fn machine(&self) -> Result<Arc<Machine>, ServiceError> {
        self.present().ok_or(ServiceError::NoMachine)
    }

    fn leaving(&self) -> Result<Arc<Job>, ServiceError> {
        let job = self.job()?;
        match (job.leaves(), job.ended()) {
            (true, None) => Ok(job),
            (true, Some(_)) => Err(ServiceError::Over(job.id().to_owned())),
            (false, _) => Err(ServiceError::Arriving(job.id().to_owned())),
        }
    }

    fn job(&self) -> Result<Arc<Job>, ServiceError> {
        lock(&self.job).clone().ok_or(ServiceError::NoMigration)
    }
}

/// What a migration knows of the rate: once a round has ended, and at the source only.
fn rate_of(job: &Job) -> DirtyRate {
    let status = job.status();
    DirtyRate {
        source: DirtyRateSource::Migration,
        bytes_per_second: (job.leaves() && status.round > 0).then_some(status.dirty_bytes_per_second),
        throttle_percent: status.throttle_percent,
        ..DirtyRate::default()
    }
}

fn refuse_active(job: Option<&Arc<Job>>) -> Result<(), ServiceError> {
    match job {
        Some(job) if job.ended().is_none() => Err(ServiceError::Migrating(job.id().to_owned())),
        _ => Ok(()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Processor time of the process since it was forked.
fn process_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writing.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}
