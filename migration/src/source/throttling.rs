//! Holding vCPUs, and letting them go: whatever happens, no vCPU is held once the source's engine has ended.

use std::time::Duration;

use super::context::Context;
use crate::error::{Doing, MigrationError};
use crate::report::ThrottledVcpu;

impl Context {
    /// Holds each vCPU for its share of the time from here on.
    pub(super) fn throttle_vcpus(&mut self, percent: &[u8]) -> Result<(), MigrationError> {
        let before = self.guest.throttled();
        // Noted first: what was begun and failed is released as well.
        self.throttling.percent = percent.to_vec();
        if !self.guest.throttle(percent).doing("throttling the vCPUs")? {
            tracing::warn!("this machine cannot be throttled");
            self.throttling.percent = Vec::new();
            self.throttling.refused = true;
            self.options.limits.throttle_max_percent = 0;
            return Ok(());
        }
        self.throttling.before.get_or_insert(before);
        let report = &mut self.report;
        for (vcpu, &percent) in (0u16..).zip(percent).filter(|&(_, &percent)| percent > 0) {
            let index = report.throttled.iter().position(|one| one.vcpu == vcpu).unwrap_or_else(|| {
                report.throttled.push(ThrottledVcpu { vcpu, ..ThrottledVcpu::default() });
                report.throttled.len() - 1
            });
            let one = &mut report.throttled[index];
            one.percent_max = one.percent_max.max(percent);
            report.throttle_percent_max = report.throttle_percent_max.max(percent);
        }
        let most = percent.iter().copied().max().unwrap_or(0);
        self.control.set_throttle(most);
        tracing::info!(?percent, "throttled");
        Ok(())
    }

    /// Lets all vCPUs run freely, and notes how long they were held. Idempotent.
    pub(super) fn release_vcpus(&mut self) {
        if self.throttling.percent.is_empty() {
            return;
        }
        self.throttling.percent = Vec::new();
        if let Err(error) = self.guest.throttle(&[]) {
            tracing::error!(%error, "vCPUs are still throttled");
        }
        self.control.set_throttle(0);
        let now = self.guest.throttled();
        let before = self.throttling.before.as_deref().unwrap_or_default();
        for one in &mut self.report.throttled {
            let vcpu = usize::from(one.vcpu);
            let since = |times: &[Duration]| times.get(vcpu).copied().unwrap_or_default();
            one.held_ms = since(&now).saturating_sub(since(before)).as_secs_f64() * 1e3;
        }
    }

    /// Nothing of the guest is held any more. Idempotent.
    pub(super) fn release_guest(&mut self) {
        self.answer_writes();
        self.release_vcpus();
    }

    /// Takes over the limits that were changed while the round ran.
    pub(super) fn follow_changed_limits(&mut self) {
        let limits = &mut self.options.limits;
        if let Some(limit) = self.control.downtime() {
            limits.downtime = limit;
        }
        if let Some(percent) = self.control.throttle_limit().filter(|_| !self.throttling.refused) {
            limits.throttle_max_percent = percent;
        }
    }
}

/// Also if the engine's thread panics.
impl Drop for Context {
    fn drop(&mut self) {
        self.release_guest();
    }
}
