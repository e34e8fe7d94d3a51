//! One bandwidth budget for all migrations that leave this host.
//!
//! It is shared anew whenever one begins or ends, or a limit changes: everyone gets the same share, and what a migration may
//! not use by its own limit goes to the others. Whoever gets less is told before whoever gets more, so that the budget is
//! kept at every moment.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::Mutex;
use vmm::api::ChangedLimits;

use crate::machine::chain;
use crate::machine::entry::Entry;
use crate::machine::registry::call;

/// The least that a VMM takes as a limit, in bytes per second.
pub const LEAST: u64 = 4096;

/// The budget and those that share it.
#[derive(Debug)]
pub(super) struct Budget {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    total: Option<u64>,
    members: BTreeMap<String, Member>,
}

#[derive(Debug)]
struct Member {
    entry: Arc<Entry>,
    own: Option<u64>,
    /// What its VMM was told last; `None` if it is not known.
    told: Option<Option<u64>>,
}

impl Budget {
    /// A budget of `total` bytes per second; `None` is no limit.
    pub(super) fn new(total: Option<u64>) -> Self {
        Self { state: Mutex::new(State { total, members: BTreeMap::new() }) }
    }

    /// All of it.
    pub(super) async fn total(&self) -> Option<u64> {
        self.state.lock().await.total
    }

    /// Changes all of it.
    pub(super) async fn set_total(&self, total: Option<u64>) {
        let mut state = self.state.lock().await;
        state.total = total;
        state.share().await;
    }

    /// A migration is about to begin: the others have made room when this returns its share.
    pub(super) async fn join(&self, id: &str, entry: &Arc<Entry>, own: Option<u64>) -> Option<u64> {
        let mut state = self.state.lock().await;
        // It is told by whoever starts it.
        state.members.insert(id.to_owned(), Member { entry: Arc::clone(entry), own, told: None });
        let share = state.shares().remove(id).flatten();
        if let Some(member) = state.members.get_mut(id) {
            member.told = Some(share);
        }
        state.share().await;
        share
    }

    /// A migration that an earlier hostd started, and that has whatever limit it was given then.
    pub(super) async fn adopt(&self, id: &str, entry: &Arc<Entry>, own: Option<u64>) {
        let mut state = self.state.lock().await;
        if !state.members.contains_key(id) {
            state.members.insert(id.to_owned(), Member { entry: Arc::clone(entry), own, told: None });
            state.share().await;
        }
    }

    /// Changes the limit of one migration, if it is under way.
    pub(super) async fn set_own(&self, id: &str, own: Option<u64>) {
        let mut state = self.state.lock().await;
        if let Some(member) = state.members.get_mut(id) {
            member.own = own;
            state.share().await;
        }
    }

    /// A migration has ended: the others share what it leaves.
    pub(super) async fn leave(&self, id: &str) {
        let mut state = self.state.lock().await;
        if state.members.remove(id).is_some() {
            state.share().await;
        }
    }
}

impl State {
    fn shares(&self) -> BTreeMap<String, Option<u64>> {
        let own: Vec<Option<u64>> = self.members.values().map(|member| member.own).collect();
        self.members.keys().cloned().zip(share(self.total, &own)).collect()
    }

    /// Tells every VMM its share, those with less than before first.
    async fn share(&mut self) {
        let shares = self.shares();
        let wanted = |id: &String| shares.get(id).copied().flatten();
        let mut changed: Vec<String> = Vec::new();
        for (id, member) in &self.members {
            if member.told != Some(wanted(id)) {
                changed.push(id.clone());
            }
        }
        changed.sort_by_key(|id| wanted(id).unwrap_or(u64::MAX));
        let grows = |member: &Member, share: Option<u64>| {
            member.told.is_some_and(|told| told.unwrap_or(u64::MAX) < share.unwrap_or(u64::MAX))
        };
        let (later, first): (Vec<_>, Vec<_>) =
            changed.into_iter().partition(|id| self.members.get(id).is_some_and(|member| grows(member, wanted(id))));
        for id in first.into_iter().chain(later) {
            let share = wanted(&id);
            let Some(member) = self.members.get_mut(&id) else { continue };
            let limits = ChangedLimits { bandwidth_bytes_per_second: Some(share), ..ChangedLimits::default() };
            match call(&member.entry, move |client| client.change_limits(&limits)).await {
                Ok(_) => member.told = Some(share),
                // It has just ended, or its VMM has: then it needs no share.
                Err(error) => tracing::info!(id, error = chain(&error), "a migration was not told its bandwidth"),
            }
        }
    }
}

/// Shares `total` among migrations with these limits of their own: equally, and what one may not use goes to the others
/// (max-min fairness; Bertsekas and Gallager, Data Networks, section 6.5.2).
fn share(total: Option<u64>, own: &[Option<u64>]) -> Vec<Option<u64>> {
    let Some(total) = total else { return own.to_vec() };
    let mut order: Vec<usize> = (0..own.len()).collect();
    order.sort_by_key(|&index| own.get(index).copied().flatten().unwrap_or(u64::MAX));
    let mut shares = vec![None; own.len()];
    let (mut left, mut waiting) = (total, own.len() as u64);
    for index in order {
        let fair = left / waiting.max(1);
        let mine = own[index].map_or(fair, |limit| limit.min(fair));
        left -= mine;
        waiting -= 1;
        shares[index] = Some(mine.max(LEAST));
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_budget_everyone_has_its_own_limit() {
        assert_eq!(share(None, &[None, Some(5000)]), [None, Some(5000)]);
    }

    #[test]
    fn everyone_gets_the_same_and_nothing_is_left_unused() {
        assert_eq!(share(Some(90_000), &[None, None, None]), [Some(30_000); 3]);
        assert_eq!(share(Some(90_000), &[None, Some(10_000), None]), [Some(40_000), Some(10_000), Some(40_000)]);
        assert_eq!(share(Some(90_000), &[Some(200_000), Some(10_000)]), [Some(80_000), Some(10_000)]);
        assert_eq!(share(Some(90_000), &[]), []);
    }

    #[test]
    fn the_sum_is_never_more_than_the_budget() {
        for count in 1..20usize {
            let own: Vec<Option<u64>> =
                (0..count).map(|index| (index % 3 == 0).then_some(5000 * (index as u64 + 1))).collect();
            let shares = share(Some(1_000_000), &own);
            let sum: u64 = shares.iter().copied().map(Option::unwrap_or_default).sum();
            assert!(sum <= 1_000_000, "{shares:?}");
            assert!(
                shares.iter().zip(&own).all(|(share, own)| own.is_none_or(|own| share.is_some_and(|it| it <= own)))
            );
        }
    }
}
