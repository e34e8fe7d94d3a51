//! Emptying a host.

use serde::{Deserialize, Serialize};

/// `POST /v1/host/drain`: close this host to machines and move all of its own away; goes on if it was paused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// Hosts that may take them; all peers if it is empty.
    #[serde(default)]
    pub to: Vec<String>,
}

/// Whether machines may come to a host, and whether its own are being moved away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainState {
    /// Not drained: the host takes machines.
    #[default]
    Open,
    /// Closed, and its machines are being moved away.
    Moving,
    /// Closed; no further machine is moved until the drain goes on.
    Paused,
    /// Closed, and no machine that is left can go now; each says why. They are tried again every half minute.
    Blocked,
    /// Closed and empty.
    Empty,
}

/// What becomes of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainStep {
    /// Waits for its turn.
    Waiting,
    /// On its way.
    Moving,
    /// Gone.
    Moved,
    /// It cannot go now; `reason` says why.
    Blocked,
}

/// One machine of a host that is being drained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// Machine.
    pub machine: String,
    /// What becomes of it.
    pub step: DrainStep,
    /// Host that it moves or has moved to.
    pub destination: Option<String>,
    /// The migration that moves it.
    pub migration: Option<String>,
    /// Why it cannot go now.
    pub reason: Option<String>,
}

/// `GET /v1/host/drain`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// What is being done.
    pub state: DrainState,
    /// Since when the host is closed.
    pub started_unix_ms: Option<u64>,
    /// Hosts that may take its machines; all peers if it is empty.
    pub to: Vec<String>,
    /// Its machines, and those that have gone.
    pub machines: Vec<Drained>,
}
