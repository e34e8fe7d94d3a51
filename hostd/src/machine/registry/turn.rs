//! One change of a machine at a time, and none of one that moves.

use std::sync::Arc;

use super::{Entry, Result};
use crate::api::types::MachineStatus;
use crate::machine::MachineError;

/// Keeps everybody else from changing, starting, deleting or moving a machine until it is dropped.
pub(super) struct Turn(pub(super) Arc<Entry>);

impl Turn {
    /// Takes it, unless `obstacle` knows why not and what to do, from what the machine is doing and whether somebody else has it.
    ///
    /// # Errors
    ///
    /// [`MachineError::State`].
    pub(super) fn take(
        entry: Arc<Entry>,
        obstacle: impl FnOnce(MachineStatus, bool) -> Option<&'static str>,
    ) -> Result<(Self, MachineStatus)> {
        let status = {
            let mut state = entry.state();
            let status = state.record.status;
            if let Some(remedy) = obstacle(status, state.changing) {
                return Err(MachineError::State { name: state.record.name.clone(), status, remedy });
            }
            state.changing = true;
            status
        };
        Ok((Self(entry), status))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.state().changing = false;
    }
}
