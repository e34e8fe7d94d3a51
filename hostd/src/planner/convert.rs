//! Between the predictor's units and the API's: the predictor counts memory in bytes, the API in MiB.

use predictor::{Contention, Forecast, LEVELS, PerResource, Resource as Kind, ResourceContention, Sample};

use crate::api::types::{Capacity, MachineSummary, Quantile, Resource, ResourceForecast, ResourceScore, Usage};

const MIB: f64 = 1_048_576.0;

/// The API's word for a resource.
pub fn resource(kind: Kind) -> Resource {
    match kind {
        Kind::Cpu => Resource::Cpu,
        Kind::Memory => Resource::Memory,
        Kind::Io => Resource::Io,
        Kind::Network => Resource::Network,
    }
}

/// A value in the API's unit.
pub fn from_predictor(kind: Kind, value: f64) -> f64 {
    if kind == Kind::Memory { value / MIB } else { value }
}

/// A machine's last measurement. Processor time counts as demand: time run alone never exceeds a capacity.
pub fn sample_of(machine: &MachineSummary) -> Sample {
    Sample { machine: machine.name.clone(), values: values_of(machine.usage.as_ref()) }
}

/// A measurement in the predictor's units.
pub fn values_of(usage: Option<&Usage>) -> PerResource<Option<f64>> {
    let value = |pick: fn(&Usage) -> f64| usage.map(pick);
    PerResource {
        cpu: value(|usage| usage.cpu_demand_cores.max(usage.cpu_cores)),
        memory: value(|usage| usage.memory_mib * MIB),
        io: value(|usage| usage.disk_bytes_per_second),
        network: value(|usage| usage.network_bytes_per_second),
    }
}

/// A capacity in the predictor's units; nothing is said of what is 0.
pub fn capacity_of(capacity: &Capacity) -> PerResource<Option<f64>> {
    let given = |value: f64| (value > 0.0).then_some(value);
    PerResource {
        cpu: given(capacity.cpu_cores),
        memory: given(capacity.memory_mib * MIB),
        io: given(capacity.disk_bytes_per_second),
        network: given(capacity.network_bytes_per_second),
    }
}

/// What an event adds.
pub fn change_of(adds: &Usage) -> PerResource<Option<predictor::Change>> {
    let add = |value: f64| (value != 0.0).then_some(predictor::Change::Add(value));
    PerResource {
        cpu: add(adds.cpu_cores),
        memory: add(adds.memory_mib * MIB),
        io: add(adds.disk_bytes_per_second),
        network: add(adds.network_bytes_per_second),
    }
}

/// One forecast.
pub fn forecast(kind: Kind, forecast: &Forecast, step_s: f64) -> ResourceForecast {
    let quantile = |(probability, value): (f64, f64)| Quantile { probability, value: from_predictor(kind, value) };
    ResourceForecast {
        resource: resource(kind),
        horizon_s: forecast.steps as f64 * step_s,
        quantiles: LEVELS.into_iter().zip(forecast.quantiles).map(quantile).collect(),
    }
}

fn known(contention: &Contention) -> impl Iterator<Item = (Kind, &ResourceContention)> {
    contention.resources.iter().filter_map(|(kind, state)| Some((kind, state.as_ref()?)))
}

/// The forecasts behind a pool's score.
pub fn forecasts_of(contention: &Contention, step_s: f64) -> Vec<ResourceForecast> {
    known(contention)
        .flat_map(|(kind, state)| state.path.iter().map(move |point| forecast(kind, point, step_s)))
        .collect()
}

/// The parts of a pool's score.
pub fn scores_of(contention: &Contention) -> Vec<ResourceScore> {
    let score = |(kind, state): (Kind, &ResourceContention)| ResourceScore {
        resource: resource(kind),
        probability: state.probability,
        load: from_predictor(kind, state.now),
        capacity: from_predictor(kind, state.capacity),
        limit: from_predictor(kind, state.limit),
    };
    known(contention).map(score).collect()
}

/// Steps ahead at which machines are forecast for people: soon, half way, and at the end of the horizon.
pub fn horizons(steps: usize) -> Vec<usize> {
    let mut horizons = vec![1, steps.div_ceil(4), steps.div_ceil(2), steps];
    horizons.dedup();
    horizons
}
