//! The vCPU threads: run, park, end.
//!
//! # Stopping without a race
//!
//! A vCPU thread is in `KVM_RUN` or handles an exit. To stop it, the target state is set, then `kvm_run.immediate_exit`,
//! then the thread is sent a signal, in this order. Wherever the thread is, it notices:
//!
//! * about to enter `KVM_RUN`: KVM looks at `immediate_exit` first and returns EINTR;
//! * past that look, or in the guest: the signal is pending, and KVM returns EINTR;
//! * handling an exit: it enters `KVM_RUN` once more, where KVM completes the instruction that caused the exit and then
//!   returns EINTR. A parked vCPU has therefore no half-done instruction, and its registers can be saved (KVM API, 5).
//!
//! A vCPU that is throttled ([`super::throttle`]) is interrupted in the same way, and waits in its thread, outside of
//! `KVM_RUN`, until its time has come or until something else is asked of it.
//!
//! # Locks
//!
//! `Shared::state` is held for a few instructions only, never while a vCPU runs or another lock is taken. The lock of a
//! vCPU's descriptor is held by its thread while it runs, and by whoever saves or restores it while it is parked.

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::EventFd;

use super::VcpuError;
use super::exit::{Exits, Next};
use super::shared::{Holds, Kick, Shared, State, StopHandle, Target, install_kick_handler};
use super::stop::StopReason;
use crate::sandbox::{self, Role};
use crate::slice;

/// Stack of a vCPU thread. Its deepest path is an exit into a device's registers.
const STACK_BYTES: usize = 256 << 10;

struct Vcpu {
    fd: Arc<Mutex<VcpuFd>>,
    thread: Option<JoinHandle<()>>,
}

/// All vCPUs of a machine, each with its thread. New ones are parked.
pub struct Vcpus {
    pub(super) shared: Arc<Shared>,
    vcpus: Vec<Vcpu>,
    exits: Arc<Exits>,
    /// Throttles them.
    pub(super) clock: Mutex<Option<JoinHandle<()>>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU, parked. `stopped` is written to when the machine stops by itself.
    ///
    /// # Errors
    ///
    /// [`VcpuError::Thread`] if a thread cannot be made; those made before are ended again.
    pub fn new(fds: Vec<VcpuFd>, exits: &Arc<Exits>, stopped: EventFd) -> Result<Self, VcpuError> {
        install_kick_handler();
        let shared = Arc::new(Shared {
            state: Mutex::new(State { target: Target::Park, parked: 0, stop: None, holds: Holds::new(fds.len()) }),
            changed: Condvar::new(),
            clock: Condvar::new(),
            kicks: OnceLock::new(),
            stopped,
            first_entry: OnceLock::new(),
            exits: AtomicU64::new(0),
        });
        let vcpus = Vec::with_capacity(fds.len());
        let mut vcpus = Self { shared, vcpus, exits: Arc::clone(exits), clock: Mutex::default() };
        let mut kicks = Vec::with_capacity(fds.len());
        for (id, mut fd) in (0u8..=u8::MAX).zip(fds) {
            let immediate_exit = (&raw mut fd.get_kvm_run().immediate_exit).cast::<AtomicU8>().cast_const();
            let fd = Arc::new(Mutex::new(fd));
            let (shared, exits) = (Arc::clone(&vcpus.shared), Arc::clone(exits));
            let thread = Thread { index: id.into(), shared, exits, fd: Arc::clone(&fd) };
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .stack_size(STACK_BYTES)
                .spawn(move || thread.main())
                .map_err(|source| VcpuError::Thread { id, source })?;
            kicks.push(Kick::new(immediate_exit, thread.as_pthread_t()));
            vcpus.vcpus.push(Vcpu { fd, thread: Some(thread) });
        }
        let _ = vcpus.shared.kicks.set(kicks);
        Ok(vcpus)
    }

    /// Lets all vCPUs run; false if the machine has stopped by itself.
    pub fn run(&self) -> bool {
        let mut state = self.shared.lock();
        if state.stop.is_some() {
            return false;
        }
        state.target = Target::Run;
        self.shared.notify_all();
        true
    }

    /// Stops all vCPUs and waits until each is parked with its last instruction complete.
    pub fn park(&self) {
        let mut state = self.shared.lock();
        if state.target == Target::Run {
            state.target = Target::Park;
            self.shared.kick_all();
            self.shared.notify_all();
        }
        while state.parked < self.vcpus.len() {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Why the machine stopped by itself, if it did.
    pub fn stop_reason(&self) -> Option<StopReason> {
        self.shared.lock().stop.clone()
    }

    /// Calls `action` with the descriptors of all vCPUs, in order. Blocks while they run: park them first.
    pub fn with<T>(&self, action: impl FnOnce(&[&VcpuFd]) -> T) -> T {
        let guards: Vec<MutexGuard<'_, VcpuFd>> =
            self.vcpus.iter().map(|vcpu| vcpu.fd.lock().unwrap_or_else(PoisonError::into_inner)).collect();
        let fds: Vec<&VcpuFd> = guards.iter().map(|guard| &**guard).collect();
        action(&fds)
    }

    /// A handle for devices by which the guest can stop the machine. It does not keep the vCPUs alive.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle::new(&self.shared)
    }

    /// When the first vCPU first entered the guest.
    pub fn first_entry(&self) -> Option<Instant> {
        self.shared.first_entry.get().copied()
    }

    /// Exits to the VMM since the start.
    pub fn exits(&self) -> u64 {
        self.shared.exits.load(Ordering::Relaxed)
    }

    /// How often a vCPU had to wait for its full dirty ring to be emptied.
    pub fn ring_full_exits(&self) -> u64 {
        self.exits.ring_full()
    }

    /// Processor time of all vCPU threads.
    pub fn processor_time(&self) -> Duration {
        self.vcpus.iter().filter_map(|vcpu| vcpu.thread.as_ref()).map(thread_time).sum()
    }
}

fn thread_time(thread: &JoinHandle<()>) -> Duration {
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: the thread has not been joined, so that its id is valid; both pointers are valid for writing.
    let failed = unsafe {
        libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) != 0
            || libc::clock_gettime(clock, &raw mut time) != 0
    };
    if failed { Duration::ZERO } else { Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32) }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.target = Target::End;
        self.shared.kick_all();
        self.shared.notify_all();
        drop(state);
        // Before the threads that it kicks.
        if let Some(clock) = self.clock.get_mut().unwrap_or_else(PoisonError::into_inner).take()
            && clock.join().is_err()
        {
            tracing::error!("the thread that throttles vCPUs has panicked");
        }
        for thread in self.vcpus.iter_mut().filter_map(|vcpu| vcpu.thread.take()) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread has panicked");
            }
        }
    }
}

/// One vCPU thread.
struct Thread {
    index: usize,
    shared: Arc<Shared>,
    exits: Arc<Exits>,
    fd: Arc<Mutex<VcpuFd>>,
}

/// Parks a vCPU whose thread panics, for good. Whoever parks it would wait for ever otherwise, and a migration, a pause
/// and the end of the process with it.
struct Panicked<'a>(&'a Shared);

impl Drop for Panicked<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().parked += 1;
            self.0.stop(StopReason::Failure(
                "a vCPU thread of the VMM panicked, which is a fault of the VMM: its log has the place, report it"
                    .into(),
            ));
        }
    }
}

impl Thread {
    fn main(self) {
        let _panicked = Panicked(&self.shared);
        slice::ask_for(slice::VCPU);
        if let Err(error) = sandbox::confine(Role::Vcpu) {
            // It never enters the guest: a machine that has stopped does not run again.
            self.shared.stop(StopReason::Failure(crate::migrate::chain(&error)));
        }
        while self.wait_parked() {
            let mut fd = self.fd.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.first_entry.get_or_init(Instant::now);
            self.run(&mut fd);
        }
    }

    /// Waits until the vCPU is to run; false when the thread is to end.
    fn wait_parked(&self) -> bool {
        let mut state = self.shared.lock();
        state.parked += 1;
        self.shared.changed.notify_all();
        while state.target == Target::Park {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        state.target == Target::Run
    }

    fn run(&self, fd: &mut VcpuFd) {
        loop {
            if let Next::Interrupted = self.exits.run_once(fd, |reason| self.shared.stop(reason)) {
                let state = self.shared.lock();
                if state.target != Target::Run {
                    return;
                }
                // It is to be held, or the signal came late, for a stop that is over. Cleared under the lock, so that a new
                // stop is not lost.
                fd.set_kvm_immediate_exit(0);
                let state = self.shared.hold(state, self.index);
                if state.target != Target::Run {
                    return;
                }
            }
            self.shared.exits.fetch_add(1, Ordering::Relaxed);
        }
    }
}
