//! What the threads of one machine share: what is asked of its vCPUs, and the way to reach them.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::stop::StopReason;

/// One slice and one hold of a throttled vCPU.
pub const PERIOD: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Park,
    Run,
    End,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) target: Target,
    pub(super) parked: usize,
    pub(super) stop: Option<StopReason>,
    pub(super) holds: Holds,
}

/// What the threads of one machine share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
    /// The same for the thread that throttles.
    pub(super) clock: Condvar,
    pub(super) kicks: OnceLock<Vec<Kick>>,
    pub(super) stopped: EventFd,
    pub(super) first_entry: OnceLock<Instant>,
    pub(super) exits: AtomicU64,
}

/// Makes one vCPU thread leave `KVM_RUN`.
#[derive(Debug)]
pub(super) struct Kick {
    immediate_exit: *const AtomicU8,
    thread: libc::pthread_t,
}

// SAFETY: the pointer leads into the `kvm_run` mapping of a vCPU that its `Vcpus` keeps alive together with this, and is
// only used for atomic access; the thread is joined by the same `Vcpus`, after the last use of its id.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    pub(super) fn new(immediate_exit: *const AtomicU8, thread: libc::pthread_t) -> Self {
        Self { immediate_exit, thread }
    }

    fn kick(&self) {
        // SAFETY: see the impl of Send: the mapping is alive. KVM reads this byte whenever it wants.
        unsafe { (*self.immediate_exit).store(1, Ordering::SeqCst) };
        // SAFETY: the thread has not been joined yet.
        unsafe { libc::pthread_kill(self.thread, kick_signal()) };
    }
}

pub(super) fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// The signal only has to interrupt: its handler does nothing.
pub(super) fn install_kick_handler() {
    static INSTALLED: Once = Once::new();
    extern "C" fn nothing(_: libc::c_int) {}
    INSTALLED.call_once(|| {
        // SAFETY: all-zero is a valid `sigaction`: no flags (hence no SA_RESTART), an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: the handler does nothing and is therefore safe in any context.
        unsafe { libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) };
    });
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called with the state locked and its target set.
    pub(super) fn kick_all(&self) {
        for kick in self.kicks.get().into_iter().flatten() {
            kick.kick();
        }
    }

    /// Called with the state locked, whose index is that of the vCPU.
    pub(super) fn kick(&self, index: usize) {
        if let Some(kick) = self.kicks.get().and_then(|kicks| kicks.get(index)) {
            kick.kick();
        }
    }

    /// Wakes whoever waits for a change: parked and held vCPUs, who parks them, who throttles them.
    pub(super) fn notify_all(&self) {
        self.changed.notify_all();
        self.clock.notify_all();
    }

    pub(super) fn stop(&self, reason: StopReason) {
        let mut state = self.lock();
        if state.stop.is_none() {
            tracing::info!(%reason, "machine stopped by itself");
            state.stop = Some(reason);
            let _ = self.stopped.write(1);
        }
        if state.target == Target::Run {
            state.target = Target::Park;
        }
        self.kick_all();
        self.notify_all();
    }
}

/// Stops a machine from one of its devices.
#[derive(Clone, Debug)]
pub struct StopHandle(Weak<Shared>);

impl StopHandle {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self(Arc::downgrade(shared))
    }

    /// Every vCPU parks after its current instruction. Returns at once.
    pub fn stop(&self, reason: StopReason) {
        if let Some(shared) = self.0.upgrade() {
            shared.stop(reason);
        }
    }
}

/// How each vCPU is throttled.
#[derive(Debug, Default)]
pub(super) struct Holds {
    pub(super) vcpus: Vec<Hold>,
    /// A thread watches the clock.
    pub(super) clock: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Hold {
    pub(super) percent: u8,
    /// When its slice began; `None` from the kick that ends it until it runs again.
    pub(super) running_since: Option<Instant>,
    pub(super) held: Duration,
}

impl Hold {
    pub(super) fn hold(&self) -> Duration {
        PERIOD * u32::from(self.percent) / 100
    }

    pub(super) fn slice(&self) -> Duration {
        PERIOD - self.hold()
    }
}

impl Holds {
    pub(super) fn new(vcpus: usize) -> Self {
        let one = Hold { percent: 0, running_since: None, held: Duration::ZERO };
        Self { vcpus: vec![one; vcpus], clock: false }
    }

    pub(super) fn any(&self) -> bool {
        self.vcpus.iter().any(|vcpu| vcpu.percent > 0)
    }
}
