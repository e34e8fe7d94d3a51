//! From a decision to a migration, and from its end back to what was learned.

use std::sync::Arc;
use std::time::Duration;

use super::{Daemon, PLANS_MAX};
use crate::api::types::{Migration, MigrationStage, Plan, PlanOutcome};
use crate::machine::chain;
use crate::planner::Chosen;
use crate::pool::wire::MigrateOrder;
use crate::security::access::{Action, Actor, Object};
use crate::store::embedded::Kind;

/// How often a migration that was planned is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// A host that does not answer for so long is not waited for any more.
const PATIENCE: Duration = Duration::from_secs(600);

impl Daemon {
    /// Carries out a decision in the background.
    pub(super) fn act(self: Arc<Self>, decision: Result<Chosen, Plan>) {
        match decision {
            Err(plan) => {
                // A plan that waits may change its mind about the machine; it is recorded once, and again when it starts.
                let known = plan.outcome == PlanOutcome::Waiting
                    && matches!(self.store.get::<Plan>(Kind::Plan, &plan.id), Ok(Some(_)));
                if !known {
                    self.audit.noted("plan", &format!("pool:{}", plan.pool), &plan.reasons.join("; "));
                }
                self.keep(&plan);
            }
            Ok(chosen) => {
                self.audit.noted("plan", &format!("machine:{}", chosen.machine), &chosen.plan.reasons.join("; "));
                tokio::spawn(async move { self.carry_out(chosen).await });
            }
        }
    }

    async fn carry_out(&self, mut chosen: Chosen) {
        match self.start(&chosen).await {
            Ok(migration) => {
                chosen.plan.migration = Some(migration.id.clone());
                self.keep(&chosen.plan);
                self.follow(&mut chosen, &migration.id).await;
            }
            Err(error) => {
                tracing::warn!(machine = chosen.machine, error, "a planned migration could not be started");
                self.planner().refused(&chosen);
                chosen.plan.outcome = PlanOutcome::Refused;
                chosen.plan.reasons.push(error);
            }
        }
        self.keep(&chosen.plan);
    }

    async fn start(&self, chosen: &Chosen) -> Result<Migration, String> {
        if chosen.source == self.config.host {
            let pool = self.config.peer(&chosen.request.destination).map(|peer| peer.pool.as_str());
            let about = Object { machine: Some(&chosen.machine), pool };
            let what = format!("machine:{}", chosen.machine);
            self.permit(&Actor::Planner, Action::Migrate, &what, about).map_err(|failure| failure.0.detail)?;
            return self.executor.start(&chosen.machine, &chosen.request).map_err(|error| chain(&error));
        }
        let peer = self.peers.get(&chosen.source).ok_or_else(|| format!("host `{}` is no peer", chosen.source))?;
        let order = MigrateOrder {
            machine: chosen.machine.clone(),
            destination: chosen.request.destination.clone(),
            limits: chosen.request.limits.clone(),
            trigger: chosen.request.trigger.clone(),
        };
        peer.client().migrate(&order).await.map_err(|error| chain(&error))
    }

    async fn follow(&self, chosen: &mut Chosen, id: &str) {
        let mut silent_since = None;
        loop {
            match self.look(&chosen.source, id).await {
                Ok(migration) if migration.stage.ended() => return self.learn(chosen, &migration),
                Ok(_) => silent_since = None,
                Err(error) => {
                    let since = *silent_since.get_or_insert_with(tokio::time::Instant::now);
                    if since.elapsed() > PATIENCE {
                        chosen.plan.outcome = PlanOutcome::Failed;
                        chosen.plan.reasons.push(format!("its outcome is not known: {error}"));
                        return;
                    }
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn look(&self, host: &str, id: &str) -> Result<Migration, String> {
        if host == self.config.host {
            return self.executor.get(id).map_err(|error| chain(&error));
        }
        let peer = self.peers.get(host).ok_or_else(|| format!("host `{host}` is no peer"))?;
        peer.client().migration(id).await.map_err(|error| chain(&error))
    }

    fn learn(&self, chosen: &mut Chosen, migration: &Migration) {
        if migration.stage == MigrationStage::Completed {
            chosen.plan.outcome = PlanOutcome::Completed;
        } else {
            chosen.plan.outcome = PlanOutcome::Failed;
            chosen.plan.reasons.extend(migration.error.clone());
        }
        if let Some(report) = &migration.report
            && migration.stage == MigrationStage::Completed
        {
            self.planner().learn(chosen, report);
        }
    }

    fn keep(&self, plan: &Plan) {
        let kept = self.store.put(Kind::Plan, &plan.id, plan);
        let kept = kept.and_then(|()| self.store.prune::<Plan>(Kind::Plan, PLANS_MAX, |plan| Some(plan.at_unix_ms)));
        if let Err(error) = kept {
            tracing::error!(error = chain(&error), "a plan cannot be stored");
        }
    }
}
