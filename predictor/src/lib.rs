//! Forecasts, contention scores and migration plans.
//!
//! ```text
//! samples of machines --> PoolForecaster --> Contention --> Trigger --> plan() --> Plan
//!  (missing ones too)      Bank per series    probability    hysteresis  candidates  moves, costs,
//!  scheduled events  -->   quantiles          per resource   cooldown    hard limits latest start, reasons
//!                            |       ^                                       ^
//!                            '-> Pools: trees over all of them               |
//!                          finished migrations --> CostModel -----------------'
//! ```
//!
//! Everything here is a pure function of what it is given: no I/O, no clock, no thread, and no randomness. Time comes in as seconds
//! that the caller chooses (any epoch, monotonic), samples come one a step, and a step is the caller's sampling interval: the
//! same code looks 30 steps of a second ahead after a minute of history and 12 steps of five minutes after a month.
//! All state can be stored with serde.
#![forbid(unsafe_code)]

pub mod bank;
pub mod calibration;
pub mod candidates;
pub mod capacity;
pub mod conformal;
pub mod contention;
pub mod cost;
pub mod course;
pub mod evaluate;
pub mod events;
pub mod experience;
mod fetch;
pub mod fleet;
pub mod forecast;
pub mod guard;
pub mod insight;
pub mod maximum;
pub mod model;
pub mod plan;
pub mod pool;
pub mod pools;
pub mod quantile;
pub mod recurrence;
pub mod replay;
pub mod sample;
pub mod season;
pub mod simulate;
pub mod slo;
pub mod trigger;
pub mod window;
mod worth;

pub use bank::{Bank, BankConfig, BankError, Target};
pub use candidates::{HostView, MachineView, MoveLog, Obstacle, PlanLimits, PoolView, Rejection};
pub use contention::{Contention, Onset, Outlook, ResourceContention};
pub use cost::{Cost, CostModel, MigrationShape};
pub use course::{Course, EventAhead};
pub use events::{Change, Event, Scope};
pub use forecast::{Distribution, Forecast, LEVELS};
pub use maximum::Maxima;
pub use plan::{Move, Plan, PlanInput, plan};
pub use pool::{MachineHistory, PoolConfig, PoolForecaster, Tick};
pub use pools::Pools;
pub use sample::{PerResource, RateMeter, Resource, Sample};
pub use trigger::{Decision, Hold, Trigger, TriggerConfig};
