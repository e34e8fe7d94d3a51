//! Stopping a machine at an operator's wish: its guest is asked, or its plug is pulled. Record and disks stay.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::life::stop;
use super::turn::Turn;
use super::{Entry, Machines, Result, call};
use crate::api::types::{Machine, MachineStatus, StopMachine};
use crate::machine::{MachineError, chain, spec};

/// How often a guest that shuts down is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Why a machine cannot be stopped now, and what to do; nothing if it can.
fn obstacle(status: MachineStatus, force: bool, changing: bool) -> Option<&'static str> {
    match status {
        MachineStatus::Creating | MachineStatus::Incoming => Some("stop it once it is there"),
        MachineStatus::Migrating => {
            Some("wait for its migration to end, or cancel it (`headroom migration list`), and then stop it")
        }
        MachineStatus::InDoubt => Some("wait until both hosts have settled where it runs"),
        MachineStatus::Deleting => Some("it is being deleted"),
        MachineStatus::Running | MachineStatus::Paused | MachineStatus::Stopped if changing => {
            Some("it is being changed: try again in a moment")
        }
        MachineStatus::Paused if !force => {
            Some("its guest stands still and cannot be asked; pull the plug (`--force`)")
        }
        MachineStatus::Running | MachineStatus::Paused | MachineStatus::Stopped => None,
    }
}

impl Machines {
    /// Stops a machine; one that is stopped stays so. It can be started again.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`] while it moves, [`MachineError::Api`] if its guest does not listen, [`MachineError::StillRuns`] if it
    /// takes longer than it may: it runs on then.
    pub async fn stop(&self, name: &str, how: &StopMachine) -> Result<Machine> {
        spec::stop(how)?;
        let entry = self.get(name)?;
        if !how.force {
            // Not held while the guest takes its time: whoever loses patience may pull the plug.
            self.shut_down(&entry, how.timeout_s).await?;
        }
        let (_turn, status) = Turn::take(Arc::clone(&entry), |status, changing| obstacle(status, true, changing))?;
        match (status, how.force) {
            (MachineStatus::Stopped, _) => {}
            (_, true) => self.pull_plug(&entry)?,
            // Somebody has started it again: it did stop.
            (_, false) => return Ok(entry.view(&self.inner.config)),
        }
        // A VMM stays to say why its guest ended, and would keep memory, taps and disks.
        if let Some(process) = entry.process() {
            stop(&entry, &process).await;
        }
        Ok(entry.view(&self.inner.config))
    }

    /// Says that it is stopped before it is: its process can end at any moment from here on.
    fn pull_plug(&self, entry: &Arc<Entry>) -> Result<()> {
        let before = {
            let mut state = entry.state();
            let before = (state.record.status, state.reason.clone());
            state.stopped("it was stopped by force".to_owned());
            state.usage = None;
            before
        };
        self.save(entry).inspect_err(|_| {
            let mut state = entry.state();
            (state.record.status, state.reason) = before;
            state.record.why_stopped = None;
        })
    }

    async fn shut_down(&self, entry: &Arc<Entry>, seconds: u64) -> Result<()> {
        {
            let state = entry.state();
            let status = state.record.status;
            if let Some(remedy) = obstacle(status, false, state.changing) {
                return Err(MachineError::State { name: state.record.name.clone(), status, remedy });
            }
            if status == MachineStatus::Stopped {
                return Ok(());
            }
        }
        call(entry, |client| client.ask_to_shut_down()).await?;
        let deadline = Instant::now() + Duration::from_secs(seconds);
        while entry.status() != MachineStatus::Stopped {
            if Instant::now() >= deadline {
                return Err(MachineError::StillRuns { name: entry.record().name, seconds });
            }
            tokio::time::sleep(LOOK_EVERY).await;
            match call(entry, |client| client.machine()).await {
                Ok(info) => self.observe(entry, &info),
                Err(error) => tracing::debug!(error = chain(&error), "a guest that shuts down cannot be looked at"),
            }
        }
        entry.state().usage = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_stops_only_where_it_stays() {
        use MachineStatus::{Creating, Deleting, InDoubt, Incoming, Migrating, Paused, Running, Stopped};
        for status in [Creating, Incoming, Running, Paused, Migrating, InDoubt, Stopped, Deleting] {
            let stays = matches!(status, Running | Paused | Stopped);
            assert_eq!(obstacle(status, true, false).is_none(), stays, "{status:?}");
            assert_eq!(obstacle(status, false, false).is_none(), stays && status != Paused, "{status:?}");
            assert!(obstacle(status, true, true).is_some(), "{status:?}");
        }
        assert!(obstacle(Migrating, true, false).is_some_and(|words| words.contains("cancel it")));
        assert!(obstacle(Paused, false, false).is_some_and(|words| words.contains("--force")));
    }
}
