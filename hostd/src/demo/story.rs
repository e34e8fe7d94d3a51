//! Turns what changes between two views into lines of the log.

use super::feed::View;
use super::scenario;
use super::screen::Happening;
use crate::api::types::{MigrationStage, PlanOutcome, TriggerState};

/// The log, and what has been told already.
#[derive(Debug, Default)]
pub struct Story {
    /// Everything that happened, the oldest first.
    pub happenings: Vec<Happening>,
    trigger: Option<TriggerState>,
    /// Plans, and whether they waited when they were told.
    plans: Vec<(String, bool)>,
    stages: Vec<(String, MigrationStage)>,
    event_began: bool,
}

impl Story {
    /// Adds a line.
    pub fn tell(&mut self, at_s: f64, text: impl Into<String>) {
        self.happenings.push(Happening { at_s, text: text.into() });
    }

    /// Tells what is new in `view`.
    pub fn follow(&mut self, at_s: f64, view: &View) {
        self.follow_trigger(at_s, view);
        for plan in view.plans.iter().rev() {
            let waits = plan.outcome == PlanOutcome::Waiting;
            let known = self.plans.iter().any(|(id, waited)| *id == plan.id && *waited == waits);
            if !known {
                self.plans.push((plan.id.clone(), waits));
                self.tell(at_s, plan_in_words(plan));
            }
        }
        for migration in view.migrations.iter().rev() {
            let known = self.stages.iter().find(|(id, _)| *id == migration.id).map(|(_, stage)| *stage);
            if known == Some(migration.stage) {
                continue;
            }
            self.stages.retain(|(id, _)| *id != migration.id);
            self.stages.push((migration.id.clone(), migration.stage));
            if let Some(text) = stage_in_words(migration) {
                self.tell(at_s, text);
            }
        }
        if at_s >= scenario::EVENT_S && !self.event_began {
            self.event_began = true;
            self.tell(at_s, "the declared event begins");
        }
    }

    fn follow_trigger(&mut self, at_s: f64, view: &View) {
        let Some(pool) = view.pool(scenario::BUSY_POOL).filter(|pool| pool.score.is_some()) else { return };
        let state = pool.trigger.state;
        if self.trigger == Some(state) {
            return;
        }
        let first = self.trigger.replace(state).is_none();
        let score = pool.score.unwrap_or_default();
        let text = match state {
            TriggerState::Quiet if first => "the forecast has enough samples".to_owned(),
            TriggerState::Quiet => "the trigger is quiet again".to_owned(),
            TriggerState::Rising => {
                format!("the score rises: contention within {:.0} s with probability {score:.2}", pool.horizon_s)
            }
            TriggerState::Firing => format!("the trigger fires at score {score:.2}"),
            TriggerState::Planned => "a move is planned and waits for its latest safe start".to_owned(),
            TriggerState::Cooldown => "the planner has acted and waits for the effect".to_owned(),
        };
        self.tell(at_s, format!("pool {}: {text}", pool.pool));
    }
}

fn plan_in_words(plan: &crate::api::types::Plan) -> String {
    let what = match (&plan.machine, &plan.source, &plan.destination) {
        (Some(machine), Some(source), Some(destination)) => {
            format!("plan: move {machine} from {source} to {destination}")
        }
        _ => "plan: nothing can be moved".to_owned(),
    };
    let outcome = match plan.outcome {
        PlanOutcome::Refused => " (refused)",
        PlanOutcome::Waiting => " (it waits for its latest safe start)",
        PlanOutcome::Dropped => " (dropped)",
        _ => "",
    };
    // Of a plan that has come to a point, the last reason says why now; of a new one, the first says what it is about.
    let reason = match plan.outcome {
        PlanOutcome::Dropped => plan.reasons.last(),
        _ => plan.reasons.first(),
    };
    let why = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
    format!("{what}{outcome}{why}")
}

fn stage_in_words(migration: &crate::api::types::Migration) -> Option<String> {
    let machine = &migration.machine;
    match migration.stage {
        MigrationStage::Transferring => {
            Some(format!("{machine}: memory and disk are on their way to {}", migration.destination))
        }
        MigrationStage::Settling => Some(format!("{machine}: the daemons settle where it runs")),
        MigrationStage::Completed => {
            let report = migration.report.as_ref()?;
            let (total, down) = (report.total_ms / 1e3, report.downtime_ms.total);
            Some(format!("{machine} runs on {} after {total:.2} s, {down:.1} ms of it stopped", migration.destination))
        }
        MigrationStage::Failed | MigrationStage::Cancelled | MigrationStage::Lost => {
            let why = migration.error.clone().unwrap_or_else(|| "no reason was given".to_owned());
            Some(format!("{machine} stays on {}: {why}", migration.source))
        }
        MigrationStage::Queued | MigrationStage::Reserving | MigrationStage::Retrying | MigrationStage::Verifying => {
            None
        }
    }
}
