//! Holding vCPUs for a share of their time, so that a guest dirties less memory than a migration carries away.
//!
//! ```text
//!  vCPU thread   in KVM_RUN | waits       | in KVM_RUN | waits
//!                ---slice-->|<----hold--->|            |
//!  clock thread        kick |             |       kick |
//! ```
//!
//! Slice and hold together are [`PERIOD`]. A thread that exists only while a vCPU is throttled watches the clock: when a vCPU
//! has had its slice it is kicked out of `KVM_RUN`, as for a pause, and its own thread waits for the rest. A vCPU that waits
//! obeys whatever else is asked of it at once. Its next slice begins when it runs again and not by the clock: however
//! late it was woken, it gets all of it.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::VcpuError;
use super::run::Vcpus;
pub use super::shared::PERIOD;
use super::shared::{Shared, State, Target};

/// A vCPU runs at least for the rest of its time.
pub const PERCENT_MAX: u8 = 99;

/// Stack of the thread that watches the clock.
const STACK_BYTES: usize = 64 << 10;

impl Vcpus {
    /// Holds each vCPU for this share of its time from here on, in per cent, at most [`PERCENT_MAX`]; vCPUs that are not named
    /// run freely. Returns at once.
    ///
    /// # Errors
    ///
    /// [`VcpuError::Clock`] if the thread for it cannot be made; nobody is held then.
    pub fn throttle(&self, percent: &[u8]) -> Result<(), VcpuError> {
        let mut state = self.shared.lock();
        let now = Instant::now();
        for (index, vcpu) in state.holds.vcpus.iter_mut().enumerate() {
            let percent = percent.get(index).copied().unwrap_or(0).min(PERCENT_MAX);
            if vcpu.percent == 0 && percent > 0 {
                vcpu.running_since = Some(now);
            }
            vcpu.percent = percent;
        }
        let result = if state.holds.any() && !state.holds.clock { self.start_clock(&mut state) } else { Ok(()) };
        self.shared.changed.notify_all();
        self.shared.clock.notify_all();
        result
    }

    fn start_clock(&self, state: &mut State) -> Result<(), VcpuError> {
        let shared = Arc::clone(&self.shared);
        let builder = std::thread::Builder::new().name("throttle".into()).stack_size(STACK_BYTES);
        let mut clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ended) = clock.take() {
            // It has said that it ends, and holds no lock any more.
            let _ = ended.join();
        }
        match builder.spawn(move || shared.watch_the_clock()) {
            Ok(thread) => {
                *clock = Some(thread);
                state.holds.clock = true;
                Ok(())
            }
            Err(source) => {
                state.holds.vcpus.iter_mut().for_each(|vcpu| vcpu.percent = 0);
                Err(VcpuError::Clock(source))
            }
        }
    }

    /// For how long each vCPU has been held since the machine was made.
    pub fn held(&self) -> Vec<Duration> {
        self.shared.lock().holds.vcpus.iter().map(|vcpu| vcpu.held).collect()
    }
}

impl Shared {
    /// Kicks each throttled vCPU when its slice is over; ends when there is none.
    fn watch_the_clock(&self) {
        let mut state = self.lock();
        while state.target != Target::End && state.holds.any() {
            let now = Instant::now();
            let mut next: Option<Duration> = None;
            // Parked vCPUs do not have to be kicked; whoever lets them run says so.
            let running = state.target == Target::Run;
            for (index, vcpu) in state.holds.vcpus.iter_mut().enumerate().filter(|_| running) {
                let Some(since) = vcpu.running_since.filter(|_| vcpu.percent > 0) else { continue };
                let left = (since + vcpu.slice()).saturating_duration_since(now);
                if left.is_zero() {
                    vcpu.running_since = None;
                    self.kick(index);
                } else {
                    next = Some(next.map_or(left, |next| next.min(left)));
                }
            }
            state = match next {
                Some(left) => self.clock.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.clock.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
        state.holds.clock = false;
    }

    /// What a vCPU's thread does that was interrupted: waits if its slice is over, for as long as it is throttled and is to
    /// run.
    pub(super) fn hold<'a>(&'a self, mut state: MutexGuard<'a, State>, index: usize) -> MutexGuard<'a, State> {
        let is_held = |state: &State| {
            let vcpu = state.holds.vcpus.get(index)?;
            (state.target == Target::Run && vcpu.percent > 0 && vcpu.running_since.is_none()).then(|| vcpu.hold())
        };
        if is_held(&state).is_none() {
            return state;
        }
        let start = Instant::now();
        while let Some(hold) = is_held(&state) {
            let left = hold.saturating_sub(start.elapsed());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if let Some(vcpu) = state.holds.vcpus.get_mut(index) {
            vcpu.held += start.elapsed();
            vcpu.running_since = Some(Instant::now());
        }
        self.clock.notify_one();
        state
    }
}
