//! Ensembles of trees for many series: what one of them has lived through helps the others.
//!
//! Globally trained models beat those of single series where series are many and alike (Montero-Manso and Hyndman, *Principles and
//! algorithms for forecasting groups of time series*, International Journal of Forecasting 37, 2021). Lessons come in as features, what the
//! cheap forecast said, and what came; the trees only correct what was said, and only as long as their corrections have lately
//! been worth it. A [`Shared`] has one ensemble, a *head*, for each thing that is said from the same features.
//!
//! ```text
//! learn() at every outcome ──► lessons, a ring ──► begin(): a Fit, on its own ──► Fit::run() off the hot path ──► install()
//!                                                  meanwhile the last trees go on to speak
//! ```

use super::boost::{Boosted, Growth, Lessons, Loss};
use super::{Budget, CostClass};
use crate::season::{half, whole};
use serde::{Deserialize, Serialize};

/// Outcomes of corrected forecasts that are needed before corrections are used.
const TRIAL: u32 = 200;
/// One in so many lessons has to be new before trees are fitted again.
const SHARE_NEW: usize = 20;
/// Fewer lessons are not worth a fit.
const LEAST: usize = 200;
/// Trees that have no record yet are judged by the newest of so many parts of the lessons, fitted to the others.
const PARTS: usize = 3;

/// Lessons of many series, and the trees that were fitted to them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shared {
    growth: Growth,
    width: usize,
    /// Lessons kept at most,
    most: usize,
    /// and at present: as many as come in `span` steps. The oldest is forgotten for each new one.
    room: usize,
    /// Features, row by row, as upper halves of `f32`: trees look at which of 64 parts a feature is in.
    rows: Vec<u16>,
    targets: Vec<f32>,
    weights: Vec<f32>,
    next: usize,
    /// Steps that lessons are to reach back. If more than `most` come in them, every other one is left out,
    span: u64,
    /// and of new ones only one in so many is taken.
    every: u32,
    /// When the present span began, how many were taken in it, and what chance has come to.
    began: Option<u64>,
    taken: usize,
    dice: u64,
    heads: Vec<Head>,
    /// Weight of the newest loss.
    rate: f64,
}

/// One thing that is said, and the trees that correct it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Head {
    loss: Loss,
    offsets: Vec<f32>,
    /// Lessons since the last fit was begun.
    fresh: u64,
    model: Option<Boosted>,
    record: Record,
}

/// How corrections did.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Record {
    /// Usual loss of what was said without and with the trees.
    pub losses: [f64; 2],
    /// Outcomes that this is from.
    pub scored: u32,
}

impl Record {
    fn note(&mut self, losses: [f64; 2], rate: f64) {
        self.scored = self.scored.saturating_add(1);
        let rate = rate.max(1.0 / f64::from(self.scored));
        for (usual, loss) in self.losses.iter_mut().zip(losses) {
            *usual += (loss - *usual) * rate;
        }
    }
}

impl Shared {
    /// For rows of `width` features, a head for each of `losses`, keeping `most` lessons of `span` steps; `memory` is the number of
    /// outcomes by which trees are judged.
    #[must_use]
    pub fn new(losses: &[Loss], growth: Growth, width: usize, [most, span]: [usize; 2], memory: f64) -> Self {
        let head =
            |loss: &Loss| Head { loss: *loss, offsets: Vec::new(), fresh: 0, model: None, record: Record::default() };
        Self {
            growth,
            width,
            most: most.max(2),
            room: most.max(2),
            rows: Vec::new(),
            targets: Vec::new(),
            weights: Vec::new(),
            next: 0,
            span: span as u64,
            every: 1,
            began: None,
            taken: 0,
            dice: 1,
            heads: losses.iter().map(head).collect(),
            rate: 1.0 / memory.max(1.0),
        }
    }

    /// Takes what came of a forecast: its features, what the cheap one said, what was said with the trees, if there were some (both
    /// by head), and the outcome, which counts `weight` times, at step `time`.
    pub fn learn(
        &mut self,
        row: &[f32],
        offsets: &[f32],
        with_trees: &[Option<f32>],
        [target, weight]: [f32; 2],
        time: u64,
    ) {
        let numbers = row.iter().chain(offsets).chain([&target, &weight]);
        let sound = row.len() == self.width && offsets.len() == self.heads.len() && weight > 0.0;
        if !sound || !numbers.into_iter().all(|x| x.is_finite()) {
            return;
        }
        for (index, (head, offset)) in self.heads.iter_mut().zip(offsets).enumerate() {
            if let Some(said) = with_trees.get(index).copied().flatten().filter(|said| said.is_finite()) {
                let losses = [*offset, said].map(|said| f64::from(weight) * loss(head.loss, said, target));
                head.record.note(losses, self.rate);
            }
        }
        if self.takes() {
            self.keep(row.iter().map(|feature| half(*feature)), offsets, [target, weight], time);
        }
    }

    /// Whether chance takes this lesson. Not every so many: machines come in turn.
    fn takes(&mut self) -> bool {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.every <= 1 || (self.dice >> 32).is_multiple_of(u64::from(self.every))
    }

    fn keep(&mut self, row: impl Iterator<Item = u16>, offsets: &[f32], [target, weight]: [f32; 2], time: u64) {
        let over = time.saturating_sub(*self.began.get_or_insert(time)) >= self.span;
        if over && self.span > 0 {
            // Next to no lessons are no reason to forget those that there are.
            self.turn(self.taken.clamp(LEAST.min(self.most), self.most));
            (self.began, self.taken) = (Some(time), 0);
        } else if self.taken >= self.most && self.span > 0 {
            self.thin();
        }
        self.taken += 1;
        let place = Some(self.next).filter(|_| self.len() >= self.room);
        match place {
            Some(place) => {
                let kept = self.rows[place * self.width..][..self.width].iter_mut();
                kept.zip(row).for_each(|(kept, feature)| *kept = feature);
            }
            None => self.rows.extend(row),
        }
        put(&mut self.targets, place, target);
        put(&mut self.weights, place, weight);
        for (head, offset) in self.heads.iter_mut().zip(offsets) {
            head.fresh += 1;
            put(&mut head.offsets, place, *offset);
        }
        self.next = (self.next + 1) % self.room;
    }

    /// Where the oldest lesson is.
    fn oldest(&self) -> usize {
        if self.len() < self.room { 0 } else { self.next }
    }

    /// The oldest lesson first, and room for so many from now on.
    fn turn(&mut self, room: usize) {
        let (at, forgotten) = (self.oldest(), self.len().saturating_sub(room));
        if at > 0 || forgotten > 0 {
            self.rows.rotate_left(at * self.width);
            self.rows.drain(..forgotten * self.width);
            let numbers = [&mut self.targets, &mut self.weights].into_iter();
            for values in numbers.chain(self.heads.iter_mut().map(|head| &mut head.offsets)) {
                values.rotate_left(at);
                values.drain(..forgotten);
            }
        }
        self.room = room;
        self.next = self.len() % room;
    }

    /// Leaves every other lesson out.
    fn thin(&mut self) {
        self.turn(self.most);
        let (width, left) = (self.width, self.len().div_ceil(2));
        for place in 1..left {
            self.rows.copy_within(2 * place * width..(2 * place + 1) * width, place * width);
        }
        self.rows.truncate(left * width);
        let numbers = [&mut self.targets, &mut self.weights].into_iter();
        for values in numbers.chain(self.heads.iter_mut().map(|head| &mut head.offsets)) {
            for place in 1..left {
                values[place] = values[2 * place];
            }
            values.truncate(left);
        }
        (self.next, self.taken) = (self.len(), self.taken.div_ceil(2));
        self.every = self.every.saturating_mul(2);
    }

    /// How much of what a head would be fitted to is new, 0 to 1, and what the fit takes; `None` while it is not worth one.
    #[must_use]
    pub fn due(&self, head: usize) -> Option<(f64, u64)> {
        let (count, fresh) = (self.len(), self.heads.get(head)?.fresh);
        let due = count >= LEAST && fresh > (count / SHARE_NEW) as u64;
        // Judging them takes another fit.
        let times = if self.heads[head].record.scored < TRIAL { 2 } else { 1 };
        due.then(|| (fresh as f64 / count as f64, times * Lessons::work_of(count, self.width, &self.growth)))
    }

    /// All that fitting a head takes, to be run elsewhere; until [`Shared::install`] the last trees speak. `None` for a head that there is not.
    pub fn begin(&mut self, head: usize) -> Option<Fit> {
        // Oldest first: the newest ones judge.
        let turned = |values: &[f32], at: usize| [&values[at..], &values[..at]].concat();
        let at = self.oldest();
        let (newer, older) = self.rows.split_at(at * self.width);
        let rows = older.iter().chain(newer).map(|feature| whole(*feature)).collect();
        let (targets, weights) = (turned(&self.targets, at), turned(&self.weights, at));
        let own = self.heads.get_mut(head)?;
        own.fresh = 0;
        let offsets = turned(&own.offsets, at);
        let judge = own.record.scored < TRIAL;
        Some(Fit { loss: own.loss, growth: self.growth, width: self.width, rows, offsets, targets, weights, judge })
    }

    /// Takes what [`Fit::run`] has made. The old trees stay if it is nothing.
    pub fn install(&mut self, head: usize, fitted: Fitted) -> bool {
        let (Some(own), Some(model)) = (self.heads.get_mut(head), fitted.model) else { return false };
        own.model = Some(model);
        if own.record.scored < TRIAL
            && let Some(record) = fitted.record
        {
            own.record = record;
        }
        true
    }

    /// Fits all heads of which enough is new at once, as far as `budget` goes; returns how many. For replays, where nobody waits.
    pub fn refit(&mut self, budget: &mut Budget) -> usize {
        let mut count = 0;
        for head in 0..self.heads.len() {
            let Some(fit) = self.due(head).filter(|(_, work)| budget.spend(*work)).and_then(|_| self.begin(head))
            else {
                continue;
            };
            count += usize::from(self.install(head, fit.run()));
        }
        count
    }

    /// Takes lessons of a time before its own; of all together as many are kept as always.
    pub fn absorb(&mut self, older: &Self) {
        if older.width != self.width || older.heads.len() != self.heads.len() || older.is_empty() {
            return;
        }
        let own = self.clone();
        (self.began, self.taken, self.next, self.room) = (older.began, 0, 0, self.most);
        self.every = older.every.max(own.every);
        self.rows.clear();
        self.targets.clear();
        self.weights.clear();
        self.heads.iter_mut().for_each(|head| head.offsets.clear());
        for from in [older, &own] {
            let at = from.oldest();
            for place in (at..from.len()).chain(0..at) {
                let offsets: Vec<f32> = from.heads.iter().map(|head| head.offsets[place]).collect();
                let row = &from.rows[place * self.width..][..self.width];
                self.keep(
                    row.iter().copied(),
                    &offsets,
                    [from.targets[place], from.weights[place]],
                    older.began.unwrap_or(0),
                );
            }
        }
    }

    /// What it costs.
    pub const COST: CostClass = CostClass::Dear;

    /// What a head's trees make of a forecast, trusted or not; `None` before the first fit.
    #[must_use]
    pub fn opinion(&self, head: usize, row: &[f32], offset: f32) -> Option<f32> {
        Some(self.heads.get(head)?.model.as_ref()?.predict(row, offset)).filter(|said| said.is_finite())
    }

    /// Whether a head's trees have lately been better than what they correct.
    #[must_use]
    pub fn trusted(&self, head: usize) -> bool {
        let record = self.record(head);
        record.scored >= TRIAL && record.losses[1] < record.losses[0]
    }

    /// How a head did.
    #[must_use]
    pub fn record(&self, head: usize) -> Record {
        self.heads.get(head).map(|head| head.record).unwrap_or_default()
    }

    /// Things that are said.
    #[must_use]
    pub fn heads(&self) -> usize {
        self.heads.len()
    }

    /// Lessons kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.targets.len()
    }

    /// Whether nothing was learned yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    /// Bytes that it takes, lessons included.
    #[must_use]
    pub fn state_bytes(&self) -> usize {
        let head = |head: &Head| 4 * head.offsets.len() + head.model.as_ref().map_or(0, Boosted::state_bytes);
        let lessons = 2 * self.rows.len() + 8 * self.targets.len();
        size_of::<Self>() + lessons + self.heads.iter().map(head).sum::<usize>()
    }
}

/// Over what stands at a place, or behind all.
fn put(values: &mut Vec<f32>, place: Option<usize>, value: f32) {
    match place.and_then(|place| values.get_mut(place)) {
        Some(old) => *old = value,
        None => values.push(value),
    }
}

/// A fit to be made: all that it needs, and nothing else has to wait for it.
#[derive(Clone, Debug)]
pub struct Fit {
    loss: Loss,
    growth: Growth,
    width: usize,
    rows: Vec<f32>,
    offsets: Vec<f32>,
    targets: Vec<f32>,
    weights: Vec<f32>,
    judge: bool,
}

/// What a [`Fit`] has made.
#[derive(Clone, Debug, Default)]
pub struct Fitted {
    model: Option<Boosted>,
    record: Option<Record>,
}

impl Fit {
    /// Makes it. Pure, and takes long.
    #[must_use]
    pub fn run(&self) -> Fitted {
        let model = Boosted::fit(&self.lessons(0..self.targets.len()), self.loss, &self.growth);
        Fitted { record: model.as_ref().filter(|_| self.judge).and_then(|_| self.judged()), model }
    }

    fn lessons(&self, of: std::ops::Range<usize>) -> Lessons<'_> {
        Lessons {
            rows: &self.rows[of.start * self.width..of.end * self.width],
            width: self.width,
            offsets: &self.offsets[of.clone()],
            targets: &self.targets[of.clone()],
            weights: &self.weights[of],
        }
    }

    /// How trees do that were fitted to the older lessons, over the newest ones.
    fn judged(&self) -> Option<Record> {
        let count = self.targets.len();
        let from = count - count / PARTS;
        let model = Boosted::fit(&self.lessons(0..from), self.loss, &self.growth)?;
        let newest = self.lessons(from..count);
        let mut record = Record::default();
        for (index, row) in newest.rows.chunks_exact(self.width.max(1)).enumerate() {
            let (offset, target, weight) = (newest.offsets[index], newest.targets[index], newest.weights[index]);
            let said = [offset, model.predict(row, offset)];
            record.note(said.map(|said| f64::from(weight) * loss(self.loss, said, target)), 0.0);
        }
        Some(record)
    }
}

/// What saying `said` costs when `target` comes.
fn loss(kind: Loss, said: f32, target: f32) -> f64 {
    let (said, target) = (f64::from(said), f64::from(target));
    match kind {
        Loss::Squared => (said - target).powi(2),
        Loss::Pinball(level) => crate::quantile::pinball(level, said, target),
        // Squared error of the probability: Brier's score, by which probabilities are judged here.
        Loss::Logistic => (1.0 / (1.0 + (-said).exp()) - target).powi(2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lived(span: usize, steps: u64) -> Shared {
        let mut shared = Shared::new(&[Loss::Squared], Growth::default(), 2, [1_000, span], 100.0);
        for time in 0..steps {
            shared.learn(&[time as f32, 1.0], &[0.0], &[None], [time as f32, 1.0], time);
        }
        shared
    }

    #[test]
    fn lessons_reach_back_as_far_as_asked_and_no_further() {
        let newest = lived(0, 10_000);
        assert_eq!((newest.len(), newest.targets.iter().copied().fold(f32::MAX, f32::min)), (1_000, 9_000.0));
        let spread = lived(8_000, 7_400);
        assert!((500..=1_000).contains(&spread.len()) && spread.every == 8, "{} {}", spread.len(), spread.every);
        let early = spread.targets.iter().filter(|time| **time < 4_000.0).count();
        assert!((0.4..0.6).contains(&(early as f32 / spread.len() as f32)), "evenly: {early} of {}", spread.len());
        let fit = lived(8_000, 60_000).begin(0).expect("a head");
        assert!(fit.targets.windows(2).all(|pair| pair[0] < pair[1]), "oldest first");
        assert!(fit.targets[0] > 40_000.0, "and forgets in the end: {}", fit.targets[0]);
        assert!(fit.rows.chunks(2).zip(&fit.targets).all(|(row, target)| (row[0] - target).abs() <= 0.004 * target));
        // Few lessons take little room, however long it goes on.
        let few = lived(400, 5_000);
        assert!((few.len(), few.every) == (400, 1), "{} {}", few.len(), few.every);
        assert!(few.targets.iter().all(|time| *time >= 4_600.0));
    }

    #[test]
    fn older_lessons_come_before_its_own() {
        let (mut own, older) = (lived(0, 700), lived(0, 600));
        own.absorb(&older);
        assert_eq!(own.len(), 1_000);
        let fit = own.begin(0).expect("a head");
        assert_eq!((fit.targets[0], fit.targets[299], fit.targets[300], fit.targets[999]), (300.0, 599.0, 0.0, 699.0));
        let narrow = Shared::new(&[Loss::Squared], Growth::default(), 1, [10, 0], 1.0);
        own.absorb(&narrow);
        assert_eq!(own.len(), 1_000, "what does not fit is not taken");
    }
}
